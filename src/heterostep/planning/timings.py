"""Seconds of one transformer call by active share, as `heterostep bench` timed them on a device, kept for plans.

They are lines of JSON in `timings.jsonl` in the folder HETEROSTEP_CACHE, or in the user's cache folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import torch


@dataclass(frozen=True)
class Timed:
    """One size's timings.

    Attributes:
        device: its name.
        model: the transformer's class and configuration.
        tokens: N.
        points: (active share, seconds of one call), ascending, the last one of share 1.
        how: all else that the seconds depend on: dtype (as `heterostep.precision.name_of` has it), batch (samples of
            the call, guidance included), store, attention_backend, compiled, sync, gpus (1 where it is not named).
    """

    device: str
    model: dict[str, Any]
    tokens: int
    points: tuple[tuple[float, float], ...]
    how: dict[str, Any] = field(default_factory=dict)

    def seconds(self, share: float) -> float:
        """Of a call with this active share, between the timed ones; an empty step has no call."""
        if share == 0:
            return 0.0
        below = (0.0, 0.0)
        for point in self.points:
            if share <= point[0]:
                part = (share - below[0]) / (point[0] - below[0])
                return below[1] + part * (point[1] - below[1])
            below = point
        return self.points[-1][1]


def device_name(device: torch.device) -> str:
    """As timings name it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def identity(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """What tells transformers apart: the class and its configuration, without a file's bookkeeping."""
    return json.loads(json.dumps({"class": kind} | {k: v for k, v in config.items() if not k.startswith("_")}))


def _path() -> Path:
    folder = os.environ.get("HETEROSTEP_CACHE")
    return (Path(folder) if folder else platformdirs.user_cache_path("heterostep")) / "timings.jsonl"


def _lines() -> list[dict[str, Any]]:
    try:
        text = _path().read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            line = json.loads(line)
            Timed(line["device"], line["model"], line["tokens"], tuple((a, b) for a, b in line["points"]), line["how"])
            found.append(line)
        except (ValueError, TypeError, KeyError):
            # A line that was being written when the machine went down.
            continue
    return found


def keep(timed: Timed) -> Path:
    """Add timings to the file.

    Raises:
        OSError: it cannot be written.
    """
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {
        "device": timed.device,
        "model": timed.model,
        "tokens": timed.tokens,
        "points": timed.points,
        "how": timed.how,
    }
    with path.open("ab+") as file:
        # On a line of its own, where half a line was left.
        if file.tell():
            file.seek(-1, os.SEEK_END)
        lead = "" if file.read(1) in (b"", b"\n") else "\n"
        file.write((lead + json.dumps(line) + "\n").encode())
    return path


def find(kind: str, config: dict[str, Any], tokens: int, **how: Any) -> Timed | None:
    """The newest timings of a transformer at a size: on the present GPU, or where there is none on any device.

    Args:
        kind, config: the transformer's class and configuration.
        tokens: N.
        how: what the seconds depend on besides, as in `Timed`; what is not named may be anything.
    """
    model, how = identity(kind, config), {"gpus": 1, **how}
    here = device_name(torch.device("cuda")) if torch.cuda.is_available() else None
    for line in reversed(_lines()):
        alike = line["model"] == model and line["tokens"] == tokens and here in (None, line["device"])
        known = {"gpus": 1, **line["how"]}
        if alike and all(name in known and known[name] == value for name, value in how.items()):
            return Timed(line["device"], model, tokens, tuple((a, b) for a, b in line["points"]), line["how"])
    return None
