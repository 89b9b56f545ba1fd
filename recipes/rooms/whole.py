"""The autoencoder over whole clips in one pass, for training and encoding on a GPU.

The same function as diffusers' passes over four frames at a time with what they keep of the frames before, in fewer
and larger operations, channels last.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock, patchify, unpatchify


def normed(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Root-mean-square norm over channels, then SiLU, of [B, C, F, H, W], in x's precision."""
    last = x.movedim(1, -1)
    scaled = torch.nn.functional.rms_norm(last, last.shape[-1:], gamma.flatten().to(x.dtype), 1e-12)
    return torch.nn.functional.silu(scaled.movedim(-1, 1))


def _last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d) if x.is_cuda else x


def _resampled(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    """Frames after the first are doubled or halved in time too, where the layer does that."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        later = layer.time_conv(x[:, :, 1:])
        later = torch.stack(later.chunk(2, 1), 3).flatten(2, 3)
        x = _last(torch.cat([x[:, :, :1], later], 2))
    frames = x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1))
    x = _last(x.unflatten(0, (-1, frames)).transpose(1, 2))
    if layer.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x


def _through(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, WanResidualBlock):
        y = layer.conv1(normed(x, layer.norm1.gamma))
        return layer.conv2(normed(y, layer.norm2.gamma)) + layer.conv_shortcut(x)
    return _resampled(layer, x) if isinstance(layer, WanResample) else layer(x)


def _half(half: torch.nn.Module, layers: list[torch.nn.Module], x: torch.Tensor) -> torch.Tensor:
    """The encoder or the decoder, whose layers are these between its first and last convolutions."""
    x = half.conv_in(_last(x))
    for layer in layers:
        x = _through(layer, x)
    return half.conv_out(normed(x, half.norm_out.gamma))


def _middle(half: torch.nn.Module) -> list[torch.nn.Module]:
    first, last = half.mid_block.resnets
    return [first, half.mid_block.attentions[0], last]


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance [B, z_dim, f, h, w] of the latents of videos [B, 3, F, H, W]."""
    layers = [*vae.encoder.down_blocks, *_middle(vae.encoder)]
    x = vae.quant_conv(_half(vae.encoder, layers, patchify(video, vae.config.patch_size)))
    mean, log_variance = x.chunk(2, 1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Videos [B, 3, F, H, W] of latents [B, z_dim, f, h, w], not held within -1..1."""
    layers = _middle(vae.decoder)
    for block in vae.decoder.up_blocks:
        layers += [*block.resnets, *(block.upsamplers or [])]
    return unpatchify(_half(vae.decoder, layers, vae.post_quant_conv(latents)), vae.config.patch_size)
