"""What a pipeline's runs make, and how near that is to what its dense run made; for the benchmarks beside it."""

from __future__ import annotations

from typing import Any

import torch


class Made:
    """Keeps the videos of a pipeline's calls in place of returning them.

    Args:
        pipe: the bundled model's pipeline; its VAE's `decode` is replaced.
        latents: keep latents, and decode nothing.
        given: latent frames that are given (a first frame), which count for nothing among latents.
    """

    def __init__(self, pipe: Any, latents: bool = False, given: int = 0) -> None:
        self._latents, self._given = latents, given
        self._last: torch.Tensor | None = None
        self._decode, pipe.vae.decode = pipe.vae.decode, self._keep

    def _keep(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
        if self._latents:
            self._last = latents.float()
            return (latents[:, :3],)
        # One by one, as each alone would be.
        videos = torch.cat([self._decode(each[None], return_dict=False)[0] for each in latents])
        self._last = videos.float().clamp(-1, 1)
        return (videos,)

    def last(self) -> torch.Tensor:
        """Videos of the last call, -1..1, or its latents, [B, C, T, H, W]."""
        assert self._last is not None
        return self._last

    def decibels(self, dense: torch.Tensor) -> list[float]:
        """Of each of the last videos its PSNR to the dense one; of latents their SNR."""
        power = dense.var(dim=(0, 2, 3, 4), keepdim=True) if self._latents else 4
        error = (self.last() - dense) ** 2 / power
        error = error[:, :, self._given if self._latents else 0 :].flatten(1).mean(1)
        return (-10 * error.clamp_min(1e-9).log10()).tolist()
