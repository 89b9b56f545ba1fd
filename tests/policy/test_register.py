"""Policies and families from outside of the package."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

import heterostep
from heterostep.compare.measure import Prompt, generate
from heterostep.compare.methods.own import heterostep_method
from heterostep.errors import HeterostepError
from heterostep.models import FAMILIES, Checkpoint, known_checkpoints
from heterostep.models.wan import WanAdapter
from heterostep.policy import Policy
from small import run, small_pipeline


class EveryThird(Policy):
    """All tokens at every third step, velocities held; the page on the method shows it."""

    name, sparse = "every-third", False

    def replan(self, evaluations, step, changes=(), spend_remainder=True):
        total = self.run.tokens.total
        return [total if at % 3 == 0 else self.run.tokens.least for at in range(step, self.run.num_steps)]


@pytest.fixture
def every_third():
    heterostep.register_policy(EveryThird)


def test_a_policy_of_ones_own(every_third):
    pipe = small_pipeline()
    with heterostep.enabled(pipe, share=0.34, policy="every-third"):
        run(pipe)
    report = heterostep.report(pipe)
    assert report.active_share == [1, 0, 0] * 4 and report.policy == "every-third"
    heterostep.enable(pipe, share=0.2, policy="every-third")
    with pytest.raises(HeterostepError, match="dense steps: 4"):
        run(pipe)


def test_what_a_policy_gives_as_the_run_goes_is_checked_too(every_third, monkeypatch):
    def replan(self, evaluations, step, *rest):
        return [self.run.tokens.total, 0, 0] * (4 if step == 0 else 2)

    monkeypatch.setattr(EveryThird, "replan", replan)
    monkeypatch.setattr(EveryThird, "adapts", True)
    pipe = small_pipeline()
    with (
        heterostep.enabled(pipe, share=0.4, policy="every-third"),
        pytest.raises(HeterostepError, match="^policy='every-third' is for 9 steps, but the run has 12$"),
    ):
        run(pipe)
    assert heterostep.report(pipe).active_share == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("weight", 0.5, r"weight gave 0.5, which should be a tensor \[1\]"),
        ("weight", torch.tensor(0.5), r"weight gave Tensor \[\], which should be a tensor \[1\]"),
        ("rank", np.zeros((1, 48)), r"rank gave ndarray \[1, 48\], which should be a tensor \[1, 48\]"),
        ("rank", None, r"rank gave None, which should be a tensor \[1, 48\]"),
        ("rank", torch.zeros(48), r"rank gave Tensor \[48\], which should be a tensor \[1, 48\]"),
        ("replans_from", 2.5, "replans_from gave 2.5, which should be 0 or a later step"),
        ("replans_from", -1, "replans_from gave -1, which should be 0 or a later step"),
    ],
)
def test_what_its_other_methods_give_is_checked(every_third, monkeypatch, method, given, message):
    def replan(self, evaluations, step, *rest):
        return ([self.run.tokens.total] * 2 + [24] * 10)[step:]

    monkeypatch.setattr(EveryThird, "replan", replan)
    monkeypatch.setattr(EveryThird, "sparse", True)
    monkeypatch.setattr(EveryThird, "adapts", True)
    monkeypatch.setattr(EveryThird, method, lambda *_: given)
    pipe = small_pipeline()
    with (
        heterostep.enabled(pipe, share=0.6, policy="every-third"),
        pytest.raises(HeterostepError, match=f"^policy='every-third': {message}$"),
    ):
        run(pipe)


def test_a_class_that_cannot_run_is_not_registered():
    class Inherits(EveryThird):
        pass

    class Unnamed(EveryThird):
        name = ""

    class Unfinished(Policy):
        name = "unfinished"

    known = dict(heterostep.policy.POLICIES)
    for policy, message in (
        (Inherits, ".* with a name of its own, which Inherits lacks"),
        (Unnamed, ".* with a name of its own, which Unnamed lacks"),
        (Unfinished, "Unfinished lacks methods: replan"),
        (dict, "register_policy wants a class derived from heterostep.policy.Policy, not <class 'dict'>"),
    ):
        with pytest.raises(HeterostepError, match=f"^{message}$"):
            heterostep.register_policy(policy)
    assert known == heterostep.policy.POLICIES


def test_it_is_compared_like_any_other(every_third):
    method = heterostep_method("mine", "every third step", policy="every-third")
    options = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 12, "guidance_scale": 3.0}
    pipe, prompts = small_pipeline(), [Prompt("a red circle", 0)]
    dense = generate(pipe, prompts, None, 1.0, options)
    assert generate(pipe, prompts, method, 0.34, options).rows == pytest.approx(dense.rows / 3)


def test_an_unknown_policy_names_those_there_are():
    with pytest.raises(HeterostepError, match="policy must be one of auto, hsa"):
        heterostep.enable(small_pipeline(), share=0.5, policy="best")
    for wrong in (object, Policy, 3):
        with pytest.raises(HeterostepError, match="class derived from"):
            heterostep.register_policy(wrong)


class MyTransformer(WanTransformer3DModel):
    pass


class MyPipeline(WanPipeline):
    pass


def test_a_family_of_ones_own():
    pipe = small_pipeline()
    pipe.transformer.__class__ = MyTransformer
    pipe.__class__ = MyPipeline
    with pytest.raises(HeterostepError, match="MyPipeline with MyTransformer is not supported"):
        heterostep.enable(pipe, share=0.5)
    saved_as = {"MyPipeline": Checkpoint("MyPipeline", None, 12)}
    heterostep.register_family("MyTransformer", WanAdapter(), ("MyPipeline",), saved_as)
    try:
        assert known_checkpoints()["MyPipeline"].fps == 12
        plain = run(pipe)
        with heterostep.enabled(pipe, share=1.0):
            assert torch.equal(run(pipe), plain)
        with heterostep.enabled(pipe, share=0.6, sparse_share=0.4):
            run(pipe)
        assert heterostep.report(pipe).share.achieved == pytest.approx(0.6, abs=0.01)
    finally:
        del FAMILIES["MyTransformer"]
    assert "MyPipeline" not in known_checkpoints()
    for wrong in (("X", WanAdapter(), ()), ("X", WanAdapter, ("P",)), ("X", WanAdapter(), "P")):
        with pytest.raises(HeterostepError, match="register_family wants"):
            heterostep.register_family(*wrong)
