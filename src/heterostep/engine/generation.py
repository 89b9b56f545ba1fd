"""What one generation remembers: per guidance branch the held velocities and K/V, and for all branches who is active.

Shapes: B samples, N tokens, C values a token, b batch of a branch's calls (B times the guidance branches in one call).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from heterostep.config import HSAConfig
from heterostep.engine.clock import StepClock
from heterostep.engine.schedule import Schedule
from heterostep.kv.cache import KVCache, StaticKV, Workspace
from heterostep.parallel import ALONE, Ranks
from heterostep.sigmas import log_alpha

if TYPE_CHECKING:
    from heterostep.engine.cuda_graphs import ReplayedCalls
    from heterostep.engine.forecast import Stores
    from heterostep.engine.trajectory import Trajectory
    from heterostep.grid import TokenGrid
    from heterostep.policy import Change


@dataclass(eq=False)
class Branch:
    """One guidance branch (one of the transformer's calls in each step)."""

    stores: Sequence[KVCache | StaticKV] = ()  # one for each attention of `expert` that keeps K and V, once any is kept
    expert: int = -1  # which of the pipeline's transformers the stores belong to
    kind: Hashable = None  # see `Adapter.call_kind`
    velocity: torch.Tensor | None = None  # [b, N, C], of each token's last evaluation
    slope: torch.Tensor | None = None  # [b, N, C] float32, how it had changed since the one before, over `log_alpha`
    scores: torch.Tensor | None = None  # [b, N], of the last dense step
    text: Any = None  # the states that the static K/V were made from
    text_version: Any = None
    output: Any = None  # what the transformer returned last
    last_step: int = -1
    batch: int = 0  # b
    replays: dict[int, ReplayedCalls] = field(default_factory=dict)  # of its calls of few tokens, by their number

    @property
    def kv_bytes(self) -> int:
        """Bytes on the device of the self-attention and cross-attention K/V."""
        return sum(store.nbytes for store in self.stores)

    @property
    def kv_host_bytes(self) -> int:
        """Bytes of K/V in host memory."""
        return sum(store.host_nbytes for store in self.stores)

    def is_of_another(self, text: torch.Tensor | None) -> bool:
        """Whether the text states differ from those that the branch was created with."""
        if self.text is None or text is None or text is self.text:
            return False
        return text.shape != self.text.shape or not torch.equal(text, self.text)

    def free_kv(self) -> None:
        """Give the K/V memory back; velocities stay."""
        self.replays.clear()
        for store in self.stores:
            store.reset()

    def follow_text(self, text: Any, loras: Any) -> None:
        """Drop the K/V that come from the text where it is another tensor than before, or has been written to; or where
        LoRAs are not as they were."""
        version = None if text is None or text.is_inference() else text._version
        if text is not self.text or (version, loras) != self.text_version:
            self.text, self.text_version = text, (version, loras)
            for store in self.stores:
                if isinstance(store, StaticKV):
                    store.reset()


@dataclass(eq=False)
class Generation:
    """One run of the denoising loop."""

    timesteps: torch.Tensor  # the scheduler's: a new tensor marks a new generation
    first: int  # the scheduler's step that this run begins with (above 0 in video-to-video)
    grid: TokenGrid
    samples: int  # B
    schedule: Schedule
    counts: list[int]  # active tokens a step; what lies ahead may still be corrected
    clean: torch.Tensor | None  # [B, N] bool, tokens without noise
    trajectory: Trajectory
    clock: StepClock
    log_alphas: list[float]  # of the run's sigmas
    evaluations: torch.Tensor  # [B, N] int32, of the steps that have been made
    evaluated_at: torch.Tensor  # [B, N] sigma of each token's last evaluation
    elapsed_sigma: torch.Tensor  # [B, N] between that and this step
    interval: torch.Tensor  # [B, N] `log_alpha` between each token's last two evaluations
    weight: torch.Tensor  # [B], how far held velocities follow their slope
    ranks: Ranks = ALONE  # the processes that share the tokens
    changes: list[Change] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    expert: int = -1  # which of the pipeline's transformers runs
    step: int = -1
    steps_done: int = 0
    calls: int = 0  # the transformers' calls so far in this step
    index: torch.Tensor | None = None  # the active tokens [B, n]; None where all are
    ranking: torch.Tensor | None = None  # [B, N]
    rankings: int = 0  # dense steps whose scores have been looked at
    unranked: bool = False  # the last dense step's have not
    workspace: Workspace = field(default_factory=Workspace)  # what the K/V stores use in turn
    stores: Stores | None = None  # how K and V are kept, chosen when they first are, for each expert
    kv_store: str = "none"  # the same for the report
    store_names: tuple[str, ...] = ()
    kept: set[int] = field(default_factory=set)  # steps whose calls kept K and V
    unplanned_evaluations: int = 0  # of tokens, by branches that came back at steps that do not evaluate all
    samples_by_step: dict[int, int] = field(default_factory=dict)  # `samples_called` at the end of each
    fell_back: bool = False  # a store ran out of memory, and a smaller one took over
    kv_bytes_peak: int = 0
    kv_host_bytes_peak: int = 0
    warm: bool = False  # this process has made such a run before, so nothing is left to compile
    finished: bool = False
    over: bool = False  # the pipeline's call has ended: what comes is another generation

    @functools.cached_property
    def graph_pool(self) -> Any:
        """The memory that recorded calls use in turn."""
        return torch.cuda.graph_pool_handle()

    @property
    def total(self) -> int:
        """N."""
        return self.schedule.run.tokens.total

    @property
    def config(self) -> HSAConfig:
        """The user's options."""
        return self.schedule.config

    @property
    def guided(self) -> bool:
        """Whether this step's velocity is made of several guidance branches."""
        return self.samples_called > self.samples

    @property
    def samples_called(self) -> int:
        """Samples that this step has called the transformers with so far: those of each guidance branch."""
        return sum(branch.batch for branch in self.branches if branch.last_step == self.step)

    @property
    def elapsed_log_alpha(self) -> torch.Tensor:
        """`log_alpha` that has passed since each token's last evaluation, [B, N]."""
        return self.log_alphas[self.step] - log_alpha(self.evaluated_at)

    @property
    def is_dense(self) -> bool:
        """Whether this step evaluates every token."""
        return self.step >= 0 and self.counts[self.step] == self.total

    @property
    def all_dense(self) -> bool:
        """Whether no step skips anything."""
        return all(count == self.total for count in self.counts)

    @property
    def sparse_follows(self) -> bool:
        """Whether a later step evaluates some of the tokens, or may come to."""
        ahead = self.counts[self.step + 1 :]
        if self.schedule.replans and self.schedule.sparse:
            return bool(ahead)
        return any(0 < count < self.total for count in ahead)

    def wants_kv(self, drift: bool) -> bool:
        """Whether this step's K and V are read by a later one, or are to be compared with a later dense step's."""
        ahead = self.counts[self.step + 1 :]
        if self.all_dense and not self.schedule.replans:
            return False
        if self.schedule.run.tokens.least and ahead:
            # Every step that is not dense reads them, and which are may change after this one. The first two go
            # without where they can: in them the pipeline's own seconds are measured, of which the first has warm-up.
            return self.step > (0 if drift else 1) or ahead[0] < self.total
        whole = list(itertools.takewhile(lambda count: count in (0, self.total), ahead))
        if len(whole) == len(ahead):
            return False
        # A change is wanted of the last two dense steps, and which those are may still change.
        return (drift and self.step > 0) or self.total not in whole

    @property
    def skips_follow(self) -> bool:
        """Whether any velocity will be held, or may come to be."""
        ahead = self.counts[self.step + 1 :]
        return bool(ahead) if self.schedule.replans else any(count < self.total for count in ahead)

    def branch(self, position: int) -> Branch:
        """The branch of the step's call number `position`."""
        while len(self.branches) <= position:
            self.branches.append(Branch())
        return self.branches[position]

    def note_begun_anew(self, samples: int) -> None:
        """Branches of so many samples had nothing to go by at this step: all of their tokens were evaluated, and no
        line goes from what was guided by others."""
        self.unplanned_evaluations += (self.total - self.counts[self.step]) * samples
        if not self.is_dense:
            self.trajectory.restart()

    def free_kv(self) -> None:
        """Give all branches' K/V memory back."""
        for branch in self.branches:
            branch.free_kv()
        self.workspace.reset()

    def release(self) -> None:
        """Give everything back but what the report is made of."""
        self.free_kv()
        self.branches.clear()
        self.trajectory.restart()
        self.index = self.ranking = None

    def leave_out_single_tokens(self) -> bool:
        """Skip the sparse steps ahead; False, and nothing changes, where single tokens have to be."""
        if not self.schedule.leave_out_single_tokens():
            return False
        ahead = self.step + 1
        self.counts[ahead:] = [count if count == self.total else 0 for count in self.counts[ahead:]]
        return True

    def drop_stores(self) -> None:
        """Give the memory back, and let stores be chosen anew."""
        self.free_kv()
        self.stores = None
        for branch in self.branches:
            branch.stores = ()

    def note_kv(self) -> None:
        """Take down how much is kept."""
        device = sum(branch.kv_bytes for branch in self.branches)
        self.kv_bytes_peak = max(self.kv_bytes_peak, device + self.workspace.nbytes if device else 0)
        self.kv_host_bytes_peak = max(self.kv_host_bytes_peak, sum(branch.kv_host_bytes for branch in self.branches))
