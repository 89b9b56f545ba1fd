"""The rooms' autoencoder over a whole clip at once is diffusers' own over four frames at a time."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

RECIPE = Path(__file__).parents[2] / "recipes" / "rooms"


@pytest.fixture(scope="module")
def whole():
    sys.path.insert(0, str(RECIPE))
    try:
        import whole

        yield whole
    finally:
        sys.path.remove(str(RECIPE))


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_whole_passes_are_the_same_function(whole, frames):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    video = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    with torch.no_grad():
        known = vae.encode(video).latent_dist
        mean, log_variance = whole.encode(vae, video)
        torch.testing.assert_close(mean, known.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(log_variance, known.logvar, rtol=0, atol=1e-5)
        decoded = whole.decode(vae, known.mean)
        assert decoded.shape == video.shape
        torch.testing.assert_close(decoded.clamp(-1, 1), vae.decode(known.mean).sample, rtol=0, atol=1e-5)
