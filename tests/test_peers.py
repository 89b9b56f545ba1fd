"""Every other accelerator on small pipelines: neutral where it should be, faster where it says, and gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from heterostep.compare import peers
from heterostep.compare.method import Method
from rows import ROWS, equal, transformers

STEPS = 12
PIPELINES = ("wan2.1-t2v", "wan2.2-i2v", "ltx2.0-t2v")
# What leaves a run as it is.
NEUTRAL = {"uniform": 1.0, "taylorseer": 1, "pab": 1}
# Random weights change much more from step to step than trained ones: thresholds that skip there skip nothing here.
FASTEST = {
    "uniform": 0.4,
    "easycache": 20.0,
    "teacache": 5.0,
    "first-block-cache": 2.0,
    "magcache": 2.0,
    "cache-dit": 2.0,
}
METHODS = {method.name: method for method in peers.PEERS}
# What diffusers' and cache-dit's code cannot do, tried; the others run everywhere.
REFUSED = {(name, "ltx2.0-t2v") for name in ("first-block-cache", "magcache", "cache-dit")}
CASES = [(name, kind) for name in METHODS for kind in PIPELINES if (name, kind) not in REFUSED]


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """Each with its plain output of seed 0; that it stays this is what most tests are about."""
    built = {}
    for kind in PIPELINES:
        pipe = ROWS[kind].build()
        peers.calibrate_with(pipe, height=64, width=64, num_frames=9)
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


@pytest.mark.parametrize(("name", "kind"), CASES)
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


@pytest.mark.parametrize(("name", "kind"), CASES)
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
        ("wan2.1-v2v", {"uniform", "first-block-cache", "magcache", "taylorseer"}),
        ("wan2.1-vace", {"teacache", "first-block-cache", "magcache"}),
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


def test_calibration_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ROWS["wan2.1-t2v"].build()
    runs = []
    dense_run = peers._dense_run
    monkeypatch.setattr(peers, "_dense_run", lambda *args: (runs.append(args), dense_run(*args)))
    peers.calibrate_with(pipe, height=64, width=64, num_frames=9)
    for num_steps in (4, 4, 6):
        for name in ("teacache", "magcache"):
            METHODS[name].apply(pipe, 0.1, num_steps)
    assert len(runs) == 4
    peers.calibrate_with(pipe, height=64, width=64, num_frames=9)
    METHODS["teacache"].apply(pipe, 0.1, 4)
    assert len(runs) == 4


def test_easycache_expects_what_a_linear_model_does() -> None:
    x, before = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 4, 3, 8, 8)
    v = 3 * before
    expected = (3 * x - v).abs().mean() / v.abs().mean()
    assert peers.easycache_error(3.0, x, before, v) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("share", "num_steps", "restarts"), [(0.5, 40, ()), (0.25, 40, ()), (0.3, 50, (17,)), (0.75, 12, (5,)), (1, 8, ())]
)
def test_uniform_steps_are_even_and_within_budget(share: float, num_steps: int, restarts: tuple[int, ...]) -> None:
    pattern = peers.uniform_pattern(share, num_steps, restarts)
    assert len(pattern) == num_steps and pattern[:2] == [1, 1]
    assert sum(pattern) == int(share * num_steps + 1e-6)
    assert all(pattern[step] == 1 for step in restarts)
    evaluated = [step for step, one in enumerate(pattern) if one] + [num_steps]
    assert max(b - a for a, b in zip(evaluated, evaluated[1:])) <= 8


def test_teacache_fits_what_it_was_shown() -> None:
    inputs = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    fitted = peers.teacache_polynomial(inputs, [x + 2 * x**3 for x in inputs])
    torch.testing.assert_close(torch.tensor(fitted), torch.tensor([0, 2, 0, 1, 0]).double(), atol=1e-6, rtol=0)
    assert peers.teacache_polynomial([], []).tolist() == [1, 0]
