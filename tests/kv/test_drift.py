"""skipped tokens whose K/V go on along their change, and steps that evaluate each token in its turn."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from test_stores import LAYERS

import heterostep
from heterostep.compare.methods.own import BUDGETS, round_robin_options
from heterostep.config import HSAConfig
from heterostep.engine import steps
from heterostep.engine.forecast import choose
from heterostep.engine.generation import Generation
from heterostep.engine.schedule import Schedule
from heterostep.errors import HeterostepError
from heterostep.pipeline import inspect
from heterostep.policy import Run, Tokens
from heterostep.policy.round_robin import by_round_robin, probes, with_probes
from heterostep.sigmas import log_alpha, nominal_sigmas
from rows import ROWS, equal, quickly
from small import run, small_pipeline

DRIFT = {"share": 0.55, "sparse_share": 0.4, "dense_start": 2, "sync": "drift"}
TURNS = {"share": 0.5, "round_robin": 4, "dense_start": 2, "sync": "drift"}


@pytest.fixture
def pipe():
    return small_pipeline()


def test_all_tokens_active_is_bit_identical(pipe):
    plain = run(pipe, steps=4)
    with heterostep.enabled(pipe, share=1.0, sync="drift"):
        assert torch.equal(run(pipe, steps=4), plain)


@pytest.mark.parametrize("options", [DRIFT, TURNS])
def test_with_no_drift_it_is_held(pipe, monkeypatch, options):
    # Held velocities have the same variable.
    options = options | {"extrapolate": 0.0}
    with heterostep.enabled(pipe, **options | {"sync": "hold"}):
        held = run(pipe)
    with heterostep.enabled(pipe, **options):
        assert not torch.equal(run(pipe), held)
        # Of nothing but the way that K and V go on.
        monkeypatch.setattr(Generation, "elapsed_log_alpha", property(lambda self: torch.zeros_like(self.evaluated_at)))
        assert torch.equal(run(pipe), held)


KINDS = ("wan2.1-t2v", "wan2.2-i2v", "ltx2.0-t2v", "ltx2.3-t2v", "ltx0.9-t2v", "hunyuan1.5-t2v")


@pytest.mark.parametrize("name", quickly(KINDS, ["wan2.1-t2v", "wan2.2-i2v", "ltx2.0-t2v", "ltx0.9-t2v"]))
def test_families_and_stores(name):
    """Wherever K/V are kept they drift alike; coded ones are held."""
    row, made = ROWS[name], {}
    pipe = row.build()
    for sync, store in (
        ("drift", "device"),
        ("drift", "offload"),
        ("drift", "fp8"),
        ("hold", "fp8"),
        ("hold", "device"),
    ):
        with heterostep.enabled(pipe, **DRIFT | {"sync": sync}, kv_store=store):
            made[sync, store] = row.run(pipe, steps=12)
    assert all(torch.isfinite(x).all() for x in made["drift", "device"])
    assert equal(made["drift", "offload"], made["drift", "device"])
    assert not equal(made["drift", "device"], made["hold", "device"])
    assert equal(made["drift", "fp8"], made["hold", "fp8"])


def test_kv_are_kept_for_the_changes_of_those_before(pipe):
    """A change needs two evaluations, and which they are may change; after the last step that reads nothing is kept."""
    kept = []
    heterostep.enable(pipe, share=[1, 1, 0, 1, 0, 1, 0.5, 0, 1, 1], sync="drift")
    runner = inspect(pipe)
    hook = pipe.transformer.register_forward_hook(
        lambda *args: kept.append(sum(branch.kv_bytes for branch in runner.generation.branches) > 0)
    )
    run(pipe, steps=10, guidance_scale=1.0)
    hook.remove()
    # As each step leaves it; at the first not all guidance branches are known yet.
    assert kept == [False] + [True] * 5 + [False] * 4


def sleeps(pipe, **options):
    """The most steps that each token slept on end, [B, N]."""
    active = []
    real = steps.start_step

    def start(generation, step):
        real(generation, step)
        rows = torch.zeros_like(generation.evaluated_at, dtype=torch.bool)
        count = generation.counts[step]
        if count:
            rows = torch.ones_like(rows) if generation.index is None else rows.scatter(1, generation.index, True)
        active.append(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "start_step", start)
        run(pipe, steps=20, **options)
    active = torch.stack(active)
    longest, asleep = torch.zeros(active.shape[1:]), torch.zeros(active.shape[1:])
    for rows in active:
        asleep = torch.where(rows, 0, asleep + 1)
        longest = torch.maximum(longest, asleep)
    return longest


@pytest.mark.parametrize("length", [3, 5, 9])
@pytest.mark.parametrize("score", ["velocity", "random", "oracle"])
def test_no_token_sleeps_longer_than_a_round_robin(pipe, length, score):
    with heterostep.enabled(pipe, share=0.75, round_robin=length, score=score, sync="drift"):
        longest = sleeps(pipe)
        report = heterostep.report(pipe)
    assert longest.max() < length
    assert report.share.achieved == pytest.approx(0.75, abs=0.001)
    # Not all are alike: those that change fastest have more.
    assert report.steps.min < report.steps.mean < report.steps.max


def test_given_tokens_come_round_too():
    """A clean first frame needs no velocity, but its K and V change with the others."""
    pipe = small_pipeline(image_to_video=True)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    with heterostep.enabled(pipe, share=0.75, round_robin=4):
        assert sleeps(pipe, image=Image.fromarray(pixels)).max() < 4
        report = heterostep.report(pipe)
    assert report.steps_map[0].mean() < report.steps_map[1:].mean()


def test_a_round_robin_with_two_experts_and_with_a_target_in_seconds():
    row = ROWS["wan2.2-t2v"]
    pipe = row.build()
    with heterostep.enabled(pipe, share=0.6, round_robin=4, sync="drift"):
        row.run(pipe, steps=12)
    report = heterostep.report(pipe)
    assert report.share.achieved == pytest.approx(0.6, abs=0.002) and report.active_share.count(1.0) >= 4
    with heterostep.enabled(pipe, runtime=0.8, round_robin=4, sync="drift"):
        row.run(pipe, steps=20)
    assert any(0 < share < 1 for share in heterostep.report(pipe).active_share)


def test_counts_of_a_round_robin_spend_every_budget():
    tokens = Tokens(1296)
    for evaluations in range(1296 * 4, 1296 * 20, 777):
        counts = by_round_robin(evaluations, tokens, range(3, 23), 8, dense=(3,))
        assert len(counts) == 20 and counts[0] == 1296 and min(counts) >= 162
        assert sum(counts) == evaluations
        assert max(counts[1:]) - min(counts[1:]) <= 2 * tokens.unit
    # Behind the window's first step there is no dense one, and with too little each step has its probes.
    assert by_round_robin(0, tokens, range(5, 9), 8, dense=(3,)) == [162] * 4


@pytest.mark.parametrize(("total", "length"), [(48, 5), (7, 3), (3, 9)])
def test_each_token_has_one_turn(total, length):
    scores = torch.zeros(2, total)
    turns = torch.stack([with_probes(scores, turn, length).isinf() for turn in range(length)])
    assert (turns.sum(0) == 1).all() and not scores.any()
    assert turns.sum(-1).max() <= probes(total, length)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_robin": 0}, "round_robin must be a whole number, at least 1"),
        ({"round_robin": 2.5}, "round_robin must be a whole number"),
        ({"round_robin": 4, "divisors": (1, 2)}, "leave out divisors"),
        ({"sync": "drifting"}, "sync must be one of drift, hold, fresh"),
    ],
)
def test_faults_are_one_line(options, message):
    with pytest.raises(HeterostepError, match=message):
        HSAConfig(**{"share": 0.5} | options)


def test_a_target_that_a_round_robin_cannot_meet_is_refused():
    schedule = Schedule(HSAConfig(share=0.2, round_robin=4, dense_start=2), Run(nominal_sigmas(20)))
    with pytest.raises(HeterostepError, match="then 1/4 of the tokens at each") as caught:
        schedule.check()
    assert "below the lowest possible 0.363" in str(caught.value)
    Schedule(HSAConfig(share=0.363, round_robin=4, dense_start=2), Run(nominal_sigmas(20))).check()


def test_the_compared_round_robins_are_feasible():
    for share in BUDGETS:
        Schedule(HSAConfig(share=share, **round_robin_options(share, 40)), Run(nominal_sigmas(40))).check()


def test_what_is_planned_is_what_is_kept(pipe):
    sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 12, "guidance_scale": 3.0}
    for store in ("device", "offload"):
        planned = heterostep.plan(pipe, **sizes, **DRIFT, kv_store=store)
        held = heterostep.plan(pipe, **sizes, **DRIFT | {"sync": "hold"}, kv_store=store)
        with heterostep.enabled(pipe, **DRIFT, kv_store=store):
            run(pipe)
        told = heterostep.report(pipe).memory
        assert told.kv_host_bytes == planned.chosen.host_bytes
        if store == "device":
            static = told.kv_cache_bytes - planned.chosen.device_bytes
            with heterostep.enabled(pipe, **DRIFT | {"sync": "hold"}, kv_store=store):
                run(pipe)
            assert heterostep.report(pipe).memory.kv_cache_bytes - held.chosen.device_bytes == static
        assert (
            planned.chosen.device_bytes + planned.chosen.host_bytes > held.chosen.device_bytes + held.chosen.host_bytes
        )


def test_what_does_not_fit_drifts_in_host_memory_rather_than_is_held():
    layers = [dataclasses.replace(layer, drifts=True) for layer in LAYERS]
    size = layers[0].nbytes("device")
    assert size == LAYERS[0].nbytes("device") + LAYERS[0].nbytes("fp8")
    room = 10 * size
    assert set(choose(layers, room, room, 10 * size).names) == {"device", "offload"}
    assert "offload" not in choose(layers, room, room, 0).names


def test_log_alpha_rises_as_sigma_falls():
    times = log_alpha(torch.tensor([1.0, 0.9, 0.5, 0.0]))
    assert (times.diff() > 0).all() and times.isfinite().all()
