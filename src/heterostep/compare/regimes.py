"""Regimes: the guidance, shift, solver and number of steps of published checkpoints, and a pipeline put into one."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from heterostep.errors import HeterostepError, first_line
from heterostep.pipeline import check_pipeline

TEXT, IMAGE = "text", "image"
SOLVERS = {"unipc": "UniPC", "dpm": "DPM-Solver++", "euler": "Euler"}
_X = r"\d+(?:\.\d+)?"
# A name that says all numbers, for `named`.
_NUMBERS = re.compile(
    rf"(?P<solver>{'|'.join(SOLVERS)})-(?P<steps>\d+)-shift-(?P<shift>{_X})-guidance-(?P<guidance>{_X})"
    rf"(-terminal-(?P<terminal>{_X}))?(-experts-(?P<boundary>{_X}))?"
)
EXAMPLE = "euler-25-shift-7-guidance-5"
# Pipelines that can be given a second expert.
_TWO_EXPERTS = ("WanPipeline", "WanImageToVideoPipeline")


@dataclass(frozen=True)
class Regime:
    """Settings under which a model is sampled.

    Attributes:
        name: as on the command line; also the name of its folder.
        label: for people, one short phrase.
        solver: "unipc", "dpm" (DPM-Solver++) or "euler", on the sigmas of flow matching.
        steps: of the dense run.
        shift: s in sigma' = s sigma / (1 + (s - 1) sigma).
        guidance: of the call; at most 1 is without guidance.
        shift_terminal: the last evaluated sigma, to which the others are stretched; None leaves them. Not with "dpm".
        boundary: the sigma under which the second of two experts takes over; None for one expert.
        guidance_2: the second expert's guidance; None for the first one's.
        tasks: what its checkpoint does, of "text" and "image"; any task can be run in any regime.
        source: whose settings these are.

    Raises:
        HeterostepError: a number is out of range.
    """

    name: str
    label: str
    solver: str
    steps: int
    shift: float
    guidance: float
    shift_terminal: float | None = None
    boundary: float | None = None
    guidance_2: float | None = None
    tasks: tuple[str, ...] = (TEXT, IMAGE)
    source: str = ""

    def __post_init__(self) -> None:
        shares = (each for each in (self.shift_terminal, self.boundary) if each is not None)
        sound = self.solver in SOLVERS and self.steps >= 1 and self.shift > 0 and self.guidance >= 0
        sound &= all(0 < each < 1 for each in shares) and set(self.tasks) <= {TEXT, IMAGE}
        sound &= self.solver != "dpm" or self.shift_terminal is None
        if not sound or (self.guidance_2 is not None and self.boundary is None):
            raise HeterostepError(
                f"the regime {self.name} is not possible: it needs unipc, dpm or euler, 1 step or more, a shift "
                "above 0, guidance of 0 or more, a terminal sigma (not with dpm) and experts' sigma between 0 and 1"
            )

    @property
    def numbers(self) -> dict[str, Any]:
        """What the regime is, without what it is called: a folder holds a comparison of these."""
        names = ("solver", "steps", "shift", "guidance", "shift_terminal", "boundary", "guidance_2")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def text(self) -> str:
        """The numbers for people, as in "UniPC 50, shift 5, guidance 6"."""
        parts = [f"{SOLVERS[self.solver]} {self.steps}", f"shift {self.shift:g}"]
        if self.shift_terminal is not None:
            parts.append(f"terminal {self.shift_terminal:g}")
        low = "" if self.guidance_2 is None else f" and {self.guidance_2:g}"
        parts.append(f"guidance {self.guidance:g}{low}")
        if self.boundary is not None:
            parts.append(f"two experts at {self.boundary:g}")
        return ", ".join(parts)


def _regimes() -> Iterator[Regime]:
    wan21, wan22, ltx, hunyuan = "Wan-Video/Wan2.1", "Wan-Video/Wan2.2", "Lightricks/LTX-2", "HunyuanVideo-1.5"
    text, image = (TEXT,), (IMAGE,)
    yield Regime("wan2.1-t2v-14b", "Wan 2.1 T2V 14B", "unipc", 50, 5, 5, tasks=text, source=wan21)
    yield Regime("wan2.1-t2v-1.3b", "Wan 2.1 T2V 1.3B", "unipc", 50, 8, 6, tasks=text, source=wan21)
    yield Regime("wan2.1-i2v-480p", "Wan 2.1 I2V 480p", "unipc", 40, 3, 5, tasks=image, source=wan21)
    yield Regime("wan2.1-i2v-720p", "Wan 2.1 I2V 720p", "unipc", 40, 5, 5, tasks=image, source=wan21)
    yield Regime("wan2.1-flf2v", "Wan 2.1 FLF2V, VACE", "unipc", 50, 16, 5, source=wan21)
    yield Regime(
        "wan2.2-t2v-a14b", "Wan 2.2 T2V A14B", "unipc", 40, 12, 4, boundary=0.875, guidance_2=3, tasks=text,
        source=wan22,
    )  # fmt: skip
    yield Regime(
        "wan2.2-i2v-a14b", "Wan 2.2 I2V A14B", "unipc", 40, 5, 3.5, boundary=0.9, guidance_2=3.5, tasks=image,
        source=wan22,
    )  # fmt: skip
    yield Regime("wan2.2-ti2v-5b", "Wan 2.2 TI2V 5B", "unipc", 50, 5, 5, source=wan22)
    # e^2.05: what mu is at the 4096 tokens that its shifts are given up to.
    yield Regime("ltx-2", "LTX-2.0", "euler", 40, 7.8, 3, shift_terminal=0.1, source=ltx)
    yield Regime("ltx-2.3", "LTX-2.3", "euler", 30, 7.8, 3, shift_terminal=0.1, source=ltx)
    yield Regime("hunyuan1.5-480p", "HunyuanVideo 1.5 480p", "euler", 50, 5, 6, source=hunyuan)
    yield Regime("hunyuan1.5-720p-t2v", "HunyuanVideo 1.5 720p T2V", "euler", 50, 9, 6, tasks=text, source=hunyuan)
    yield Regime("hunyuan1.5-720p-i2v", "HunyuanVideo 1.5 720p I2V", "euler", 50, 7, 6, tasks=image, source=hunyuan)
    # The checkpoint is image-to-video's, but of distilled models with a dozen steps it is the only one here.
    yield Regime("hunyuan1.5-distilled", "HunyuanVideo 1.5 step-distilled", "euler", 12, 7, 1, source=hunyuan)
    yield Regime("lightx2v", "lightx2v LoRA, 4 steps", "euler", 4, 5, 1, source="lightx2v, ComfyUI's defaults")
    yield Regime("20-steps", "20 steps", "unipc", 20, 8, 3.5, source="ComfyUI's template of Wan 2.2")
    yield Regime("bundled", "the bundled model's own", "unipc", 40, 3, 4, source="heterostep")


REGIMES: dict[str, Regime] = {regime.name: regime for regime in _regimes()}


def named(name: str) -> Regime:
    """A regime of the list by its name, or one of numbers, as in "euler-25-shift-7-guidance-5".

    After those may come `-terminal-0.1` (`shift_terminal`) and `-experts-0.9` (`boundary`), in this order.

    Raises:
        HeterostepError: neither of them, or a number is out of range.
    """
    if name in REGIMES:
        return REGIMES[name]
    found = _NUMBERS.fullmatch(name)
    if found is None:
        raise HeterostepError(
            f"no such regime: {name!r}; the regimes are {', '.join(REGIMES)}, and numbers of your own as in {EXAMPLE}"
        )
    given = {part: float(text) for part, text in found.groupdict().items() if text and part not in ("solver", "steps")}
    own = Regime(
        name, "", found["solver"], int(found["steps"]), given["shift"], given["guidance"],
        shift_terminal=given.get("terminal"), boundary=given.get("boundary"), source="the command line",
    )  # fmt: skip
    return replace(own, label=own.text)


def suited(task: str) -> list[Regime]:
    """The regimes whose checkpoints do the task, "text" or "image"."""
    return [regime for regime in REGIMES.values() if task in regime.tasks]


class FlowEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler on sigmas from 1 to 1 / steps before they are shifted, whoever calls.

    Without this, pipelines that give no sigmas of their own (Wan's) would get diffusers' (0.42.1): evenly spaced down
    to a sigma that was shifted already, and then shifted again. Four steps at shift 5 would end at sigma 0.02, where
    those who trained for four steps end at 0.63.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        if sigmas is None and timesteps is None and num_inference_steps is not None:
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)


def scheduler(regime: Regime, own: Any) -> UniPCMultistepScheduler | DPMSolverMultistepScheduler | FlowEulerScheduler:
    """The regime's scheduler, with the pipeline's own options wherever the regime says nothing."""
    spacings = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    wanted: dict[str, Any] = {**dict.fromkeys(spacings, False), "shift_terminal": regime.shift_terminal}
    kind: type[Any]
    if regime.solver == "euler":
        kind, wanted = FlowEulerScheduler, {**wanted, "shift": float(regime.shift), "stochastic_sampling": False}
    else:
        kind = DPMSolverMultistepScheduler if regime.solver == "dpm" else UniPCMultistepScheduler
        wanted |= {"flow_shift": float(regime.shift), "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    # What only another scheduler knows would be warned of or refused.
    known = inspect.signature(kind.__init__).parameters
    return kind(**{name: value for name, value in {**own.config, **wanted}.items() if name in known})


def refuses(pipe: Any, regime: Regime) -> str | None:
    """Why a pipeline cannot be put into a regime, in one line; None where it can."""
    try:
        check_pipeline(pipe)
    except HeterostepError as error:
        return f"{regime.name}: {first_line(error)}"
    name = type(pipe).__name__
    if "guidance_scale" not in inspect.signature(type(pipe).__call__).parameters:
        return f"{regime.name} sets the guidance, which {name} does not take in its call"
    if regime.boundary is None:
        return None
    if name not in _TWO_EXPERTS:
        return f"{regime.name} is of two experts, which {name} does not have; {' and '.join(_TWO_EXPERTS)} do"
    if pipe.transformer is None:
        return f"{regime.name} is of two experts, and this {name} was loaded with the second alone"
    if pipe.transformer_2 is None and hasattr(pipe.transformer, "_hf_hook"):
        return f"{regime.name} would need a copy of the transformer, which is offloaded: leave out the offloading"
    return None


@contextlib.contextmanager
def in_regime(pipe: Any, regime: Regime) -> Iterator[dict[str, Any]]:
    """Put a pipeline into a regime; afterwards it is as it was, also after an exception.

    Where the regime has two experts and the pipeline has one, this is both of them: a copy that shares its weights.
    A pipeline that has two keeps its own, and where one takes over from the other.

    Yields:
        the call's options: `guidance_scale`, `num_inference_steps`, and with two experts `guidance_scale_2`.

    Raises:
        HeterostepError: the pipeline cannot be put into this regime.
    """
    if reason := refuses(pipe, regime):
        raise HeterostepError(reason)
    options: dict[str, Any] = {"guidance_scale": regime.guidance, "num_inference_steps": regime.steps}
    with contextlib.ExitStack() as restoring:
        restoring.callback(setattr, pipe, "scheduler", pipe.scheduler)
        pipe.scheduler = scheduler(regime, pipe.scheduler)
        if regime.boundary is not None:
            options["guidance_scale_2"] = regime.guidance if regime.guidance_2 is None else regime.guidance_2
            if pipe.transformer_2 is None:
                restoring.callback(setattr, pipe, "transformer_2", None)
                pipe.transformer_2 = _second(pipe)
            # A real expert was trained for its own part of the sigmas.
            elif pipe.config.boundary_ratio is not None:
                yield options
                return
            restoring.callback(pipe.register_to_config, boundary_ratio=pipe.config.boundary_ratio)
            pipe.register_to_config(boundary_ratio=regime.boundary)
        yield options


_seconds: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[torch.nn.Module], torch.nn.Module]] = (
    weakref.WeakKeyDictionary()
)


def _second(pipe: Any) -> torch.nn.Module:
    """The pipeline's transformer once more, made once: modules of its own, on the same weights."""
    first = pipe.transformer
    known = _seconds.get(pipe)
    if known is None or known[0]() is not first:
        copied = copy.deepcopy(first, {id(parameter): parameter for parameter in first.parameters()})
        known = _seconds[pipe] = weakref.ref(first), copied
    # Buffers are its own: the pipeline may have moved since.
    return known[1].to(first.device)
