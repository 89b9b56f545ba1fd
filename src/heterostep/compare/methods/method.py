"""What a method of the comparison is: a dial, and what turning it does to a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to make a pipeline faster.

    Attributes:
        name: as on the command line.
        label: for people, one short phrase.
        dial: what its numbers mean, one short phrase.
        values: the sweep, from slow to fast.
        apply: apply(pipe, value, num_steps) -> a context in which the pipeline's calls are accelerated. Entered, it
            gives the pipeline call's options that the method changes (such as `num_inference_steps`). Afterwards the
            pipeline is as it was, also after an exception. `num_steps` is the dense run's.
        refuses: refuses(pipe) -> why this pipeline cannot be run by the method, in one line; None where it can.
        budget: the dial is about the runtime that is wanted, so the asked runtimes are its sweep.
        maps: while it is applied, `heterostep.report(pipe)` has a map of the evaluations per token.
        diagnostic: a bound that costs more than it saves: shown apart, and never a result.
        whole_batch: it decides from the data, once for all samples of a batch.
    """

    name: str
    label: str
    dial: str
    values: tuple[float, ...]
    apply: Callable[[Any, float, int], AbstractContextManager[dict[str, Any]]]
    refuses: Callable[[Any], str | None] = lambda pipe: None
    budget: bool = False
    maps: bool = False
    diagnostic: bool = False
    whole_batch: bool = False
