"""What several commands take, checked: one clear line for each fault."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from heterostep import interrupts, launch
from heterostep.devices import device_of
from heterostep.errors import HeterostepError
from heterostep.files import name_is_too_long
from heterostep.making import OFFLOADS, is_out_of_memory

DEVICE_HELP = "cpu, cuda or cuda:N; auto takes CUDA where there is one."
DTYPE_HELP = (
    "auto: float32 on the CPU, bfloat16 on CUDA. tf32: float32 weights, TF32 matrix products, attention in float16 "
    "(overflows above 65504)."
)


# Planning takes a moment for each, and no scheduler is made for more.
MOST_STEPS = 10_000
# Processes that a try without GPUs may start, where there are fewer cores.
MOST_ON_CPU = 8
POLICY_HELP = "Where evaluations go: auto, or hsa (the paper's step divisors)."
SYNC_HELP = "K/V of skipped tokens: hold; drift along their last change; or fresh, a bound that saves nothing."


def check_guidance(option: str, guidance: float | None) -> None:
    if guidance is not None and not 0 <= guidance < math.inf:
        raise HeterostepError(f"{option} must be a number of at least 0, not {guidance:g}")


def check_offload(offload: str, device: str, gpus: int) -> None:
    """Check that weights can wait in host memory, before they are loaded.

    Raises:
        HeterostepError: they cannot; says why.
    """
    if offload not in OFFLOADS:
        raise HeterostepError(f"--offload must be one of {', '.join(OFFLOADS)}, not {offload}")
    if offload == "none":
        return
    if gpus > 1:
        raise HeterostepError("--offload is for one GPU: leave it out, or --gpus")
    if device_of(device).type == "cpu":
        raise HeterostepError("--offload needs a GPU: leave it out")


def check_folder(path: Path) -> None:
    """Check that the folder is there or can be made, before any work."""
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise HeterostepError(f"{there} is not a folder")
    _try_to_write(there)


def _try_to_write(folder: Path) -> None:
    """The system's word for it is not enough: it allows everything to root, also where nothing can be written."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise HeterostepError(f"cannot write to the folder {folder}: {error.strerror}") from error


def check_outputs(*outputs: tuple[Path | None, tuple[str, ...]]) -> None:
    """Check that each (path, suffixes) can be written, before any work."""
    given = [(path, suffixes) for path, suffixes in outputs if path is not None]
    for path, suffixes in given:
        if path.name and name_is_too_long(path):
            raise HeterostepError(f"the file name {path.name[:20]}... is too long")
        if path.is_dir():
            raise HeterostepError(f"{path} is a folder: give a file that ends in {' or '.join(suffixes)}")
        if path.suffix.lower() not in suffixes:
            raise HeterostepError(f"{path} should end in {' or '.join(suffixes)}")
        if not path.parent.is_dir():
            raise HeterostepError(f"there is no folder {path.parent} to write {path.name} to")
        _try_to_write(path.parent)
    if len({path.resolve() for path, _ in given}) < len(given):
        raise HeterostepError("two outputs have the same path")


def why_foreign(prompt: str) -> str | None:
    """What the bundled model cannot follow in a prompt; None where it can."""
    from heterostep.tiny import world

    try:
        world.parse(prompt)
    except HeterostepError as error:
        return str(error)
    return None


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No chatter of libraries between the progress lines."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    interrupts.check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


OFFLOAD_HELP = "none; model: one model on the GPU at a time; sequential: one layer at a time, slow."
GPUS_HELP = "GPUs of this machine that make one video together."


def those_given(options: Mapping[str, bool]) -> str:
    """The names of the options that were given, for "leave out ..."; empty where none was."""
    return " and ".join(name for name, given in options.items() if given)


def start_ranks(gpus: int, device: str, arguments: Sequence[str]) -> None:
    """Where several GPUs are asked for: this command once more on each of them, and out of here when they have ended.

    In one of those processes, and for one GPU, this only checks.

    Raises:
        HeterostepError: there are not so many, or a process failed.
    """
    if gpus == 1:
        return
    if launch.rank() is not None:
        if launch.size() != gpus:
            raise HeterostepError(f"--gpus is {gpus}, but {launch.size()} processes were started")
        return
    place = device_of(device)
    if place.index is not None:
        raise HeterostepError("--gpus takes the first GPUs: leave out the number of --device")
    if place.type == "cpu" and device == "auto":
        raise HeterostepError(f"there are no {gpus} GPUs: torch sees none (--device cpu is for a try without)")
    if place.type == "cpu" and gpus > (most := max(MOST_ON_CPU, os.cpu_count() or 1)):
        raise HeterostepError(f"--gpus {gpus} would start as many processes on this CPU: give {most} at the most")
    if place.type == "cuda":
        import torch

        if torch.cuda.device_count() < gpus:
            raise HeterostepError(f"there are no {gpus} GPUs: torch sees {torch.cuda.device_count()}")
    raise typer.Exit(launch.run(arguments, gpus))


@contextlib.contextmanager
def on_device(gpus: int, device: str) -> Iterator[Any]:
    """Where this process computes, with the others where there are several."""
    place = device_of(device)
    if gpus == 1:
        yield place
        return
    with launch.joined(place.type) as place:
        yield place


def is_seen(gpus: int) -> bool:
    """Whether this process shows its progress and writes the results."""
    return gpus == 1 or launch.rank() in (None, 0)


@contextlib.contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Running out of memory as one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise HeterostepError(f"out of memory: {advice}") from error
