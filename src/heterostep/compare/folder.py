"""A comparison's folder: what it is of (`settings.json`) and what has been made so far (`work/generations.jsonl`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heterostep.errors import HeterostepError
from heterostep.files import replacing, writing

# Settings that go by another name on the command line.
_OPTIONS = {"num_inference_steps": "steps", "num_frames": "frames", "guidance_scale": "guidance", "shown": "videos"}

Line = dict[str, Any]


def check_own(folder: Path, *names: str) -> None:
    """Check that nothing is there under the names of what is to be written into a folder without a comparison.

    Raises:
        HeterostepError: something is, which is the user's.
    """
    for path in (folder / name for name in names):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise HeterostepError(f"{path} is of something else, and would be replaced: give a new or an empty folder")


class Folder:
    """The folder of one comparison, new or taken up again.

    A line of the log is what is known of one generation; its `key` is [repeat, prompt, method, value]. Lines with an
    `error` or a `left_out` are about the method or the value alone.

    Args:
        path: the folder; made where it is not there.
        content: what the comparison is of: `settings`, `prompts`, `images`, as JSON has them.

    Attributes:
        prompts: how many the folder's comparison has.
        outgrown: whether it has fewer of them, and is this one else; `grow` makes it this one.

    Raises:
        HeterostepError: it holds another comparison or a damaged one, or cannot be written to.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self._content, self.prompts = content, len(content["prompts"])
        self.outgrown = False
        self._settings, self._log = path / "settings.json", path / "work" / "generations.jsonl"
        if self._settings.is_file() or self._log.is_file():
            known = self._read_settings()
            self.prompts = len(known["prompts"])
            self.outgrown = _is_beginning(known, content)
            if not self.outgrown and (theirs := _differences(known, content)):
                raise HeterostepError(
                    f"{path} holds another comparison ({'; '.join(theirs)}): give another folder, or remove it"
                )
            self._make_folders()
        else:
            check_own(path, "results.json", "index.html", "videos", "work")
            self._make_folders()
            self._write_settings()

    def _make_folders(self) -> None:
        (self.path / "videos").mkdir(parents=True, exist_ok=True)
        (self.path / "work").mkdir(exist_ok=True)

    def grow(self) -> None:
        """Take the prompts that were added."""
        self._write_settings()
        self.prompts, self.outgrown = len(self._content["prompts"]), False

    def _write_settings(self) -> None:
        with writing(self._settings), replacing(self._settings) as part:
            part.write_text(json.dumps(self._content, indent=1) + "\n")

    def lines(self, dense: str, batch: Callable[[int], Sequence[int]]) -> list[Line]:
        """What has been made. What was being written when the run was stopped is dropped, with the rest of its batch,
        and all of a prompt whose dense video cannot be read.

        Args:
            dense: the method that all others are compared with.
            batch: a prompt -> the prompts that are generated together with it.
        """
        if not self._log.is_file():
            return []
        found = [line for text in self._log.read_text(errors="replace").splitlines() if (line := _read(text))]
        compared = {line["key"][1] for line in found if line["key"][0] == 0 and line["key"][2] == dense}
        lost = {line["key"][1] for line in found} - {prompt for prompt in compared if self._has_dense(prompt)}
        found = [line for line in found if line["key"][1] not in lost]
        logged = {json.dumps(line["key"]) for line in found}

        def whole(line: Line) -> bool:
            repeat, prompt, *what = line["key"]
            return all(json.dumps([repeat, other, *what]) in logged for other in batch(prompt))

        kept = [line for line in found if "error" in line or "left_out" in line or whole(line)]
        with writing(self._log), replacing(self._log) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def append(self, lines: Sequence[Line]) -> None:
        """Add to the log."""
        with writing(self._log), self._log.open("a") as log:
            log.write("".join(json.dumps(line) + "\n" for line in lines))

    def dense(self, prompt: int) -> Path:
        """Where the dense video of a prompt is kept, uint8 [F, H, W, 3]."""
        return self.path / "work" / f"dense-{prompt}.npy"

    def _has_dense(self, prompt: int) -> bool:
        path = self.dense(prompt)
        try:
            np.load(path, mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError):
            return False
        except OSError as error:
            # It may be there, so nothing is dropped.
            raise HeterostepError(f"{path} cannot be read: {error.strerror}") from error
        return True

    def write_results(self, results: dict[str, Any]) -> None:
        """Write `results.json`."""
        path = self.path / "results.json"
        with writing(path), replacing(path) as part:
            part.write_text(json.dumps(results, indent=1) + "\n")

    def _read_settings(self) -> dict[str, Any]:
        try:
            content = json.loads(self._settings.read_text(encoding="utf-8"))
            if isinstance(content["settings"]["options"], dict) and isinstance(content["prompts"], list):
                return content
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        raise HeterostepError(
            f"{self._settings} is missing or damaged, or not a comparison's: restore it, or give another folder"
        )


def _read(text: str) -> Line | None:
    """A line of the log; None where it is damaged."""
    try:
        line = json.loads(text)
        repeat, prompt, method, value = line["key"]
    except (ValueError, TypeError, KeyError):
        return None
    kinds = ((repeat, int), (prompt, int), (method, str), (value, int | float))
    if not all(isinstance(each, kind) for each, kind in kinds):
        return None
    # Repetitions are only timed.
    made = "rows" in line and (repeat > 0 or "psnr" in line)
    return line if made or "error" in line or "left_out" in line else None


def _is_beginning(theirs: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether another comparison is of this one's first prompts, with the same settings for them."""
    count, known, settings = len(theirs["prompts"]), theirs["settings"], dict(mine["settings"])
    if not 0 < count < len(mine["prompts"]):
        return False
    # More noises are more prompts.
    settings["seeds"] = known.get("seeds")
    if min(known.get("shown", 0), count) == min(settings["shown"], count):
        settings["shown"] = known.get("shown")
    cut = {"settings": settings, "prompts": mine["prompts"][:count], "images": mine["images"][:count]}
    return not _differences(theirs, cut)


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """What a folder's comparison has that another one has not, for people: such as "steps 40, not 20"."""
    (old, new) = ({**each["settings"], **each["settings"]["options"]} for each in (theirs, mine))
    names = [name for name in {**new, **old} if name not in ("options", "judged") and old.get(name) != new.get(name)]
    out = [f"{_OPTIONS.get(name, name)} {_plain(old.get(name))}, not {_plain(new.get(name))}" for name in names]
    if len(theirs["prompts"]) != len(mine["prompts"]):
        count = len(theirs["prompts"])
        out.append(f"{count} prompt{'s' if count != 1 else ''}, not {len(mine['prompts'])}")
    elif theirs["prompts"] != mine["prompts"]:
        out.append("other prompts or seeds")
    elif theirs.get("images") != mine["images"]:
        out.append("other first frames")
    return out


def _plain(value: Any) -> str:
    return ",".join(map(_plain, value)) if isinstance(value, list) else str(value)
