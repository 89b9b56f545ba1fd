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
                and what rows and columns of tokens have beyond the last pixel.

        Returns:
            bool of that shape; None where the latents have another layout.
        """
        samples, video = tokens.shape[0], tokens[:, : self.frames * self.height * self.width]
        if len(shape) == 3 and tuple(shape[:2]) in (tuple(tokens.shape), tuple(video.shape)):
            return tokens[:, : shape[1], None].expand(*shape)
        if len(shape) != 5 or shape[0] != samples:
            return None
        values = video.unflatten(1, self.shape)
        for axis, size, cells in zip((1, 2, 3), shape[2:], self.shape):
            values = values.repeat_interleave(-(-size // cells), axis)
        values = values[:, values.shape[1] - shape[2] :, : shape[3], : shape[4]]
        return values[:, None].expand(*shape)
