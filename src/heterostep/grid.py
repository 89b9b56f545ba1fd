"""The tokens that a transformer makes of a video's latents."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenGrid:
    """The video's tokens: a grid, row by row and frame by frame, then `extra` ones (given keyframes) behind it."""

    frames: int
    height: int
    width: int
    extra: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width + self.extra
