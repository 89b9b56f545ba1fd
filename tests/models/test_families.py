"""What holds for every supported pipeline, each with small random weights and all of its guidance switched on."""

import inspect

import numpy as np
import pytest
import torch

import heterostep
from heterostep.engine.trajectory import Trajectory
from heterostep.kv.cache import KVCache
from heterostep.pipeline import inspect as look_at
from patched import Patched
from rows import ROWS, equal, quickly, transformers

STEPS = 12
# Steps at which some of the tokens run, with two experts too.
HALF = {"share": 0.5, "sparse_share": 0.5, "dense_start": 1}


# What differs from row to row is what an adapter says; LTX-2.3's rows ask the same of a larger model. HunyuanVideo
# 1.0's image-to-video rows have what is special about them asked in `test_hunyuan.py`.
RARELY = ("ltx2.0-i2v", "ltx2.0-condition", "hunyuan1.0-i2v", "hunyuan1.0-i2v-33ch")
ADAPTERS = [name for name in ROWS if name not in RARELY]


@pytest.fixture(params=quickly(ROWS, ADAPTERS))
def row(request):
    return ROWS[request.param]


@pytest.fixture(params=quickly(ROWS))
def kind(request):
    """For what the engine does alike for all."""
    return ROWS[request.param]


def calls_of_a_step(row, pipe, step):
    """The forwards of one denoising step: the model and its inputs by name."""
    seen, undo = [], []

    def keep(model, args, kwargs):
        inputs = dict(inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments)
        inputs.pop("self")
        seen.append((inputs["timestep"].max().item(), model, inputs))

    for model in transformers(pipe):
        undo.append(model.register_forward_pre_hook(keep, with_kwargs=True))
    row.run(pipe, steps=STEPS)
    for handle in undo:
        handle.remove()
    times = sorted({time for time, _, _ in seen}, reverse=True)
    return [(model, inputs) for time, model, inputs in seen if time == times[step]]


def test_all_tokens_active_is_bit_identical(row):
    pipe = row.build()
    plain = row.run(pipe, steps=4)
    with heterostep.enabled(pipe, share=1.0):
        assert equal(row.run(pipe, steps=4), plain)
    assert equal(row.run(pipe, steps=4), plain)


