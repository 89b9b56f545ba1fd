"""Faster video diffusion without training: transformer steps are skipped and predicted.

HSA (arXiv 2605.06892) is included.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heterostep.config import HSAConfig
    from heterostep.engine.report import Report, StepInfo
    from heterostep.errors import HeterostepError
    from heterostep.models import register_family
    from heterostep.pipeline import disable, enable, enabled, report
    from heterostep.planning.plan import Plan, plan
    from heterostep.policy import register_policy

__all__ = [
    "HSAConfig",
    "HeterostepError",
    "Plan",
    "Report",
    "StepInfo",
    "disable",
    "enable",
    "enabled",
    "plan",
    "register_family",
    "register_policy",
    "report",
]
__version__ = "0.1.0"

# Applications decide where log lines go.
logging.getLogger("heterostep").addHandler(logging.NullHandler())

_HOMES = {
    "HSAConfig": "heterostep.config",
    "HeterostepError": "heterostep.errors",
    "StepInfo": "heterostep.engine.report",
    "register_family": "heterostep.models",
    "register_policy": "heterostep.policy",
    "Plan": "heterostep.planning.plan",
    "Report": "heterostep.engine.report",
    "disable": "heterostep.pipeline",
    "enable": "heterostep.pipeline",
    "enabled": "heterostep.pipeline",
    "plan": "heterostep.planning.plan",
    "report": "heterostep.pipeline",
}


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import: not for `heterostep --help`.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "tiny":
        return importlib.import_module("heterostep.tiny")
    raise AttributeError(f"module 'heterostep' has no attribute {name!r}")
