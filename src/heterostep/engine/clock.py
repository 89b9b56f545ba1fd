"""Seconds of denoising steps, and what a step with fewer active tokens will cost."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from heterostep.parallel import ALONE, Ranks


class StepClock:
    """Marks the start of each step; on CUDA with events, so that no step waits for the host.

    Args:
        device: where the steps run.
        ranks: the processes that make them together, and must plan by the same seconds.
    """

    def __init__(self, device: torch.device, ranks: Ranks = ALONE) -> None:
        self._device, self._cuda, self._ranks = device, device.type == "cuda", ranks
        self._marks: list[Any] = []
        # After which mark each came, its begin and its end.
        self._pauses: list[tuple[int, Any, Any]] = []
        self._agreed: list[float] = []

    def mark(self) -> None:
        """A step begins, or the last one has ended."""
        if self._cuda and not self._marks:
            # What is still to be done from before would hide a part of the first step.
            with torch.cuda.device(self._device):
                torch.cuda.current_stream().synchronize()
        self._marks.append(self._now())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is not a step's, such as a callback's work."""
        began = self._now()
        try:
            yield
        finally:
            self._pauses.append((len(self._marks) - 1, began, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        with torch.cuda.device(self._device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if not self._cuda:
            return end - begin
        # A callback may have left another stream current.
        begin.synchronize()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def agree(self) -> None:
        """Take the first rank's seconds of what has been timed; every rank has to be here."""
        if self._ranks.size > 1:
            self._agreed += self._ranks.broadcast_floats(self.durations()[len(self._agreed) :])

    def durations(self) -> list[float]:
        """Seconds between one mark and the next, without pauses; on CUDA this waits for the last mark."""
        known, marks = len(self._agreed), self._marks
        if self._cuda and marks:
            marks[-1].synchronize()
        seconds = [self._between(a, b) for a, b in zip(marks[known:], marks[known + 1 :])]
        for after, begin, end in self._pauses:
            if known <= after < known + len(seconds):
                seconds[after - known] -= self._between(begin, end)
        return self._agreed + seconds


# A first call this many times slower than expected is treated as warm-up (compilation or autotuning). Chosen by hand.
SLOW = 1.5
# A call that keeps K and V takes the pipeline's own seconds to within this factor (measured: 0.88 and 1.13 of them).
NEAR = 1.2
# A step this many times as long as a dense one is none: the process stood still. Chosen by hand.
STOOD_STILL = 8
# Sparse calls that may be first ones: their kernels are compiled in one, they are recorded as CUDA graphs in the next.
FIRST_SPARSE = 3


class StepCost:
    """seconds = fixed + (dense - fixed) * active share, fitted to the steps timed so far.

    Args:
        durations, shares: seconds and active share of each.
        warm: whether this process has made such a run before. What its first calls take then, such as recording CUDA
            graphs, every run takes, and it counts.
        kept: steps that kept K and V. A dense step that did not is the pipeline's own.
        samples: how many each step called the transformer with: fewer once guidance has ended. A step's seconds go
            with them, and those ahead are taken to be as the latest. Empty where all are alike.

    Attributes:
        dense: seconds of a dense step, the (lower) median of those but the first.
        plain: seconds of a dense step of the pipeline without heterostep.
        fixed: the part of a sparse step that does not shrink with its tokens.
        settled: whether more sparse steps have been timed than those that may be first calls.
        skipped: seconds of a skipped step, which evaluates no token.
        steady: the timed seconds, less the warm-up in them.
        warmup: seconds that compilation and other first calls took, of the first two dense steps, the first that keeps
            K and V and the first sparse ones; and those in which the process stood still.
    """

    def __init__(
        self,
        durations: list[float],
        shares: list[float],
        warm: bool = False,
        kept: Collection[int] = (),
        samples: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        samples = {at: number for at, number in samples.items() if number}
        latest = samples[max(samples)] if samples else 1
        # How many steps as the latest each timed one is.
        self._sizes = [samples.get(at, latest) / latest for at in range(len(durations))]
        timed = [(share, seconds / size) for share, seconds, size in zip(shares, durations, self._sizes)]
        # The first step also warms caches and allocators, so it says little of the others; of two, the quicker.
        dense = [seconds for share, seconds in timed if share == 1]
        self.dense = min(dense) if len(dense) < 3 else statistics.median_low(dense[1:])
        # Few may have been timed. Of the first step alone only what it may be without its warm-up is believed.
        plain = {at: seconds for at, (share, seconds) in enumerate(timed) if share == 1 and at not in kept}
        most = NEAR if set(plain) == {0} else SLOW
        usual = [seconds for seconds in plain.values() if self.dense / most <= seconds <= most * self.dense]
        self.plain = statistics.median_low(usual or [self.dense])
        skipped = [seconds for share, seconds in timed if share == 0]
        self.skipped = min(statistics.median(skipped), self.dense) if skipped else 0.0
        # The line goes through the dense median: it is the best known point, and the target is measured in it.
        fixed = [(seconds - share * self.dense) / (1 - share) for share, seconds in timed if 0 < share < 0.95]
        # A first call says nothing unless it was quick.
        self.settled = len(fixed) > FIRST_SPARSE
        known = fixed[FIRST_SPARSE:] or [min(fixed, default=0.0)]
        least = max(statistics.median(known), 0.0)
        self.fixed = 0.0 if not self.settled and least > self.dense else min(least, self.dense)
        sparse = [at for at, share in enumerate(shares) if 0 < share < 1]
        whole = [at for at, share in enumerate(shares) if share == 1]
        recorded = {*sparse[:FIRST_SPARSE]}
        keeping = [at for at in whole if at in kept]
        first_calls = set() if warm else {*whole[:2], *keeping[:1], *recorded}
        expected = [self.seconds(share) * size for share, size in zip(shares, self._sizes)]
        self.steady = [
            expected[at]
            if (at in first_calls and seconds > SLOW * expected[at])
            or (at not in recorded and seconds > STOOD_STILL * self.dense * size)
            else seconds
            for at, (seconds, size) in enumerate(zip(durations, self._sizes))
        ]
        self.warmup = sum(durations) - sum(self.steady)

    def seconds(self, share: float) -> float:
        """Predicted seconds of a step with this active share, 0..1."""
        if share == 0:
            return self.skipped
        return self.fixed + (self.dense - self.fixed) * share

    def dense_run(self, num_steps: int) -> float:
        """Predicted seconds of a whole dense run without heterostep, once everything is warm."""
        return self.plain * (sum(self._sizes) + num_steps - len(self._sizes))
