"""A transformer of the pipeline, and what was changed on it."""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from heterostep import compat
from heterostep.engine.wrapping import WrappedForward
from heterostep.errors import HeterostepError
from heterostep.models.base import ModelPatches
from heterostep.parallel import Ranks, ranks_of

_log = logging.getLogger("heterostep")
# What runs this process has made to their end with a model, and which of their calls it has recorded.
_made: weakref.WeakKeyDictionary[torch.nn.Module, set[Hashable]] = weakref.WeakKeyDictionary()


class Expert:
    """One transformer of the pipeline, and what was changed on it.

    Args:
        model: the transformer.
        answer: called in place of its forward.
        install: sets hooks and processors on it.
    """

    def __init__(
        self, model: torch.nn.Module, answer: Callable[..., Any], install: Callable[[Any], ModelPatches]
    ) -> None:
        self.model, self._install = model, install
        self.patches = install(model)
        self.wrapped = WrappedForward(model, answer)
        self.signature = inspect.signature(type(model).forward)
        self._note_places()

    @property
    def ranks(self) -> Ranks:
        """The processes that share its tokens."""
        return ranks_of(getattr(self.model, "_parallel_config", None))

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A forward's arguments by name, whole where each rank was given a part."""
        inputs = dict(self.signature.bind(self.model, *args, **kwargs).arguments)
        inputs.pop("self")
        return self._of_ranks(inputs, self.ranks.all_gather)

    def call(self, inputs: dict[str, Any]) -> Any:
        """The model's own forward."""
        return self.wrapped.inner(**self._of_ranks(inputs, self.ranks.shard))

    def _of_ranks(self, inputs: dict[str, Any], change: Callable[[torch.Tensor, int], torch.Tensor]) -> dict[str, Any]:
        """Those inputs changed that ranks have parts of: diffusers' hooks, which split them, are around our forward."""
        split = {
            name: change(inputs[name], how.split_dim)
            for name, how in compat.split_inputs(self.model).items()
            if inputs.get(name) is not None and how.expected_dims in (None, inputs[name].ndim)
        }
        return {**inputs, **split}

    def _note_places(self) -> None:
        modules = dict(self.model.named_modules())
        self._names = {name: module for name, module in modules.items() if module in self.patches.touched}
        # Where each of them hangs: the module that it is in, and its name there.
        places = {name: name.rpartition(".") for name in self._names}
        self._places = [
            (modules[parent], leaf, self._names[name]) for name, (parent, _, leaf) in places.items() if leaf
        ]
        self.loras = compat.lora_layers(self.model)
        self._loaded = compat.loaded_loras(self.model)

    @property
    def was_changed(self) -> bool:
        """Whether adapters were loaded or taken off, or hooked modules replaced, since `follow`.

        Asked at every step, so it does not go through all modules, as `follow` does: LTX-2 has 3,674 of them.
        """
        if compat.loaded_loras(self.model) != self._loaded:
            return True
        return any(getattr(parent, leaf, None) is not module for parent, leaf, module in self._places)

    @property
    def lost_processors(self) -> bool:
        """Whether others have set attention processors, so that active tokens would attend to each other alone."""
        return any(attn.processor is not processor for attn, processor in self.patches.attentions)

    def follow(self) -> None:
        """Set hooks and processors anew where modules were replaced since: by a LoRA, by quantisation.

        Raises:
            HeterostepError: there are `lost_processors`.
        """
        modules = dict(self.model.named_modules())
        if any(modules.get(name) is not module for name, module in self._names.items()):
            self.undo()
            self.patches = self._install(self.model)
        elif self.lost_processors:
            raise HeterostepError("the attention processors were replaced: call heterostep.enable again")
        self._note_places()

    def kind_of_run(self, inputs: dict[str, Any], how: Hashable) -> Hashable:
        """What runs have in common that compile the same: the calls' shape and place, the model's state, and `how`."""
        x = inputs["hidden_states"]
        state = compat.blocks_compiled(self.model), repr(compat.lora_state(self.loras))
        return tuple(x.shape), x.dtype, str(x.device), self.ranks.size, state, how

    def has_made(self, kind: Hashable) -> bool:
        """Whether this process has made a run of this kind to its end, or recorded such a call, under any runner."""
        return kind in _made.get(self.model, ())

    def note_made(self, kind: Hashable) -> None:
        """A run of this kind has come to its end, or such a call was recorded."""
        _made.setdefault(self.model, set()).add(kind)

    @property
    def foreign(self) -> str | None:
        """The name of an attention processor that is not diffusers' own; None where there is none."""
        names = (
            type(p.original).__name__ for _, p in self.patches.attentions if not compat.is_own_processor(p.original)
        )
        return next(names, None)

    def undo(self) -> None:
        """Take hooks and processors back."""
        for undo in reversed(self.patches.undo):
            undo()


def compile_kernels(attentions: Iterable[tuple[Any, Any]], hidden_states: torch.Tensor) -> None:
    """Compile what sparse calls of these (attention, processor) will use."""
    for attn, processor in attentions:
        processor.prepare(attn, hidden_states)


def in_background(work: Callable[[], Any]) -> threading.Thread:
    """Run `work` beside the caller; where it fails, whoever needs it tries again and gets the error."""

    def run() -> None:
        try:
            # Each thread records gradients unless told otherwise.
            with torch.no_grad():
                work()
        except Exception:
            _log.debug("what was begun in the background failed", exc_info=True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
