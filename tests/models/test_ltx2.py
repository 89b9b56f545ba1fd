"""What LTX-2's transformer takes that its pipelines' default calls do not exercise."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers import transformer_ltx2

import heterostep
from heterostep.engine.clock import StepClock
from heterostep.kv.cache import KVCache
from heterostep.pipeline import inspect
from patched import Patched
from rows import ROWS
from small_ltx2 import run_ltx2, small_ltx2

TOKENS = 3 * 4 * 4


def inputs(model, batch=2):
    g = torch.Generator().manual_seed(3)
    text = model.config.caption_channels if model.config.use_prompt_embeddings else model.config.cross_attention_dim
    audio_text = text if model.config.use_prompt_embeddings else model.config.audio_cross_attention_dim
    return {
        "hidden_states": torch.randn(batch, TOKENS, model.config.in_channels, generator=g),
        "audio_hidden_states": torch.randn(batch, 18, model.config.audio_in_channels, generator=g),
        "encoder_hidden_states": torch.randn(batch, 16, text, generator=g),
        "audio_encoder_hidden_states": torch.randn(batch, 16, audio_text, generator=g),
        "timestep": torch.full((batch,), 700.0),
        "sigma": torch.full((batch,), 700.0),
        "num_frames": 3,
        "height": 4,
        "width": 4,
        "audio_num_frames": 18,
    }


def padding(batch, states):
    mask = torch.ones(batch, states)
    mask[:, : states // 2] = 0
    return mask


EXTRAS = {
    "no coordinates given": {},
    "padded text": {"encoder_attention_mask": padding(2, 16), "audio_encoder_attention_mask": padding(2, 16)},
    "masked video": {
        "video_self_attention_mask": torch.rand(2, TOKENS, TOKENS, generator=torch.Generator().manual_seed(5)).round()
    },
    "one sample perturbed": {
        "spatio_temporal_guidance_blocks": [1],
        "perturbation_mask": torch.tensor([0.0, 1.0]),
    },
    "all perturbed": {"spatio_temporal_guidance_blocks": [0, 2]},
    "modalities apart": {"isolate_modalities": True},
    "a time for each token": {
        "timestep": torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(6)) * 900,
        "audio_timestep": torch.full((2,), 700.0),
    },
}


# Perturbed attention is 2.3's.
CASES = [(extra, version) for extra in EXTRAS for version in ("2.0", "2.3") if version == "2.3" or "pert" not in extra]


@pytest.mark.parametrize("extra,version", CASES)
@torch.no_grad()
def test_rows_of_a_subset_equal_the_dense_rows(extra, version):
    model = small_ltx2("text", version).transformer
    plain_inputs = inputs(model)
    patched = Patched(model, {**plain_inputs, **EXTRAS[extra]})
    if extra != "no coordinates given":
        assert not torch.equal(patched.plain_output[0], model(**plain_inputs, return_dict=False)[0]), (
            "the option does nothing"
        )
    for a, b in zip(patched.dense(), patched.plain_output, strict=True):
        assert torch.equal(a, b)
    for count in (1, 7, TOKENS):
        for a, b in zip(patched.sparse(patched.random_index(count)), patched.plain_output, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5 * b.std().item(), rtol=0)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@torch.no_grad()
def test_one_kernel_rotates_wherever_keys_are_kept_or_read(version, monkeypatch):
    model = small_ltx2("text", version).transformer
    patched = Patched(model, inputs(model))

    def refuse(*args):
        raise AssertionError("the model's own rotation runs")

    for name in ("apply_interleaved_rotary_emb", "apply_split_rotary_emb"):
        monkeypatch.setattr(transformer_ltx2, name, refuse)
    with pytest.raises(AssertionError, match="own rotation"):
        patched.plain()
    patched.dense()
    patched.sparse(patched.random_index(7))


@torch.no_grad()
def test_perturbed_blocks_keep_no_keys():
    model = small_ltx2("text", "2.3").transformer
    patched = Patched(model, {**inputs(model), "spatio_temporal_guidance_blocks": [1]})
    patched.dense()
    kept = [store.nbytes > 0 for store in patched.stores if isinstance(store, KVCache)]
    # Two attentions a block, its own and the audio's: STG switches off the second block's own.
    assert kept == [True, True, False, True, True, True]


def test_audio_is_fresh_at_every_step():
    """Also where no video token's turn has come: the audio's velocity changes at each step."""
    pipe = small_ltx2("text", "2.3")
    heterostep.enable(pipe, share=0.3, sparse_share=0.3, dense_start=2)
    audio = []
    hook = pipe.transformer.register_forward_hook(lambda m, a, out: audio.append(out[1]))
    run_ltx2(pipe, steps=24, stg_scale=0.0, audio_stg_scale=0.0, modality_scale=1.0, audio_modality_scale=1.0)
    hook.remove()
    counts = [round(share * TOKENS) for share in heterostep.report(pipe).active_share]
    assert min(counts) == 1 and len(audio) == 24
    assert all(not torch.equal(a, b) for a, b in zip(audio, audio[1:]))


@pytest.mark.parametrize("name", ["ltx2.3-i2v", "ltx2.3-condition", "wan2.2-ti2v-i2v"])
def test_given_frames_run_at_dense_steps_alone(name):
    row = ROWS[name]
    pipe = row.build()
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    row.run(pipe, steps=12)
    report = heterostep.report(pipe)
    dense = sum(share == 1 for share in report.active_share)
    assert (report.steps_map[0] == dense).all() and report.steps_map[1:].mean() > dense + 1


def test_guidance_in_batches_counts_samples_once():
    pipe = small_ltx2("text", "2.0")
    heterostep.enable(pipe, share=0.5, sparse_share=0.3)
    run_ltx2(pipe, prompt=["a red circle", "green square moving left"])
    maps = heterostep.report(pipe).steps_maps
    assert maps.shape == (2, 3, 4, 4) and (maps[0] != maps[1]).any()
    run_ltx2(pipe, guidance_scale=1.0, audio_guidance_scale=1.0)
    assert heterostep.report(pipe).steps_maps.shape == (1, 3, 4, 4)


@pytest.mark.parametrize("rescale,least,most", [(0.0, 0.0, 1e-5), (0.7, 1e-4, 0.01)])
def test_guidance_rescale_moves_a_skipped_tokens_velocity_a_little(rescale, least, most, monkeypatch):
    """Without rescale the guided velocity is linear in the branches' held ones, so it is held too; with it, nearly."""
    pipe = small_ltx2("text", "2.0")
    heterostep.enable(pipe, share=0.4, sparse_share=0.3, dense_start=2, extrapolate=0)
    runner = inspect(pipe)
    guided, skipped = [], []
    plain_step = FlowMatchEulerDiscreteScheduler.step

    def step(self, velocity, *args, **kwargs):
        if self is pipe.scheduler:
            index = runner.generation.index
            guided.append(velocity[0])
            skipped.append(set() if index is None else set(range(TOKENS)) - set(index[0].tolist()))
        return plain_step(self, velocity, *args, **kwargs)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", step)
    run_ltx2(pipe, steps=40, guidance_rescale=rescale, audio_guidance_rescale=rescale)
    changes = [
        ((new[list(rows)] - old[list(rows)]).norm() / old[list(rows)].norm()).item()
        for old, new, rows in zip(guided, guided[1:], skipped[1:])
        if rows
    ]
    assert len(changes) > 20
    assert least <= sum(changes) / len(changes) <= most


