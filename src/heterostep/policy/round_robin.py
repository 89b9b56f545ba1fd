"""A control for the benchmark: as many tokens at every step, each in its turn.

It loses to dense steps unless K/V are fresh.

After the window's first step there is no dense one. Each token has its turn in `round_robin` steps, so that none is
skipped for longer; beside these probes run the tokens whose velocity is predicted to be most wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from heterostep.policy.base import Tokens, distribute_evenly
from heterostep.policy.window import Windowed

# How far velocities follow their last change over log(1 - sigma). Chosen by hand: early in a run about so much leaves
# least of the velocity's change, later all of it does (docs/background/method/figures.json, "v 0.65 of that").
SLOPE_WEIGHT = 0.65


class RoundRobin(Windowed):
    """See the module's description; `config.round_robin` is its length."""

    name = "round-robin"
    ranks_each_step = True

    @property
    def length(self) -> int:
        """Steps in which every token has its turn."""
        return self.config.round_robin or 1

    def inside(self, evaluations: int, steps: range, spend_remainder: bool) -> list[int]:
        dense = (self.window[0], *self.run.restarts)
        return by_round_robin(evaluations, self.run.tokens, steps, self.length, dense, spend_remainder)

    def replans_from(self, step: int, dense: bool) -> int | None:
        (start, stop), begins = self.window, step + 1
        return begins if start < begins < stop and (begins - start) % self.length == 0 else None

    def rank(self, scores: torch.Tensor, elapsed_sigma: torch.Tensor, step: int) -> torch.Tensor:
        turn = (step - self.window[0]) % self.length
        return with_probes(scores * elapsed_sigma, turn, self.length)

    def weight(self, change: torch.Tensor) -> torch.Tensor:
        # There is no change of all tokens to judge by.
        return torch.full_like(change, SLOPE_WEIGHT if self.config.extrapolate is None else self.config.extrapolate)

    def replay_options(self) -> dict[str, Any]:
        # Turns are counted from the window's first step.
        return {"dense_start": self.window[0]}

    def describe_minimum(self) -> str:
        start, stop = self.window
        dense = self.run.num_steps - stop + start + 1
        return f"dense steps: {dense}, then 1/{self.length} of the tokens at each"


def by_round_robin(
    evaluations: int,
    tokens: Tokens,
    steps: range,
    length: int,
    dense: Sequence[int] = (),
    spend_remainder: bool = True,
) -> list[int]:
    """Active tokens at each of the window's steps: as many at each, and enough that all come round.

    Args:
        evaluations: token evaluations that may be spent, 0..N * len(steps).
        tokens: how many there are.
        steps: the window's steps, or what is left of it, numbered from the run's first.
        length: no token is skipped for longer.
        dense: steps at which all tokens are evaluated: the window's first, and where another model takes over.
        spend_remainder: let one count fall between the sizes, so that the last evaluation is spent; else spend up to a
            unit less.

    Returns:
        A count in 0..N for each step. Their sum is `evaluations`, or the nearest that is possible.
    """
    least = Tokens(tokens.total, max(tokens.least, probes(tokens.total, length)))
    counts = [least.total if step in dense else least.least for step in steps]
    between = [position for position, step in enumerate(steps) if step not in dense]
    distribute_evenly(counts, max(evaluations - sum(counts), 0), between, least, spend_remainder)
    return counts


def probes(total: int, length: int) -> int:
    """Tokens whose turn it is at a step, at the most, so that all have had theirs in `length` steps."""
    return -(-total // length)


def with_probes(scores: torch.Tensor, turn: int, length: int) -> torch.Tensor:
    """Scores [B, N] in which the tokens whose turn it is come first: neighbours, such as a frame or a part of it.

    Args:
        scores: higher is more urgent, [B, N].
        turn: 0..length - 1.
        length: turns until all have had theirs.
    """
    total = scores.shape[1]
    scores = scores.clone()
    scores[:, turn * total // length : (turn + 1) * total // length] = torch.inf
    return scores
