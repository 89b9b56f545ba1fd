"""What of a batch has been made: `manifest.jsonl` in its folder, a line for each video and each failure."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterostep.batch.lines import Line
from heterostep.errors import HeterostepError
from heterostep.files import locked, replacing

if TYPE_CHECKING:
    from heterostep.workers.maker import Made

NAME = "manifest.jsonl"


class Manifest:
    """The manifest of a folder, new or taken up again; one process at a time writes to it.

    Args:
        folder: made where it is not there.

    Raises:
        HeterostepError: another process has it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / NAME
        self._noted: set[str] = set()
        try:
            self._lock = locked(folder)
        except BlockingIOError as error:
            raise HeterostepError(f"another batch writes to {folder}: let it end, or give another", "out") from error
        self._read()

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()

    def has(self, line: Line) -> bool:
        """Whether a line's video has been made and is still there.

        Raises:
            HeterostepError: its name is that of another request's video.
        """
        if not all(path.is_file() for path in self.files(line)):
            return False
        _, report = self.files(line)
        if _key_of(report) != line.key:
            raise HeterostepError(f"{line.stem}.mp4 is the video of another request: give another name, or remove it")
        if line.key not in self._noted:
            # Whoever wrote it was ended before it could say so.
            self._note(line)
        return True

    def files(self, line: Line) -> tuple[Path, Path]:
        """A line's video, and its report."""
        return self.folder / f"{line.stem}.mp4", self.folder / f"{line.stem}.json"

    def add(self, line: Line, made: Made, seconds: float, worker: str) -> None:
        """Write a video with its report and settings, and note it. Either of the files is whole or not there.

        Raises:
            OSError: they cannot be written; then neither is there.
        """
        video, report = self.files(line)
        content = {"key": line.key, "line": line.number, "settings": made.settings, "report": made.report}
        # A video that has lost its report is nobody's.
        video.unlink(missing_ok=True)
        try:
            with replacing(report) as part:
                part.write_text(json.dumps(content) + "\n", encoding="utf-8")
            with replacing(video) as part:
                part.write_bytes(made.video)
        except BaseException:
            report.unlink(missing_ok=True)
            raise
        self._note(line, {"seconds": round(seconds, 3), "worker": worker})

    def fail(self, number: int, key: str | None, message: str) -> None:
        """Note a failure; the next run tries the line again."""
        self._append({"line": number, "state": "failed", "key": key, "message": message})

    def _note(self, line: Line, more: dict[str, Any] | None = None) -> None:
        names = {"video": f"{line.stem}.mp4", "report": f"{line.stem}.json"}
        self._append({"line": line.number, "state": "done", "key": line.key, **names, **(more or {})})
        self._noted.add(line.key)

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        """What is there. A line that was being written when the machine stopped is dropped."""
        if not self.path.is_file():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        entries = []
        for raw in text.splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(raw)
                if isinstance(entry, dict) and "state" in entry:
                    entries.append(entry)
        self._noted = {str(entry.get("key")) for entry in entries if entry["state"] == "done"}
        whole = "".join(json.dumps(entry) + "\n" for entry in entries)
        if whole != text:
            with replacing(self.path) as part:
                part.write_text(whole, encoding="utf-8")


def _key_of(report: Path) -> str | None:
    try:
        return json.loads(report.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Manifest]:
    """The manifest of a folder, for a with block."""
    manifest = Manifest(folder)
    try:
        yield manifest
    finally:
        manifest.close()