# Seconds as they were measured: the first step, one of the pipeline itself, the first that keeps K and V, one that
# does; the first three calls with one video token, which are compiled and recorded as CUDA graphs, and each later one.
H100 = (0.5, 0.5, 1.75, 0.46, [2.55, 0.39, 0.49], 0.045)
TWO_H200 = (0.67, 0.583, 4.18, 0.505, [2.64, 0.59, 0.053], 0.055)


@pytest.mark.parametrize(
    ("target", "measured"), [*((target, H100) for target in (0.75, 0.5, 0.25)), (0.75, TWO_H200), (0.25, TWO_H200)]
)
def test_slow_first_calls_do_not_take_from_the_target(monkeypatch, target, measured):
    """A target is one of the pipeline's own seconds, which the calls that keep K and V do not tell."""
    first, plain, first_kept, kept, slow, one_token = measured
    pipe, steps = small_ltx2(), 40
    # A dense run before compiles nothing of what a sparse one does.
    with heterostep.enabled(pipe, share=1.0):
        run_ltx2(pipe, steps=3)
    heterostep.enable(pipe, runtime=target)
    runner = inspect(pipe)

    def seconds(clock):
        made, sparse, keeping = [], iter(slow), iter([first_kept])
        for step, count in enumerate(runner.generation.counts[: len(clock._marks) - 1]):
            share = count / TOKENS
            if share < 1:
                made.append(next(sparse, one_token + share * (kept - one_token)))
            elif step in runner.generation.kept:
                made.append(next(keeping, kept))
            else:
                made.append(plain if step else first)
        return made

    monkeypatch.setattr(StepClock, "durations", seconds)
    run_ltx2(pipe, steps)
    report = heterostep.report(pipe)
    # Steady: as in a second run.
    taken = seconds(runner.generation.clock)
    warmup = first - plain + first_kept - kept + sum(slow) - 3 * one_token
    assert (sum(taken) - warmup) / (plain * steps) == pytest.approx(target, rel=0.03)
    assert report.runtime.dense_seconds == pytest.approx(plain * steps, rel=0.01)


@pytest.mark.parametrize(("sparse", "reached"), [(0.4, False), (0.05, True)])
def test_where_the_sound_alone_takes_longer_than_the_target_the_video_is_not_given_up(sparse, reached, monkeypatch):
    """As on several GPUs, where the sound's calls wait for the host."""
    pipe = small_ltx2("text", "2.3")
    heterostep.enable(pipe, runtime=0.5)

    def durations(clock):
        made = inspect(pipe).generation
        return [0.5 if made.counts[at] == made.total else sparse for at in range(len(clock._marks) - 1)]

    monkeypatch.setattr(StepClock, "durations", durations)
    run_ltx2(pipe, steps=24)
    report = heterostep.report(pipe)
    dense = report.active_share.count(1)
    if reached:
        # 24 half seconds, of which 24 twentieths are the sound's alone.
        assert dense == pytest.approx((0.5 * 24 * 0.5 - 24 * 0.05) / 0.45, abs=1) and report.advice is None
        return
    # At the least they would be two.
    assert dense == 11 and report.runtime.achieved > 0.85
    assert "runtime=0.5 could not be reached" in report.advice and "took 0.80 of a full step" in report.advice
    assert "GPU" not in report.advice
