"""Every other accelerator on small pipelines: neutral where it should be, faster where it says, and gone afterwards."""

from __future__ import annotations

import concurrent.futures
import io
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from heterostep.compare.methods import PEERS, calibration, magcache, teacache
from heterostep.compare.methods.calibration import calibrate_with
from heterostep.compare.methods.calls import Calls
from heterostep.compare.methods.easycache import easycache_error
from heterostep.compare.methods.method import Method
from heterostep.compare.methods.teacache import teacache_polynomial
from heterostep.compare.regimes import REGIMES, in_regime
from rows import ROWS, equal, quickly, transformers

STEPS = 12
PIPELINES = ("wan2.1-t2v", "wan2.2-i2v", "ltx2.0-t2v")
# What leaves a run as it is.
NEUTRAL = {"taylorseer": 1, "pab": 1}
# Random weights change much more from step to step than trained ones: thresholds that skip there skip nothing here.
FASTEST = {
    "easycache": 20.0,
    "teacache": 5.0,
    "first-block-cache": 2.0,
    "magcache": 2.0,
    "seacache": 9.0,
    "seacache-hold": 9.0,
    "cache-dit": 2.0,
}
METHODS = {method.name: method for method in PEERS}
# What diffusers' and cache-dit's code cannot do, tried; the others run everywhere.
SEA = ("seacache", "seacache-hold")
REFUSED = {(name, "ltx2.0-t2v") for name in ("first-block-cache", "magcache", "cache-dit", *SEA)}
CASES = [(name, kind) for name in METHODS for kind in PIPELINES if (name, kind) not in REFUSED]
# Each on one model; with another's two experts, or its sound, those that keep most.
QUICK = [
    case for case in CASES if case[1] == "wan2.1-t2v" or case in (("easycache", "ltx2.0-t2v"), ("pab", "wan2.2-i2v"))
]


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """Each with its plain output of seed 0; that it stays this is what most tests are about."""
    built = {}
    for kind in PIPELINES:
        pipe = ROWS[kind].build()
        calibrate_with(pipe, height=64, width=64, num_frames=9)
        built[kind] = pipe, ROWS[kind].run(pipe, steps=STEPS)
    return built


def _case(pipelines: dict[str, Any], name: str, kind: str) -> tuple[Method, Any, tuple[torch.Tensor, ...]]:
    pipe, plain = pipelines[kind]
    method = METHODS[name]
    if name == "cache-dit":
        pytest.importorskip("cache_dit")
    assert method.refuses(pipe) is None
    return method, pipe, plain


def run(kind: str, pipe: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    return ROWS[kind].run(pipe, steps=STEPS, **options)


@contextmanager
def evaluations(pipe: Any) -> Iterator[list[int]]:
    """Tokens of each call of the last blocks' self-attention: a skipped block is still called, what is in it is not."""
    rows: list[int] = []
    blocks = [getattr(model, "blocks", None) or model.transformer_blocks for model in transformers(pipe)]
    hooks = [
        each[-1].attn1.to_q.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
        for each in blocks
    ]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_neutral_value_changes_nothing(pipelines: dict[str, Any], name: str, kind: str) -> None:
    method, pipe, plain = _case(pipelines, name, kind)
    with method.apply(pipe, NEUTRAL.get(name, 0.0), STEPS) as options:
        assert equal(run(kind, pipe, **options), plain)
    assert equal(run(kind, pipe), plain)


@pytest.mark.parametrize(("name", "kind"), quickly(CASES, QUICK))
def test_the_fastest_value_skips_and_repeats(pipelines: dict[str, Any], name: str, kind: str) -> None:
    method, pipe, plain = _case(pipelines, name, kind)
    with evaluations(pipe) as dense:
        run(kind, pipe)
    with method.apply(pipe, FASTEST.get(name, method.values[-1]), STEPS) as options:
        with evaluations(pipe) as sparse:
            first = run(kind, pipe, **options)
        run(kind, pipe, seed=1, **options)
        assert equal(run(kind, pipe, **options), first)
    assert sum(sparse) < sum(dense)
    assert not equal(first, plain)
    assert equal(run(kind, pipe), plain)


@pytest.mark.parametrize(("name", "kind"), quickly(CASES, QUICK))
def test_an_interrupted_generation_leaves_nothing(pipelines: dict[str, Any], name: str, kind: str) -> None:
    method, pipe, plain = _case(pipelines, name, kind)

    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == STEPS // 2:
            raise KeyboardInterrupt
        return {}

    before = [set(module.__dict__) for model in transformers(pipe) for module in model.modules()]
    with method.apply(pipe, FASTEST.get(name, method.values[-1]), STEPS) as options:
        whole = run(kind, pipe, **options)
        with pytest.raises(KeyboardInterrupt):
            run(kind, pipe, callback_on_step_end=interrupt, seed=1, **options)
        assert equal(run(kind, pipe, **options), whole)
    with pytest.raises(KeyboardInterrupt), method.apply(pipe, FASTEST.get(name, method.values[-1]), STEPS) as options:
        run(kind, pipe, callback_on_step_end=interrupt, **options)
    assert equal(run(kind, pipe), plain)
    after = [set(module.__dict__) for model in transformers(pipe) for module in model.modules()]
    assert after == before


@pytest.mark.parametrize(("name", "kind"), sorted(REFUSED))
def test_what_is_refused_does_not_run(pipelines: dict[str, Any], name: str, kind: str) -> None:
    pipe, plain = pipelines[kind]
    reason = METHODS[name].refuses(pipe)
    assert reason and "\n" not in reason
    if name == "cache-dit":
        pytest.importorskip("cache_dit")
    with pytest.raises((ValueError, TypeError)), METHODS[name].apply(pipe, 0.0, STEPS):
        run(kind, pipe)
    assert equal(run(kind, pipe), plain)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("wan2.1-v2v", {"first-block-cache", "magcache", "taylorseer", *SEA}),
        ("wan2.1-vace", {"teacache", "first-block-cache", "magcache", *SEA}),
        ("ltx0.9-t2v", set(SEA)),
    ],
)
def test_refusals_are_one_line(kind: str, names: set[str]) -> None:
    pipe = ROWS[kind].build()
    reasons = {name: method.refuses(pipe) for name, method in METHODS.items()}
    refused = {name for name, reason in reasons.items() if reason is not None and "pip install" not in reason}
    assert refused == names
    assert all("\n" not in reasons[name] for name in names)


