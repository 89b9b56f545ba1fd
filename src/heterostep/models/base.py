"""What the runner needs to know of a model family. A family is one file beside this one, with its `FAMILIES`.

Shapes: B batch of a call, N tokens, n active tokens, C values a token.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from heterostep.errors import HeterostepError
from heterostep.grid import TokenGrid
from heterostep.kernels import gather_rows
from heterostep.models.attention import CachedAttention


@dataclass
class Call:
    """The transformer call under way, as hooks see it.

    Attributes:
        index: the active tokens, int64 [B, n], ascending; None where all are.
        num_tokens: N.
        grid: the call's tokens; None before the first call.
    """

    index: torch.Tensor | None = None
    num_tokens: int = 0
    grid: TokenGrid | None = None

    def active_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The output projection's rows [B, n or more, C] without those that only filled up the ranks' parts."""
        return rows if self.index is None else rows[:, : self.index.shape[1]]


NOT_COPIED = "a transformer cannot be copied or pickled while heterostep is enabled: call disable first"


@dataclass(frozen=True)
class _OutputHook:
    """A forward hook that belongs to a run, and so to no copy of the model."""

    change: Callable[[Any], Any]

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        return self.change(output)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise HeterostepError(NOT_COPIED)


@dataclass
class ModelPatches:
    """What `Adapter.install` changed on a model.

    Attributes:
        attentions: attention modules and their processors that keep K and V; the runner gives each its store before a
            call.
        hooked: modules whose outputs are changed.
        undo: what takes the changes back, in order.
    """

    attentions: list[tuple[Any, CachedAttention]] = field(default_factory=list)
    hooked: list[torch.nn.Module] = field(default_factory=list)
    undo: list[Callable[[], Any]] = field(default_factory=list)

    @property
    def touched(self) -> set[torch.nn.Module]:
        """Modules that carry a hook or another processor."""
        return {*self.hooked, *(attn for attn, _ in self.attentions)}

    def replace_processor(self, attn: Any, processor: CachedAttention) -> None:
        """Set an attention module's processor; its own comes back on undo."""
        original = attn.processor
        attn.set_processor(processor)
        self.attentions.append((attn, processor))
        # A processor that the user has set since is theirs to keep.
        self.undo.append(lambda: attn.set_processor(original) if attn.processor is processor else None)

    def hook_output(self, module: torch.nn.Module, change: Callable[[Any], Any]) -> None:
        """Let `change(output)` replace what a module returns, or leave it where it gives None."""
        self.hooked.append(module)
        self.undo.append(module.register_forward_hook(_OutputHook(change)).remove)


def _per_token(timestep: torch.Tensor) -> bool:
    """Whether there is one timestep a token, [B, N]; [B, 1] is one for all."""
    return timestep.ndim == 2 and timestep.shape[1] > 1


@dataclass(frozen=True)
class Checkpoint:
    """What the command makes of a checkpoint: the pipelines that make a video from text alone and from a first frame.

    Attributes:
        text, image: class names of pipelines; None where the checkpoint cannot.
        fps: frames per second of its videos.
    """

    text: str | None
    image: str | None
    fps: float


@dataclass(frozen=True)
class Family:
    """A transformer's adapter, and where it is known to work.

    Attributes:
        adapter: what is special about the transformer.
        pipelines: class names of the pipelines that it works in.
        checkpoints: by the pipeline that a checkpoint was saved as; the command and forecasts know these.
    """

    adapter: Adapter
    pipelines: tuple[str, ...]
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)


class Adapter(abc.ABC):
    """One model family. Tokens are the rows of the output projection.

    Attributes:
        min_active: tokens that a step evaluates at the least; above 0 where a step does more than these tokens'
            velocities, such as an audio stream.
        parallel: whether it works over several GPUs (`heterostep.parallel`).
    """

    min_active: int = 0
    parallel: bool = False

    @abc.abstractmethod
    def token_grid(self, model: Any, inputs: dict[str, Any]) -> TokenGrid:
        """The tokens that the forward makes of these inputs."""

    @abc.abstractmethod
    def install(self, model: Any, call: Call, on_velocity: Callable[[torch.Tensor], Any]) -> ModelPatches:
        """Set hooks and attention processors that do what `call` says.

        `on_velocity(rows)` takes the output projection's rows [B, n, C] and returns those of all tokens [B, N, C], or
        None to leave them.
        """

    def select_tokens(self, model: Any, inputs: dict[str, Any], index: torch.Tensor) -> dict[str, Any]:
        """The forward's inputs with everything that has one entry per token reduced to the active ones."""
        timestep = inputs["timestep"]
        if _per_token(timestep):
            inputs = {**inputs, "timestep": gather_rows(timestep, index)}
        return inputs

    def unpatchify(self, model: Any, grid: TokenGrid, velocities: torch.Tensor) -> torch.Tensor:
        """All tokens' velocities [B, N, C] in the shape in which the model returns them."""
        return velocities

    def clean_tokens(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        """bool [B, N]: tokens that carry no noise (a given first frame), or None where all do."""
        timestep = inputs["timestep"]
        return timestep == 0 if _per_token(timestep) else None

    def is_image_conditioned(self, model: Any, inputs: dict[str, Any]) -> bool:
        """Whether the video continues given frames: its velocities then change less while it takes its shape."""
        clean = self.clean_tokens(model, inputs)
        return clean is not None and bool(clean.any())

    def cfg_batch_factor(self, pipe: Any) -> int:
        """How many guidance branches the pipeline's first call of a step has in its batch."""
        return 1

    def call_kind(self, inputs: dict[str, Any]) -> Hashable:
        """Tells guidance branches apart that have the same text; None where the text tells enough."""
        return None

    def expert_switch(self, pipe: Any) -> int | None:
        """The scheduler's step at which a second transformer takes over; None where there is one alone."""
        return None

    def cp_plan(self, model: Any) -> dict[str, Any] | None:
        """Where context parallelism splits and gathers tokens, as `enable_parallelism(cp_plan=)` takes it; None for
        diffusers' own plan."""
        return None

    def local_attentions(self, model: Any) -> Iterable[Any]:
        """Attention modules whose K and V every rank has whole: nothing need be exchanged for them."""
        return ()

    def prompt_shapes(self, pipe: Any, model: Any, arguments: Mapping[str, Any]) -> dict[str, tuple]:
        """What the pipeline takes in place of a prompt, for plans: they have no text encoder.

        Args:
            pipe: on the meta device, without encoders of text and images.
            model: its transformer.
            arguments: of the pipeline's call, its defaults included.

        Returns:
            for each argument, by name, its shape behind the batch and then its dtype. A negative prompt's are the same
            with `negative_` before their names, unless they are given too.

        Raises:
            HeterostepError: the family does not say.
        """
        raise HeterostepError(
            f"{type(model).__name__} cannot be planned: give {type(self).__name__} a prompt_shapes that says what a "
            "prompt becomes"
        )
