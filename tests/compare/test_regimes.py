"""Regimes: their numbers against the schedulers' sigmas, and pipelines that come out as they went in."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from heterostep.compare import regimes
from heterostep.compare.measure import Prompt
from heterostep.compare.methods.own import OWN
from heterostep.compare.regimes import REGIMES, Regime, in_regime, named, refuses, suited
from heterostep.compare.run import Settings
from heterostep.errors import HeterostepError
from heterostep.pipeline import check_pipeline, enabled
from rows import ROWS
from small import run, small_pipeline

PROMPTS = [Prompt("a red circle moving right", 0), Prompt("green square over stripes", 1)]


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def expected(regime: Regime, steps: int) -> np.ndarray:
    """The evaluated sigmas as the checkpoints' own code makes them."""
    # Euler evaluates both ends; the others step from the last one to 0, and diffusers begins DPM-Solver++ at 0.999.
    ends = {"euler": (1, 1 / steps), "unipc": (1, 1 / 1000), "dpm": (0.999, 0)}[regime.solver]
    grid = np.linspace(*ends, steps) if regime.solver == "euler" else np.linspace(*ends, steps + 1)[:-1]
    sigmas = shifted(grid, regime.shift)
    if regime.shift_terminal is None:
        return sigmas
    return 1 - (1 - sigmas) * (1 - regime.shift_terminal) / (1 - sigmas[-1])


@pytest.fixture(scope="module")
def pipe() -> Any:
    return small_pipeline()


DPM = named("dpm-20-shift-5-guidance-5")


@pytest.mark.parametrize("regime", [*REGIMES.values(), DPM], ids=lambda regime: regime.name)
@pytest.mark.parametrize("kind", ["wan", "ltx"])
def test_sigmas_are_those_of_the_regime(pipe: Any, regime: Regime, kind: str) -> None:
    # LTX's scheduler shifts by the number of tokens until it is told not to.
    own = pipe.scheduler if kind == "wan" else ROWS["ltx2.0-t2v"].build().scheduler
    scheduler = regimes.scheduler(regime, own)
    for steps in (regime.steps, max(2, regime.steps // 3)):
        scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas.double().numpy()
        assert len(scheduler.timesteps) == steps and len(sigmas) == steps + 1
        np.testing.assert_allclose(sigmas[:-1], expected(regime, steps), atol=2e-6)
        # DPM-Solver++'s, of the shift that is tested.
        begin = 1 - 2e-4 if regime.solver == "dpm" else 1
        assert (np.diff(sigmas) < 0).all() and sigmas[0] == pytest.approx(begin, abs=2e-6) and sigmas[-1] == 0
        if regime.shift_terminal is not None:
            assert sigmas[-2] == pytest.approx(regime.shift_terminal)
    # A pipeline that gives sigmas of its own, as LTX's and HunyuanVideo's do, gets the same by Euler.
    if regime.solver == "euler":
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / regime.steps, regime.steps), mu=1.7)
        np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), expected(regime, regime.steps), atol=2e-6)


@pytest.mark.parametrize("regime", REGIMES.values(), ids=lambda regime: regime.name)
def test_a_pipeline_comes_out_as_it_was(pipe: Any, regime: Regime) -> None:
    scheduler, config = pipe.scheduler, dict(pipe.config)
    with pytest.raises(KeyboardInterrupt), in_regime(pipe, regime) as options:
        check_pipeline(pipe)
        assert options["guidance_scale"] == regime.guidance and options["num_inference_steps"] == regime.steps
        assert (pipe.transformer_2 is not None) == (regime.boundary is not None) == ("guidance_scale_2" in options)
        assert pipe.config.boundary_ratio == regime.boundary
        raise KeyboardInterrupt
    assert pipe.scheduler is scheduler and dict(pipe.config) == config and pipe.transformer_2 is None


