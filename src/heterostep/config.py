"""What the user asks for: one dial (`runtime` or `share`) and options that have good defaults."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from heterostep.errors import HeterostepError, shorten

SOLVERS = ("pipeline", "euler")
SCORES = ("velocity", "random", "oracle")
SYNCS = ("drift", "hold", "fresh")
KV_STORES = ("auto", "device", "fp8", "offload", "fp8-offload")
# Gigabytes that no device has.
MOST_VRAM = 1e6
# Options, and values of `policy`, that had other names; these go on working for one version.
RENAMED = {"between": "sparse_share", "rotation": "round_robin"}
_RENAMED_POLICIES = {"rotation": "round-robin"}

_Config = TypeVar("_Config", bound=type)


def _is_sequence(value: Any) -> bool:
    """Whether a value has several values in an order: a list, a tuple, an array or tensor of one dimension."""
    ordered = isinstance(value, Sequence) or hasattr(value, "ndim")
    return ordered and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) == 1


def number(name: str, value: Any) -> float:
    """A number of any kind (Python's, numpy's, a tensor of no dimension) as a float.

    Raises:
        HeterostepError: it is none.
    """
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise HeterostepError(f"{name} must be a number, not {shorten(value)}", name)
    try:
        return float(plain)
    except OverflowError:
        raise HeterostepError(f"{name} is too large", name) from None


def whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number of any kind as an int; `least` is the smallest that may be.

    Raises:
        HeterostepError: it is none, or too small.
    """
    plain = number(name, value)
    if not plain.is_integer() or (least is not None and plain < least):
        bound = "" if least is None else f" at least {least},"
        raise HeterostepError(f"{name} must be a whole number,{bound} not {plain:g}", name)
    return int(plain)