@torch.no_grad()
def test_rows_of_a_subset_equal_the_dense_rows(row):
    """In each of a step's calls: with nothing stale, every subset gives its rows of the dense forward."""
    pipe = row.build()
    for model, inputs in calls_of_a_step(row, pipe, step=2):
        patched = Patched(model, inputs)
        assert equal(patched.dense(), patched.plain_output), "a dense call that keeps K/V is the plain call"
        grid = patched.adapter.token_grid(model, inputs)
        assert torch.equal(patched.adapter.unpatchify(model, grid, patched.held), patched.plain_output[0])
        for count in (1, 7, patched.num_tokens // 2, patched.num_tokens):
            for sparse, plain in zip(patched.sparse(patched.random_index(count)), patched.plain_output, strict=True):
                # Outputs of random weights are not of size one.
                torch.testing.assert_close(sparse, plain, atol=1e-5 * plain.std().item(), rtol=0)
        patched.restore()
        assert equal(model(**patched.inputs), patched.plain_output)


@torch.no_grad()
def test_sleeping_tokens_are_seen_by_every_attention_that_reads_video(row):
    """Whatever keeps K and V of tokens matters to the output: with zeros in their place it changes."""
    pipe = row.build()
    for model, inputs in calls_of_a_step(row, pipe, step=2):
        patched = Patched(model, inputs)
        patched.dense()
        index = patched.random_index(8)
        # An attention that STG switches off, or that modality guidance leaves out, keeps nothing.
        kept = [store for store in patched.stores if isinstance(store, KVCache) and store.nbytes]
        assert kept
        for store in kept:
            parts = [part.clone() for part in store._parts]
            for part in store._parts:
                part.zero_()
            changed = patched.sparse(index)
            moved = max((a - b).abs().max() for a, b in zip(changed, patched.plain_output))
            assert moved > 1e-5
            for part, before in zip(store._parts, parts):
                part.copy_(before)
        patched.restore()


def test_half_of_the_evaluations_are_spent_and_reported(kind):
    pipe = kind.build()
    dense = kind.run(pipe, steps=STEPS)
    heterostep.enable(pipe, **HALF)
    half = kind.run(pipe, steps=STEPS)
    report = heterostep.report(pipe)
    steps, samples = report.num_inference_steps, len(report.steps_maps)
    assert report.finished and report.pipeline == type(pipe).__name__
    assert samples == 1 and len(report.active_share) == steps
    # A video's grid may have given tokens behind it, which the map does not show.
    assert report.steps_map.shape == kind.grid
    assert report.steps.mean == pytest.approx(report.share.achieved * steps)
    tokens = look_at(pipe).generation.total
    assert abs(report.share.achieved - 0.5) <= 1 / (tokens * steps)
    assert report.steps_maps.min() < report.steps_maps.max() <= steps
    assert sum(report.active_share) / steps == pytest.approx(report.share.achieved)
    assert all(x.isfinite().all() and not torch.equal(x, y) for x, y in zip(half, dense))
    assert equal(kind.run(pipe, steps=STEPS), half), "a new generation starts with nothing of the last"
    assert heterostep.report(pipe).memory.kv_cache_bytes == report.memory.kv_cache_bytes > 0
    assert not look_at(pipe).generation.branches


def test_a_runtime_run_ends_and_is_replayed(kind):
    pipe = kind.build()
    heterostep.enable(pipe, runtime=0.6, sparse_share=0.3)
    first = kind.run(pipe, steps=16)
    report = heterostep.report(pipe)
    assert report.finished and report.runtime.achieved is not None
    heterostep.enable(pipe, share=report.active_share)
    assert equal(kind.run(pipe, steps=16), first)
    assert heterostep.report(pipe).active_share == report.active_share


def test_an_exception_leaves_nothing_behind(kind):
    pipe = kind.build()
    heterostep.enable(pipe, **HALF)
    clean = kind.run(pipe, steps=STEPS)

    seen = []

    def fail(model, args):
        seen.append(model)
        if len(seen) == 10:
            raise KeyboardInterrupt

    hooks = [model.register_forward_pre_hook(fail) for model in transformers(pipe)]
    with pytest.raises(KeyboardInterrupt):
        kind.run(pipe, steps=STEPS, seed=9)
    for hook in hooks:
        hook.remove()
    assert not heterostep.report(pipe).finished
    assert equal(kind.run(pipe, steps=STEPS), clean)


def test_another_size_starts_anew(kind):
    pipe = kind.build()
    heterostep.enable(pipe, **HALF)
    clean = kind.run(pipe, steps=STEPS)
    shape = heterostep.report(pipe).steps_map.shape
    kind.run(pipe, steps=STEPS, **kind.larger)
    assert heterostep.report(pipe).steps_map.size > np.prod(shape)
    assert equal(kind.run(pipe, steps=STEPS), clean)
    heterostep.disable(pipe)


def test_disable_gives_the_models_back(kind):
    pipe = kind.build()

    def state():
        return [
            (name, len(module._forward_hooks), "forward" in module.__dict__, getattr(module, "processor", None))
            for model in transformers(pipe)
            for name, module in model.named_modules()
        ]

    before = state()
    with heterostep.enabled(pipe, **HALF):
        kind.run(pipe, steps=STEPS)
        assert state() != before
    assert state() == before


def test_the_values_of_single_tokens_are_known(kind, monkeypatch):
    """In the layout in which each pipeline steps its latents: what a gap has missed is told by them."""
    pipe, seen = kind.build(), []
    on_skipped_step = Trajectory.on_skipped_step

    def watched(trajectory, step, velocity, weight, evaluated=None):
        generation = look_at(pipe).generation
        if evaluated is not None:
            # Some pipelines leave given frames out of what they step; these are evaluated last.
            frames = velocity.shape[2] / generation.grid.frames if velocity.ndim == 5 else 1
            seen.append(
                (
                    evaluated.expand_as(velocity).float().mean().item() * frames,
                    generation.counts[step] / generation.total,
                )
            )
            model, rows = transformers(pipe)[0], generation.branches[0].velocity
            tokens = torch.zeros_like(generation.evaluations, dtype=bool).scatter(1, generation.index, True)
            everyone = tokens[..., None].expand(-1, -1, rows.shape[2])
            output = look_at(pipe).adapter.unpatchify(model, generation.grid, everyone)
            assert output.shape != velocity.shape or torch.equal(output, evaluated.expand_as(velocity))
        return on_skipped_step(trajectory, step, velocity, weight, evaluated)

    monkeypatch.setattr(Trajectory, "on_skipped_step", watched)
    heterostep.enable(pipe, **HALF)
    kind.run(pipe, steps=STEPS)
    # LTX-2 has one token at each of the other steps.
    sparse = [share for share in heterostep.report(pipe).active_share if 0.1 < share < 1]
    assert len(seen) == len(sparse) > 0 and all(made == pytest.approx(active) for made, active in seen)
