"""The finished videos of a service, in a folder, within a bound of number and age."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ID = re.compile(r"video_[0-9a-f]{32}")


class Store:
    """A folder with a folder for each video: `video.mp4` and `video.json`, both whole or neither there.

    Args:
        path: made where it is not there; the videos of an earlier service in it are found.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        for each in path.glob(".video_*.part"):
            # Of a service that was ended while it wrote.
            shutil.rmtree(each, ignore_errors=True)

    def add(self, video_id: str, video: bytes, content: dict[str, Any]) -> None:
        """Write a video.

        Raises:
            OSError: it cannot be written; then nothing of it is there.
        """
        part = self.path / f".{video_id}.part"
        try:
            part.mkdir()
            (part / "video.mp4").write_bytes(video)
            (part / "video.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
            part.rename(self.path / video_id)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def video(self, video_id: str) -> Path:
        """Where a video's MP4 file is."""
        return self.path / video_id / "video.mp4"

    def content(self, video_id: str) -> dict[str, Any]:
        """What was written with a video."""
        return json.loads((self.path / video_id / "video.json").read_text(encoding="utf-8"))

    def remove(self, video_id: str) -> None:
        """Forget a video."""
        shutil.rmtree(self.path / video_id, ignore_errors=True)

    def all(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every video that is there, with the object that was written with it, in no order."""
        for each in self.path.iterdir():
            if ID.fullmatch(each.name) and (each / "video.mp4").is_file():
                content = None
                with contextlib.suppress(OSError, ValueError, RecursionError):
                    content = self.content(each.name)
                if isinstance(content, dict):
                    yield each.name, content