def test_cache_dit_is_optional(pipelines: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = METHODS["cache-dit"].refuses(pipelines["wan2.1-t2v"][0])
    assert reason is not None and "pip install cache-dit" in reason


def test_cache_dit_is_quiet_while_it_is_applied(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cache_dit")
    pipe = ROWS["wan2.1-t2v"].build()
    handlers = logging.getLogger("CACHE_DIT").handlers
    before = [handler.level for handler in handlers]
    with mock.patch.object(handlers[0], "stream", io.StringIO()) as said:
        with METHODS["cache-dit"].apply(pipe, 0.1, STEPS):
            run("wan2.1-t2v", pipe)
        assert said.getvalue() == ""
        assert [handler.level for handler in handlers] == before
        logging.getLogger("CACHE_DIT").warning("heard")
        assert "heard" in said.getvalue()
    assert capfd.readouterr().out == ""


def test_calibration_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ROWS["wan2.1-t2v"].build()
    runs = []
    dense_run = calibration.dense_run
    for module in (teacache, magcache):
        monkeypatch.setattr(module, "dense_run", lambda *args: (runs.append(args), dense_run(*args)))
    calibrate_with(pipe, height=64, width=64, num_frames=9)
    for num_steps in (4, 4, 6):
        for name in ("teacache", "magcache"):
            METHODS[name].apply(pipe, 0.1, num_steps)
    assert len(runs) == 4
    calibrate_with(pipe, height=64, width=64, num_frames=9)
    METHODS["teacache"].apply(pipe, 0.1, 4)
    assert len(runs) == 4
    # In another regime with the same options it is another one; the first is not forgotten.
    for name in ("wan2.1-i2v-480p", "wan2.1-i2v-720p"):
        with in_regime(pipe, REGIMES[name]):
            METHODS["teacache"].apply(pipe, 0.1, 4)
            METHODS["teacache"].apply(pipe, 0.2, 4)
    METHODS["teacache"].apply(pipe, 0.1, 4)
    assert len(runs) == 5, "shift 3 is the pipeline's own"


@pytest.mark.parametrize(
    "name", ["easycache", "teacache", "first-block-cache", "magcache", "seacache", "seacache-hold", "taylorseer", "pab"]
)
def test_calls_of_another_thread_are_not_its_own(pipelines: dict[str, Any], name: str) -> None:
    """A second pipeline with the same transformer generates meanwhile, and is given what it would be given alone."""
    method, pipe, plain = _case(pipelines, name, "wan2.1-t2v")
    value = FASTEST.get(name, method.values[-1])
    parts = {**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    other = type(pipe)(**parts)
    other.set_progress_bar_config(disable=True)
    diffusers_own = name not in ("easycache", "teacache")

    def between(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == STEPS // 2:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                others.append(pool.submit(run, "wan2.1-t2v", other).result())
        return {}

    others: list[Any] = []
    with method.apply(pipe, value, STEPS) as options:
        alone = run("wan2.1-t2v", pipe, **options)
        if diffusers_own:
            # Their hooks answer every call, and know of no threads; ours that tell of a call's place must not count it.
            calls = []
            with mock.patch.object(Calls, "enter", lambda self: calls.append(threading.get_ident()) or False):
                run("wan2.1-t2v", pipe, callback_on_step_end=between, **options)
            assert calls and set(calls) == {threading.get_ident()}
            return
        # Some pipelines leave their last timestep behind.
        other._current_timestep = pipe._current_timestep = torch.tensor(7)
        assert equal(run("wan2.1-t2v", pipe, callback_on_step_end=between, **options), alone)
    assert equal(others[0], plain) and not equal(alone, plain)


def test_published_settings_are_in_the_sweeps() -> None:
    published = {
        "easycache": {0.05},
        "teacache": {0.05, 0.08, 0.14, 0.2},
        "magcache": {0.12},
        "first-block-cache": {0.08, 0.1},
        "cache-dit": {0.08, 0.12},
        "seacache": {0.25},
        "seacache-hold": {0.2, 0.35, 0.4},
    }
    for name, values in published.items():
        assert values <= set(METHODS[name].values), name
    assert all(list(method.values) == sorted(method.values) for method in METHODS.values())


def test_cache_dit_is_told_that_there_is_no_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dit = pytest.importorskip("cache_dit")
    pipe = ROWS["wan2.1-t2v"].build()
    told, plain = [], cache_dit.DBCacheConfig
    monkeypatch.setattr(cache_dit, "DBCacheConfig", lambda **options: told.append(options) or plain(**options))
    for options in ({}, {"guidance_scale": 5.0}, {"guidance_scale": 1}, {"guidance_scale": None}):
        calibrate_with(pipe, **options)
        with METHODS["cache-dit"].apply(pipe, 0.1, STEPS):
            pass
    assert [options["enable_separate_cfg"] for options in told] == [None, None, False, None]
    # Calls of a kind are compared with each other: at a threshold that is never reached only the warm-up is evaluated.
    calibrate_with(pipe, guidance_scale=1)
    with METHODS["cache-dit"].apply(pipe, 1e9, STEPS), evaluations(pipe) as rows:
        run("wan2.1-t2v", pipe, guidance_scale=1.0)
    assert len(rows) == 1


def test_easycache_expects_what_a_linear_model_does() -> None:
    x, before = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 4, 3, 8, 8)
    v = 3 * before
    expected = (3 * x - v).abs().mean() / v.abs().mean()
    assert easycache_error(3.0, x, before, v) == pytest.approx(float(expected))
    # Of two samples, each in two guidance branches, each has its own.
    pairs = (torch.cat([each, 2 * each] * 2) for each in (x, before, v))
    assert easycache_error(np.array([3.0, 6.0]), *pairs, 2) == pytest.approx(float(expected) * np.array([1, 2]))


def test_teacache_fits_what_it_was_shown() -> None:
    inputs = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    fitted = teacache_polynomial(inputs, [x + 2 * x**3 for x in inputs])
    torch.testing.assert_close(torch.tensor(fitted), torch.tensor([0, 2, 0, 1, 0]).double(), atol=1e-6, rtol=0)
    assert teacache_polynomial([], []).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("easycache", "wan2.1-t2v", 4.0),
        ("teacache", "wan2.1-t2v", 5.0),
        pytest.param("easycache", "ltx2.0-t2v", 1.0, marks=pytest.mark.slow),
        pytest.param("teacache", "ltx2.0-t2v", 1.0, marks=pytest.mark.slow),
    ],
)
def test_each_sample_of_a_batch_is_decided_by_itself(
    pipelines: dict[str, Any], name: str, kind: str, value: float
) -> None:
    method, pipe, plain = _case(pipelines, name, kind)
    prompts = {"a red circle moving right": 0, "green square over stripes": 5}

    def latents(*texts: str) -> tuple[torch.Tensor, list[int]]:
        """What comes out, and of how many rows each evaluated call was."""
        rows: list[int] = []
        last = (getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks)[-1]
        hook = last.attn1.to_q.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
        noise = [torch.Generator().manual_seed(prompts[text]) for text in texts]
        options = dict(height=64, width=64, num_frames=9, guidance_scale=3.0, num_inference_steps=STEPS)
        with torch.no_grad():
            output = pipe(prompt=list(texts), generator=noise, output_type="latent", **options).frames
        hook.remove()
        return output, rows

    with method.apply(pipe, value, STEPS):
        alone = [latents(text) for text in prompts]
        both, rows = latents(*prompts)
        again, _ = latents(*prompts)
    torch.testing.assert_close(both, torch.cat([output for output, _ in alone]), atol=1e-4, rtol=1e-4)
    assert torch.equal(again, both)
    # As many evaluations as alone, at some calls for one sample only.
    assert sum(rows) == sum(sum(each) for _, each in alone) and len(rows) < sum(len(each) for _, each in alone)
    assert len(rows) > max(len(each) for _, each in alone) or len(set(rows)) > 2
    assert equal(run(kind, pipe), plain)