def test_numbers_and_names() -> None:
    assert all(name == regime.name and regime.source and regime.tasks for name, regime in REGIMES.items())
    assert REGIMES["wan2.2-t2v-a14b"].text == "UniPC 40, shift 12, guidance 4 and 3, two experts at 0.875"
    assert REGIMES["ltx-2"].text == "Euler 40, shift 7.8, terminal 0.1, guidance 3"
    assert "wan2.1-i2v-480p" not in {regime.name for regime in suited("text")}
    assert {regime.name for regime in suited("text")} | {regime.name for regime in suited("image")} == set(REGIMES)
    assert json.loads(json.dumps(REGIMES["lightx2v"].numbers)) == {
        "solver": "euler", "steps": 4, "shift": 5, "guidance": 1,
    }  # fmt: skip
    dpm_to_terminal = {"solver": "dpm", "shift_terminal": 0.1}
    for wrong in (
        dpm_to_terminal,
        {"solver": "heun"},
        {"steps": 0},
        {"shift": 0},
        {"boundary": 1.5},
        {"guidance_2": 3.0},
    ):
        with pytest.raises(HeterostepError, match="is not possible"):
            Regime(**{"name": "x", "label": "", "solver": "euler", "steps": 4, "shift": 5, "guidance": 1, **wrong})


def test_a_name_may_give_the_numbers() -> None:
    assert named("lightx2v") is REGIMES["lightx2v"]
    own = named("euler-25-shift-7.5-guidance-5-terminal-0.1-experts-0.9")
    assert (own.solver, own.steps, own.shift, own.guidance) == ("euler", 25, 7.5, 5)
    assert (own.shift_terminal, own.boundary, own.guidance_2) == (0.1, 0.9, None) and set(own.tasks) == {
        "text",
        "image",
    }
    assert own.label == own.text == "Euler 25, shift 7.5, terminal 0.1, guidance 5, two experts at 0.9"
    assert DPM.text == "DPM-Solver++ 20, shift 5, guidance 5"
    for wrong in (
        "wan",
        "heun-20-shift-5-guidance-5",
        "euler-20-shift--5-guidance-5",
        "euler-20-guidance-5-shift-5",
        "",
    ):
        with pytest.raises(HeterostepError, match="no such regime: .*as in euler-25-shift-7-guidance-5"):
            named(wrong)
    for wrong in ("euler-0-shift-5-guidance-5", "euler-9-shift-0-guidance-5", "unipc-9-shift-5-guidance-5-experts-2"):
        with pytest.raises(HeterostepError, match="is not possible"):
            named(wrong)


def test_both_experts_are_run_and_share_their_weights(pipe: Any) -> None:
    plain = run(pipe)
    regime = Regime("two", "", "unipc", 12, 3, 3, boundary=0.8, guidance_2=3)
    alone = Regime("one", "", "unipc", 12, 3, 3)
    with in_regime(pipe, alone):
        one = run(pipe)
    called = []
    with in_regime(pipe, regime) as options:
        first, second = pipe.transformer, pipe.transformer_2
        hooks = [m.register_forward_pre_hook(lambda module, args: called.append(module)) for m in (first, second)]
        options.pop("num_inference_steps")
        two = run(pipe, **options)
        for hook in hooks:
            hook.remove()
    assert called.count(first) + called.count(second) == 24 and min(called.count(first), called.count(second)) > 0
    assert first is not second and all(a is b for a, b in zip(first.parameters(), second.parameters()))
    # The same weights, so the same video; and it is made once.
    assert torch.equal(one, two) and torch.equal(run(pipe), plain)
    with in_regime(pipe, regime):
        assert pipe.transformer_2 is second


def test_a_model_with_two_experts_keeps_them() -> None:
    pipe = ROWS["wan2.2-t2v"].build()
    experts, boundary = (pipe.transformer, pipe.transformer_2), pipe.config.boundary_ratio
    for name in ("wan2.2-i2v-a14b", "bundled"):
        with in_regime(pipe, REGIMES[name]) as options:
            assert (pipe.transformer, pipe.transformer_2) == experts and pipe.config.boundary_ratio == boundary
            assert ("guidance_scale_2" in options) == (name != "bundled")
        assert (pipe.transformer, pipe.transformer_2) == experts and pipe.config.boundary_ratio == boundary


