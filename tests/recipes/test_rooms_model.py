"""The rooms model: its autoencoder in whole passes is diffusers' own in passes of four frames; its weights are kept."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

RECIPE = Path(__file__).parents[2] / "recipes" / "rooms"


@pytest.fixture(autouse=True)
def recipe(monkeypatch):
    """The recipe's modules can be imported."""
    monkeypatch.syspath_prepend(str(RECIPE))


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_whole_passes_are_the_same_function(frames):
    import sizes
    import whole

    torch.manual_seed(0)
    small = sizes.VAE | {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4}
    vae = AutoencoderKLWan(**small, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()
    video = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    with torch.no_grad():
        known = vae.encode(video).latent_dist
        mean, log_variance = whole.encode(vae, video)
        torch.testing.assert_close(mean, known.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(log_variance, known.logvar, rtol=0, atol=1e-5)
        decoded = whole.decode(vae, known.mean)
        assert decoded.shape == video.shape
        torch.testing.assert_close(decoded.clamp(-1, 1), vae.decode(known.mean).sample, rtol=0, atol=1e-5)


def test_the_kept_weights_are_the_model(monkeypatch, tmp_path):
    """Eight bits and back: nothing is lacking, and each weight is within half a level."""
    import sizes
    import weights

    monkeypatch.setattr("sys.argv", ["rooms", "--out", str(tmp_path)])
    weights.restore()
    state = torch.load(tmp_path / "transformer.pt", weights_only=True)
    model = sizes.build_transformer()
    model.load_state_dict(state["averaged"])
    vae = AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    assert vae.config.z_dim == sizes.VAE["z_dim"] and max(vae.config.latents_std) > 1
    sizes.load_text(tmp_path, "cpu")
    again = weights.rounded(state["averaged"])
    for name, weight in weights.restored(again).items():
        scale = again.get(name + weights.SCALE)
        most = 1e-3 if scale is None else float(scale.max()) / 2
        assert float((weight - state["averaged"][name]).abs().max()) <= most * 1.01, name


def test_without_weights_it_says_what_to_do(monkeypatch, tmp_path):
    import weights

    monkeypatch.setattr("sys.argv", ["rooms", "--from", str(tmp_path)])
    with pytest.raises(SystemExit, match="there are no weights in"):
        weights.restore()
