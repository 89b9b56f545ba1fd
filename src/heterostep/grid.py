"""The tokens that a transformer makes of a video's latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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

    def values_of(self, tokens: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
        """Which values of the latents belong to these tokens.

        Args:
            tokens: bool [B, N].
            shape: of the latents: [B, N, C], or [B, C, F, H, W]. `extra` tokens and given first frames may be missing,
                and half of the last row's or column's tokens.

        Returns:
            bool of a shape that broadcasts to that one; None where the latents have another layout.
        """
        video = tokens[:, : self.frames * self.height * self.width]
        if len(shape) == 3 and tuple(shape[:2]) in (tuple(tokens.shape), tuple(video.shape)):
            return tokens[:, : shape[1], None]
        if len(shape) != 5 or shape[0] != len(tokens):
            return None
        (frames, *sizes), values = shape[2:], video.unflatten(1, self.shape)
        if frames < self.frames:
            values = values[:, self.frames - frames :]
        elif frames % self.frames:
            return None
        else:
            values = values.repeat_interleave(frames // self.frames, 1)
        for axis, size, cells in zip((2, 3), sizes, self.shape[1:]):
            patch = -(-size // cells)
            if size % cells and (patch != 2 or cells != -(-size // patch)):
                return None
            values = values.repeat_interleave(patch, axis).narrow(axis, 0, size)
        return values[:, None]