def test_what_cannot_be_is_refused_in_one_line(pipe: Any) -> None:
    assert refuses(pipe, REGIMES["wan2.2-t2v-a14b"]) is None
    ltx, hunyuan = ROWS["ltx2.0-t2v"].build(), ROWS["hunyuan1.5-t2v"].build()
    assert refuses(ltx, REGIMES["ltx-2"]) is None
    for other, name in ((ltx, "wan2.2-t2v-a14b"), (hunyuan, "hunyuan1.5-480p"), (object(), "bundled")):
        with pytest.raises(HeterostepError) as caught, in_regime(other, REGIMES[name]):
            pass
        assert "\n" not in str(caught.value)
    low = ROWS["wan2.2-t2v"].build()
    low.transformer = None
    assert "second alone" in str(refuses(low, REGIMES["wan2.2-t2v-a14b"]))


def test_heterostep_runs_in_every_kind_of_regime(pipe: Any) -> None:
    for name in ("ltx-2", "wan2.2-t2v-a14b", "20-steps", DPM.name):
        with in_regime(pipe, named(name)) as options, enabled(pipe, share=0.5):
            steps = options.pop("num_inference_steps")
            assert run(pipe, steps, **options).isfinite().all()


def test_a_folder_of_regimes_goes_on(pipe: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from heterostep.compare import run as module
    from heterostep.compare.matrix import compare_regimes

    methods = [method for method in OWN if method.name in ("heterostep", "steps")]
    sizes = {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3.0, "num_inference_steps": 12}
    settings = Settings("small", "text", sizes, (0.5,), 16, shown=0, batch=2)
    two = [
        Regime("one", "", "unipc", 6, 3, 3),
        Regime("two", "", "euler", 6, 5, 2, boundary=0.8, guidance_2=1.5),
    ]
    made: list[Any] = []
    plain = module.generate

    def interrupted(*arguments: Any) -> Any:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare_regimes(pipe, PROMPTS, methods, two, settings, tmp_path)
    assert pipe.transformer_2 is None and (tmp_path / "one" / "index.html").is_file()
    rest: list[Any] = []
    monkeypatch.setattr(module, "generate", lambda *a: rest.append(a) or plain(*a))
    told: list[str] = []
    written = compare_regimes(pipe, PROMPTS, methods, two, settings, tmp_path, "again", told.append)
    # Dense, dense from another seed, and two methods in each regime.
    assert written == tmp_path / "index.html" and len(made) + len(rest) == 2 * 4
    assert rest[-1][-1] | {"guidance_scale": 2, "guidance_scale_2": 1.5, "num_inference_steps": 6} == rest[-1][-1]
    assert "regime 2 of 2: two (Euler 6" in " ".join(told)
    content = json.loads((tmp_path / "matrix.json").read_text())
    assert [(row["regime"], row["share"]) for row in content["rows"]] == [
        (name, share) for name in ("one", "two") for share in (0.75, 0.5, 0.25)
    ]
    assert content["rows"][1]["ours"]["psnr"] > 0 and content["rows"][1]["ours"]["found"] == "measured"
    # Another process on another regime, and none that cannot be.
    compare_regimes(
        pipe, PROMPTS, methods, [REGIMES["lightx2v"], few := named("dpm-4-shift-5-guidance-1")], settings, tmp_path
    )
    content = json.loads((tmp_path / "matrix.json").read_text())
    assert list(content["regimes"]) == ["lightx2v", few.name, "one", "two"]
    assert content["regimes"][few.name]["text"] == few.text and "6 steps" in content["regimes"]["one"]["text"]
    other = tmp_path / "other"
    with pytest.raises(HeterostepError, match="two experts"):
        compare_regimes(ROWS["ltx2.0-t2v"].build(), PROMPTS, methods, two, settings, other)
    assert not other.exists()