def _warn_of_old_name(message: str) -> None:
    """A `DeprecationWarning` at the caller's line: Python shows these only where a script's own code is to blame."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").startswith("heterostep"):
        level += 1
    warnings.warn(message, DeprecationWarning, stacklevel=level + 1)


def _with_old_names(config: _Config) -> _Config:
    """Let a class of options take, and give, those of `RENAMED` under their old names too."""
    init = config.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        for old, new in RENAMED.items():
            if old not in options:
                continue
            _warn_of_old_name(f"{old}= is called {new}= now")
            if new in options:
                raise HeterostepError(f"give {new} without {old}, its old name")
            value = options.pop(old)
            if value is not None:
                options[new] = value
        policy = options.get("policy")
        if isinstance(policy, str) and policy in _RENAMED_POLICIES:
            options["policy"] = _RENAMED_POLICIES[policy]
            _warn_of_old_name(f"policy={policy!r} is called {options['policy']!r} now")
        init(self, *args, **options)

    config.__init__ = __init__  # type: ignore[misc]
    for old, new in RENAMED.items():

        def get(self: Any, old: str = old, new: str = new) -> Any:
            _warn_of_old_name(f".{old} is called .{new} now")
            return getattr(self, new)

        setattr(config, old, property(get))
    return config


@_with_old_names
@dataclass(frozen=True)
class HSAConfig:
    """How much of the dense run to spend, and where. Give exactly one of `runtime` and `share`.

    Words: a dense step evaluates all tokens, a sparse step some, a skipped step none; a token that is not evaluated has
    a held velocity. K and V are the keys and values of attention.

    Args:
        runtime: the target in time: seconds of the denoising loop over those of the dense loop, above 0 and at most 1.
            The run times its own steps and plans the rest accordingly. Default: none. Change it to choose between speed
            and nearness to the dense video on your machine.
        share: the target in work: token evaluations over those of the dense run, above 0 and at most 1. The same seed
            gives the same video. A sequence gives the share of the tokens that each step evaluates, 0..1. Default:
            none. Change it, in place of `runtime`, where a run has to be repeatable or is compared.
        policy: which steps are evaluated, and for which tokens. "auto": all tokens, at steps between which the velocity
            changes by equal amounts. "hsa": the paper's step divisors, with velocities held as they are. Or the name of
            one that `register_policy` has added. Default: "auto". Change it for the paper's method, or your own.
        sparse_share: the part of the evaluations, 0..1, that goes to single tokens at steps between the dense ones, to
            those whose velocities change fastest; for "auto". Above 0 the K and V of all tokens are kept. At 0 what
            whole steps leave of the budget is not spent (but on LTX-2, whose sound runs at every step). Default: as at
            0, but in short runs single tokens get what whole steps leave of `share`: a twentieth of them or more, as
            0.75 of 13 steps is 9.75, and where their K and V fit on the device. Try 0.2 for videos that change in a
            small part of the picture alone.
        divisors: the step divisors that tokens may get, ascending, each a multiple of the one before; a token of
            divisor d is evaluated at every d-th step. For "hsa", which they choose. Default: (1, 2, 4, 8) there. Change
            them to repeat the paper's experiments.
        round_robin: evaluate as many tokens at each step, each at least once in this many steps; its own policy,
            "round-robin". Default: none. Change it for experiments alone.
        dense_start: how many steps at the beginning are dense at the least. Default: the policy decides. Try a
            larger one where the composition differs from the dense video's.
        dense_end: how many steps at the end are dense. Default: 0. Try 1 or 2 where fine details differ; the budget
            stays, so other steps pay for it.
        regroup_every: rank the tokens anew at every n-th of the dense steps that sparse ones follow; for policies with
            sparse steps. Default: 1, at each. Raise it for experiments alone.
        extrapolate: how far a held velocity follows its last change, over log(1 - sigma), 0..1. 0 holds it as it is, as
            the paper does; 1 extends the line through its last two evaluations. Default: the policy decides, "auto" by
            how large that change was, "hsa" takes 0. Change it for experiments alone.
        solver: how a step is made from velocities. "pipeline" leaves it to the pipeline's own scheduler; "euler" makes
            first-order steps on the same noise levels, as the paper does. Default: "pipeline". Change it to repeat the
            paper's method.
        score: what tokens are ranked by. "velocity": how fast their velocities change. "random" is a control. "oracle"
            evaluates all tokens, saves nothing, and ranks them by how wrong their held velocities are. Default:
            "velocity". Change it for experiments alone.
        sync: what is done to the K and V of tokens that are not evaluated. "hold" keeps them as they were, as the paper
            does. "drift" moves them along each token's last change, for one more byte for each value. "fresh" computes
            them at every step and saves nothing: a bound. Default: "hold". Try "drift" where you use `sparse_share`.
        kv_store: where K and V are kept. "device": in the model's precision; "fp8": in half of the bytes; "offload" and
            "fp8-offload": in pinned host memory, fetched a layer ahead. "auto" takes the first of device, fp8,
            fp8-offload that fits beside the run, or two of them by layer. A sequence names one for each layer and
            guidance branch. Default: "auto". Change it to rule fp8 out, which is not exact.
        vram: gigabytes (1e9 bytes) of the device's memory that the process may use; for "auto". Default: what is free
            when the run begins. Set it where other programs will need memory too.
        cuda_graphs: whether calls with few active tokens may be recorded and replayed, where K and V are all in the
            "device" store. The same kernels run on the same numbers, without the host's time to launch each. Default:
            True. Switch it off to debug, or to free the memory that recorded calls keep.

    Raises:
        HeterostepError: a value is out of its range.
    """

    runtime: float | None = None
    share: float | Sequence[float] | None = None
    policy: str = "auto"
    sparse_share: float | None = None
    divisors: tuple[int, ...] | None = None
    round_robin: int | None = None
    dense_start: int | None = None
    dense_end: int = 0
    regroup_every: int = 1
    extrapolate: float | None = None
    solver: str = "pipeline"
    score: str = "velocity"
    sync: str = "hold"
    kv_store: str | tuple[str, ...] = "auto"
    vram: float | None = None
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        if (self.runtime is None) == (self.share is None):
            raise HeterostepError("give exactly one of runtime and share, for example runtime=0.5")
        several: Any = self.share if self.share is not None and _is_sequence(self.share) else None
        if several is not None:
            shares = tuple(number("share", share) for share in several)
            if not shares or not all(0 <= share <= 1 for share in shares):
                raise HeterostepError("share as a sequence needs one active share in 0..1 for each step")
            object.__setattr__(self, "share", shares)
        else:
            name = "runtime" if self.share is None else "share"
            target = number(name, getattr(self, name))
            if not 0 < target <= 1:
                raise HeterostepError(f"{name} must be above 0 and at most 1, not {target:g}", name)
            object.__setattr__(self, name, target)
        for name in ("sparse_share", "extrapolate"):
            if getattr(self, name) is not None:
                value = number(name, getattr(self, name))
                if not 0 <= value <= 1:
                    raise HeterostepError(f"{name} must be in 0..1, not {value:g}", name)
                object.__setattr__(self, name, value)
        if self.divisors is not None:
            if not _is_sequence(self.divisors):
                raise HeterostepError(
                    f"divisors must be whole numbers, as in (1, 2, 4, 8), not {shorten(self.divisors)}"
                )
            divisors = tuple(whole("divisors", divisor, 1) for divisor in self.divisors)
            object.__setattr__(self, "divisors", divisors)
            if not divisors or any(b <= a or b % a for a, b in zip(divisors, divisors[1:])):
                raise HeterostepError(
                    f"divisors must ascend, each a multiple of the one before, as in (1, 2, 4, 8), not {divisors}"
                )
        for name, least in (("round_robin", 1), ("dense_start", 1), ("dense_end", 0), ("regroup_every", 1)):
            if getattr(self, name) is not None or type(self).__dataclass_fields__[name].default is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), least))
        if self.round_robin is not None and self.divisors is not None:
            raise HeterostepError("round_robin chooses each step's tokens: leave out divisors")
        if _is_sequence(self.kv_store):
            object.__setattr__(self, "kv_store", tuple(self.kv_store))
            if not self.kv_store or not all(name in KV_STORES[1:] for name in self.kv_store):
                raise HeterostepError(f"kv_store as a sequence names one of {', '.join(KV_STORES[1:])} for each layer")
        choices = {"solver": SOLVERS, "score": SCORES, "sync": SYNCS}
        if not isinstance(self.kv_store, tuple):
            choices["kv_store"] = KV_STORES
        for name, known in choices.items():
            given = getattr(self, name)
            if not isinstance(given, str) or given not in known:
                raise HeterostepError(f"{name} must be one of {', '.join(known)}, not {shorten(given)}", name)
        if not isinstance(self.cuda_graphs, bool):
            raise HeterostepError(f"cuda_graphs must be True or False, not {shorten(self.cuda_graphs)}", "cuda_graphs")
        if not isinstance(self.policy, str):
            raise HeterostepError(f"policy must be a name, such as auto or hsa, not {shorten(self.policy)}", "policy")
        if self.vram is not None:
            vram = number("vram", self.vram)
            if not 0 < vram < MOST_VRAM:
                raise HeterostepError(
                    f"vram must be gigabytes above 0 and below {MOST_VRAM:,.0f}, not {vram:g}", "vram"
                )
            object.__setattr__(self, "vram", vram)
        self._choose_policy()

    def _choose_policy(self) -> None:
        """Options that belong to one policy choose it, and do not go with another."""
        for name, policy in (("divisors", "hsa"), ("round_robin", "round-robin")):
            if getattr(self, name) is not None and self.policy != policy:
                if self.policy != "auto":
                    raise HeterostepError(f"{name} belongs to policy={policy!r}, not to {self.policy!r}")
                object.__setattr__(self, "policy", policy)
        if self.policy == "round-robin" and self.round_robin is None:
            raise HeterostepError("policy='round-robin' needs round_robin=, a number of steps", "policy")
        if self.sparse_share and self.policy in ("hsa", "round-robin"):
            raise HeterostepError(f"sparse_share belongs to policy='auto', not to {self.policy!r}", "sparse_share")
        if self.policy == "hsa" and self.extrapolate is None:
            object.__setattr__(self, "extrapolate", 0.0)

    @classmethod
    def of(cls, config: HSAConfig | None, options: dict[str, Any], beside: tuple[str, ...] = ()) -> HSAConfig:
        """The config that a caller gave as one, or as keywords; `beside` are other keywords that the caller takes.

        Raises:
            HeterostepError: both were given, or a keyword that is no field; or a value is out of its range.
        """
        if config is not None and options:
            raise HeterostepError("give config= or its fields as keywords, not both")
        if config is not None and not isinstance(config, cls):
            kind = type(config).__name__
            raise HeterostepError(f"config must be an HSAConfig, not {kind}: give its fields as keywords")
        if unknown := sorted(set(options) - set(cls.__dataclass_fields__) - set(RENAMED)):
            known = ", ".join((*cls.__dataclass_fields__, *beside))
            raise HeterostepError(f"no such option: {', '.join(unknown)}; the options are {known}")
        return config or cls(**options)

    @property
    def target(self) -> float:
        """The asked runtime or (mean) share, 0..1."""
        if self.runtime is not None:
            return float(self.runtime)
        if isinstance(self.share, tuple):
            return sum(self.share) / len(self.share)
        return float(self.share)  # type: ignore[arg-type]
