"""What one generation remembers: per guidance branch the held velocities and K/V, and for all branches who is active.

Shapes: B batch, N tokens, C values a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from heterostep.kv_cache import KVCache


@dataclass
class Branch:
    """One guidance branch (one of the transformer's calls in each step)."""

    kv: dict[int, KVCache] = field(default_factory=dict)
    # K/V of the text and image states do not depend on the step.
    cross_kv: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    velocity: torch.Tensor | None = None  # [B, N, C], each token's last
    scores: torch.Tensor | None = None  # [B, N], of the last step that evaluated every token
    text: Any = None  # the states that `cross_kv` was made from
    output: Any = None  # what the transformer returned last
    last_step: int = -1

    @property
    def kv_bytes(self) -> int:
        """Bytes of the self-attention and cross-attention K/V."""
        held = sum(t.numel() * t.element_size() for kv in self.cross_kv.values() for t in kv)
        return held + sum(cache.nbytes for cache in self.kv.values())

    def free_kv(self) -> None:
        """Give the K/V memory back; velocities stay."""
        for cache in self.kv.values():
            cache.reset()
        self.kv.clear()
        self.cross_kv.clear()


@dataclass
class Generation:
    """One run of the denoising loop."""

    schedule: torch.Tensor  # the scheduler's timesteps: a new tensor marks a new generation
    num_steps: int
    grid: tuple[int, int, int]  # frames, height, width in tokens
    batch: int
    window: tuple[int, int]
    counts: list[int]  # active tokens a step; what lies ahead may still be corrected
    evaluations: torch.Tensor  # [B, N] int32, on the CPU
    evaluated_at: torch.Tensor  # [B, N] sigma of each token's last evaluation
    elapsed: torch.Tensor  # [B, N] sigma between that and this step
    branches: list[Branch] = field(default_factory=list)
    step: int = -1
    calls: int = 0  # the transformer's calls so far in this step
    index: torch.Tensor | None = None  # the active tokens [B, n]; None where all are
    ranking: torch.Tensor | None = None  # [B, N]
    meetings: int = 0
    kv_bytes_peak: int = 0
    finished: bool = False

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width

    def branch(self, position: int) -> Branch:
        """The branch of the step's call number `position`."""
        while len(self.branches) <= position:
            self.branches.append(Branch())
        return self.branches[position]
