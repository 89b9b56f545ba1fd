"""Sparse calls as CUDA graphs: with few active tokens the host takes longer to launch kernels than the GPU to run them.

A call is run as it is the first time, recorded the second (or at once, where this process has recorded such a call
before), and replayed from then on: for as long as its inputs keep their shapes and everything else that it reads stays
in its place. Several processes at one video record and replay together, what they exchange in the call included.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from heterostep import compat
from heterostep.errors import first_line
from heterostep.parallel import ALONE, Ranks

# Rows of a call (samples times active tokens, on each GPU) up to which recording pays. Above, the GPU is busy for
# longer than the host, and a recorded call would keep its activations for nothing. Chosen by hand; what it gains:
# benchmarks/h200.
MOST_ROWS = 4096

_logger = logging.getLogger("heterostep")


class ReplayedCalls:
    """The sparse calls of one guidance branch: the last of them recorded, where that can be done.

    Args:
        model: whose forward is called.
        ours: its modules that carry hooks of heterostep's own, which may be recorded with it.
        device: where it runs.
        pool: the memory of recorded calls, shared with others that come one after another; asked when it is needed.
        ranks: the processes that make this call together.
        at_once: record the first call already: such calls were recorded in this process, so all is compiled.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        ours: Collection[torch.nn.Module],
        device: torch.device,
        pool: Callable[[], Any],
        ranks: Ranks = ALONE,
        at_once: bool = False,
    ) -> None:
        self._device, self._pool, self._ranks = device, pool, ranks
        self._refused = why_not(model, ours, device, ranks)
        # A hook, or an earlier run, may be one rank's alone, and one that does something else waits for ever.
        if not ranks.true_on_all(not self._refused):
            self._refused = self._refused or "another GPU cannot"
        self._at_once = ranks.true_on_all(at_once)
        # A user may turn a LoRA up or down between two steps.
        self._loras = compat.lora_layers(model)
        self._kind: Any = None  # of the last call
        self._static: list[Any] = []
        self._replay: Callable[[], Any] | None = None
        if self._refused:
            _log(f"CUDA graphs are not used: {self._refused}")

    @property
    def recorded(self) -> bool:
        """Whether the last call was replayed."""
        return self._replay is not None

    def __call__(self, call: Callable[[Any], Any], inputs: Any, reads: Iterable[torch.Tensor]) -> Any:
        """What `call(inputs)` returns: containers of tensors, which are the caller's own.

        Args:
            call: reads its inputs and what is named in `reads`, and nothing else that changes.
            inputs: containers of tensors and plain values.
            reads: tensors that must stay in their place.
        """
        leaves, spec = tree_flatten(inputs)
        if self._refused or any(_elsewhere(leaf, self._device) for leaf in leaves):
            return call(inputs)
        loras = compat.lora_state(self._loras)
        kind = [spec, [_kind(leaf) for leaf in leaves], [t.data_ptr() for t in reads], loras]
        if not self._ranks.true_on_all(kind == self._kind):
            self.reset()
            # Kernels are compiled and libraries make their plans in a call that is not recorded. It may put something
            # in another place: that is for the next one to see.
            self._kind = kind
            if not self._at_once:
                return call(inputs)
        if self._replay is None and not self._record(call, leaves, spec):
            return call(inputs)
        assert self._replay is not None
        for mine, given in zip(self._static, leaves):
            if isinstance(mine, torch.Tensor):
                mine.copy_(given)
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, self._replay())

    def _record(self, call: Callable[[Any], Any], leaves: list[Any], spec: Any) -> bool:
        static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        replay, failure = None, ""

        def whole_call() -> Any:
            outputs = call(tree_unflatten(static, spec))
            return outputs if self._ranks.size == 1 else tree_map(compat.waited_for, outputs)

        try:
            replay = capture(whole_call, self._pool)
        except RuntimeError as error:
            failure = first_line(error)
        if not self._ranks.true_on_all(replay is not None):
            if self._at_once:
                # Something had to be compiled after all: as if it were the first time.
                self._at_once = False
                return False
            self._refused = f"the call cannot be recorded ({failure or 'on another GPU'})"
            _log(f"CUDA graphs are not used: {self._refused}")
            return False
        self._static, self._replay = static, replay
        _log("calls of few tokens are replayed as CUDA graphs")
        return True

    def reset(self) -> None:
        """Forget the recorded call, and free its memory."""
        self._kind, self._static, self._replay = None, [], None


def pays(index: torch.Tensor, ranks: Ranks) -> bool:
    """Whether a call of the tokens of `index`, int64 [b, n], that these processes make together is worth recording."""
    return index.numel() <= MOST_ROWS * ranks.size


def capture(call: Callable[[], Any], pool: Callable[[], Any]) -> Callable[[], Any]:
    """Record what `call` launches; the result launches it again and returns what `call` did, overwritten each time.

    Raises:
        RuntimeError: the call needs the host, or memory that is not there.
    """
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
    # Other threads may allocate meanwhile.
    with torch.cuda.graph(graph, pool=pool(), stream=stream, capture_error_mode="thread_local"):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Where calls on this GPU are recorded: without one, torch takes a stream of the GPU that it recorded on first."""
    return torch.cuda.Stream(device)


def why_not(
    model: torch.nn.Module, ours: Collection[torch.nn.Module], device: torch.device, ranks: Ranks = ALONE
) -> str:
    """What forbids to record this model's forward; empty where nothing does."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if torch.is_autocast_enabled("cuda"):
        return "autocast keeps cast weights for as long as it likes"
    if ranks.uneven:
        return "tokens that are split unevenly are counted by the host"
    for module in model.modules():
        # Offloading moves weights; another's hook would run once and never again.
        others = [hook for hook in compat.diffusers_hooks(module) if not compat.exchanges_tokens(hook)]
        hooked = hasattr(module, "_hf_hook") or others
        if module is not model and hooked:
            return f"{type(module).__name__} has a hook of accelerate or diffusers"
        if (module._forward_hooks or module._forward_pre_hooks) and module not in ours:
            return f"{type(module).__name__} has a hook"
    return ""


def _elsewhere(leaf: Any, device: torch.device) -> bool:
    # What is read from the host once would be read no more.
    return isinstance(leaf, torch.Tensor) and leaf.device != device


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if leaf is None or isinstance(leaf, bool | int | float | str) else id(leaf)


@functools.cache
def _log(message: str) -> None:
    _logger.info(message)
