"""The recipe's stages, each for a few steps on the CPU, one after the other, as they make the bundled model."""

import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    import common

    return common


def toy(recipe, steps, checkpoint, until=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def loss_at(step):
        if step == until:
            raise KeyboardInterrupt
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :2]).square().mean()
        return loss, {"loss": loss.detach()}

    return recipe.train(
        {"model": model}, loss_at, budget=recipe.Budget(steps), muon_rate=0.02, adam_rate=1e-2, edges=("2.",),
        checkpoint=checkpoint, averaging=0.9, save_every=5,
    )["model"]  # fmt: skip


def test_a_stopped_run_resumes_to_the_same_weights(recipe, tmp_path):
    unbroken = toy(recipe, 20, tmp_path / "a.pt")
    with pytest.raises(KeyboardInterrupt):
        toy(recipe, 20, tmp_path / "b.pt", until=12)
    resumed = toy(recipe, 20, tmp_path / "b.pt")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_training_learns(recipe, tmp_path):
    weights = toy(recipe, 300, tmp_path / "a.pt")
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    model.load_state_dict(weights)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1234))
    assert (model(x) - x[:, :2]).square().mean() < 0.1


def test_phases(recipe):
    phases = recipe.parse_phases("1:12:3,9:4:2")
    assert [recipe.phase_at(phases, step) for step in range(5)] == [(1, 12)] * 3 + [(9, 4)] * 2
    with pytest.raises(IndexError):
        recipe.phase_at(phases, 5)


def test_short_text_with_weighted_padding_is_the_pipelines_long_text(recipe):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    from train_transformer import PaddedText

    torch.manual_seed(0)
    model = recipe.build_transformer().eval()
    text = torch.zeros(1, 512, 128)
    text[:, :20] = torch.randn(1, 20, 128)
    call = {"hidden_states": torch.randn(1, 24, 1, 4, 4), "timestep": torch.tensor([500.0]), "return_dict": False}
    with torch.no_grad():
        long = model(**call, encoder_hidden_states=text)[0]
        for block in model.blocks:
            block.attn2.set_processor(PaddedText())
        short = model(**call, encoder_hidden_states=text[:, : recipe.TEXT_LENGTH])[0]
        torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)
        for block in model.blocks:
            block.attn2.set_processor(WanAttnProcessor())
        assert not torch.allclose(
            model(**call, encoder_hidden_states=text[:, : recipe.TEXT_LENGTH])[0], long, atol=1e-3
        )


# Autocast on the CPU leaves the norms' weights in single precision, and torch says that this is not fused.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.slow
def test_every_stage_runs_and_the_pipeline_loads(recipe, tmp_path, monkeypatch):
    import encode_clips
    import export
    import train_text
    import train_transformer
    import train_vae
    from heterostep import tiny

    def call(stage, *options):
        monkeypatch.setattr(sys, "argv", [stage.__name__, "--out", str(tmp_path), *options])
        stage.main()

    call(train_vae, "--phases", "1:2:1,5:2:1", "--crop", "32", "--device", "cpu")
    call(train_text, "--steps", "2", "--batch", "2", "--device", "cpu")
    call(encode_clips, "--clips", "9", "2", "--device", "cpu")
    call(train_transformer, "--phases", "3:1:1", "--device", "cpu")
    call(export, "--to", str(tmp_path / "pipeline"))
    size = sum(f.stat().st_size for f in (tmp_path / "pipeline").rglob("*") if f.is_file())
    assert size < 40e6
    pipe = tiny.load(path=tmp_path / "pipeline")
    options = tiny.generation_options() | {"height": 64, "width": 64, "num_frames": 5}
    frames = pipe("a red circle moving right", num_inference_steps=2, **options).frames[0]
    assert frames.shape == (5, 64, 64, 3) and 0 <= frames.min() <= frames.max() <= 1
