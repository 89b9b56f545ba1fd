"""Policies by name: where evaluations go. Add one with `register_policy`, and use it with `HSAConfig(policy=name)`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from heterostep.errors import HeterostepError
from heterostep.policy.auto import Auto
from heterostep.policy.base import Change, Policy, Run, Tokens
from heterostep.policy.hsa import HSA
from heterostep.policy.round_robin import RoundRobin

if TYPE_CHECKING:
    from heterostep.config import HSAConfig

__all__ = ["POLICIES", "Change", "Policy", "Run", "Tokens", "find", "make", "register_policy"]

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Auto, HSA, RoundRobin)}


def register_policy(policy: type[Policy]) -> type[Policy]:
    """Let `HSAConfig(policy=policy.name)` choose this class; also as a decorator. A known name is replaced.

    Raises:
        HeterostepError: it is no `Policy`, has no name of its own, or lacks methods.
    """
    wanted = "register_policy wants a class derived from heterostep.policy.Policy"
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise HeterostepError(f"{wanted}, not {policy!r}")
    # An inherited one would replace the policy that it comes from.
    name = vars(policy).get("name")
    if not (isinstance(name, str) and name):
        raise HeterostepError(f"{wanted} with a name of its own, which {policy.__name__} lacks")
    if inspect.isabstract(policy):
        raise HeterostepError(f"{policy.__name__} lacks methods: {', '.join(sorted(policy.__abstractmethods__))}")
    POLICIES[policy.name] = policy
    return policy


def find(name: str, alone: bool = False) -> type[Policy]:
    """The policy of a name.

    Args:
        alone: whether the name is all that can be given: a round-robin is asked for by its number of steps.

    Raises:
        HeterostepError: there is none.
    """
    choices = [each for each in POLICIES if each != RoundRobin.name]
    if name not in (choices if alone else POLICIES):
        raise HeterostepError(f"policy must be one of {', '.join(choices)}, not {name!r}", "policy")
    return POLICIES[name]


def make(config: HSAConfig, run: Run) -> Policy:
    """The policy that a config asks for, for one run.

    Raises:
        HeterostepError: there is no policy of that name.
    """
    return find(config.policy)(config, run)
