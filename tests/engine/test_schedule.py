import re
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heterostep.config import HSAConfig
from heterostep.engine.schedule import Schedule, evaluations_within
from heterostep.errors import HeterostepError
from heterostep.policy import POLICIES, Change, Policy, Run, Tokens
from heterostep.policy.hsa import by_divisors
from heterostep.sigmas import nominal_sigmas


def schedule(num_steps=40, tokens=None, restarts=(), from_frames=False, **options):
    run = Run(nominal_sigmas(num_steps), tokens or Tokens(640), restarts, from_frames)
    return Schedule(HSAConfig(**options), run)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"policy": "hsa", "dense_start": 2}, 2 + 5), ({}, 1), ({"dense_start": 3}, 3), ({"sparse_share": 0.3}, 1)],
)
def test_lowest_share_is_the_boundary_of_what_is_feasible(options, expected):
    lowest = schedule(share=0.25, **options).lowest_share
    assert lowest == pytest.approx(expected / 40)
    schedule(share=lowest, **options).check()
    with pytest.raises(HeterostepError, match="lowest possible"):
        schedule(share=lowest - 0.001, **options).check()
    with pytest.raises(HeterostepError, match="runtime=0.01"):
        schedule(runtime=0.01).check()


@pytest.mark.parametrize("dial", ["share", "runtime"])
@pytest.mark.parametrize("num_steps", [1, 8, 14, 40])
@pytest.mark.parametrize(
    "options",
    [{}, {"policy": "hsa"}, {"policy": "hsa", "dense_end": 2}, {"divisors": (3,)}, {"round_robin": 3}],
    ids=["auto", "hsa", "dense-end", "divisors", "round-robin"],
)
def test_the_lowest_target_that_is_told_can_be_met_and_so_can_all_above(options, num_steps, dial):
    with pytest.raises(HeterostepError) as caught:
        schedule(num_steps, **{dial: 0.001}, **options).check()
    lowest = float(re.search(r"lowest possible (\S+) ", str(caught.value))[1])
    for target in np.linspace(lowest, 1, 50):
        schedule(num_steps, **{dial: target}, **options).check()
    with pytest.raises(HeterostepError, match=f"lowest possible {lowest:g} "):
        schedule(num_steps, **{dial: lowest - 0.001}, **options).check()


class Given(Policy):
    """The counts that a test gives."""

    name = "given"
    counts: ClassVar[list]

    def replan(self, evaluations, step, changes=(), spend_remainder=True):
        return None if self.counts is None else self.counts[step:]


@pytest.fixture
def given_counts(monkeypatch):
    monkeypatch.setitem(POLICIES, "given", Given)
    return lambda counts: monkeypatch.setattr(Given, "counts", counts, raising=False)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([0, 0, 0, 0], "must be dense at step 0: there is no velocity"),
        ([640, 640, 0, 640], "must be dense at step 2: there the second"),
        ([640, -1, 640, 0], "evaluates -1 tokens at step 1, which should be a whole number, 0 to 640"),
        ([640, 640, 640, 641], "evaluates 641 tokens at step 3"),
        ([640, 640, 640, 2.5], "evaluates 2.5 tokens at step 3"),
        (None, "gives None for a plan"),
        ([640, 640], "is for 2 steps, but the run has 4"),
        ([640, 640, 640, 0, 0], "is for 5 steps, but the run has 4"),
        ([640, 5, 640, 5], r"needs two dense steps before the first sparse one \(step 1\), to rank tokens"),
    ],
)
def test_a_policy_that_gives_no_plan_is_told_so(given_counts, counts, message):
    made = schedule(4, restarts=(2,), share=0.5, policy="given")
    given_counts(counts)
    with pytest.raises(HeterostepError, match=f"^policy='given' {message}") as caught:
        made.check()
    assert caught.value.field == "policy" and "\n" not in str(caught.value)
    for planned_anew in (
        lambda: made.within_share([640], 1, []),
        lambda: made.within_seconds([640], 1, [], 1000.0, float),
    ):
        if counts is None or counts[0] == 640:
            with pytest.raises(HeterostepError, match=f"^policy='given' {message}"):
                planned_anew()


def test_counts_of_a_policy_may_be_of_another_kind_of_whole_number(given_counts):
    given_counts(np.array([640, 640, 5, 0]))
    made = schedule(4, share=0.9, policy="given")
    made.check()
    assert made.plan() == [640, 640, 5, 0] and {type(count) for count in made.plan()} == {int}


@given(
    options=st.sampled_from(
        [
            {},
            {"sparse_share": 0.4},
            {"dense_start": 3, "dense_end": 2},
            {"policy": "hsa"},
            {"policy": "hsa", "dense_end": 1},
            {"divisors": (3,)},
            {"round_robin": 4},
            {"round_robin": 2, "dense_start": 1},
        ]
    ),
    num_steps=st.integers(1, 60),
    target=st.floats(0.001, 1.0),
    dial=st.sampled_from(["share", "runtime"]),
    restart=st.none() | st.integers(1, 59),
    least=st.integers(0, 1),
    step=st.integers(0, 59),
    seconds=st.floats(0.0, 60.0),
)
def test_what_the_policies_give_are_plans(options, num_steps, target, dial, restart, least, step, seconds):
    restarts = () if restart is None or restart >= num_steps else (restart,)
    made = schedule(num_steps, Tokens(640, least), restarts, **{dial: target}, **options)
    counts = made.plan()
    begin = made.anew_from(counts, min(step, num_steps - 1))
    if begin is not None:
        made.within_share(counts, begin, [])
        counts = made.within_seconds(counts, begin, [], seconds, lambda count: 0.01 + count / 640)
    Schedule(HSAConfig(share=[count / 640 for count in counts], **options), made.run).check()


def test_a_target_that_the_window_is_too_late_for_begins_it_earlier():
    early, wanted = (schedule(10, share=share, divisors=(3,)) for share in (0.59, 0.6))
    assert early.policy.window == (2, 10) and wanted.policy.window == (3, 10)
    assert sum(early.plan()) == 5 * 640 and sum(wanted.plan()) == 6 * 640
    with pytest.raises(HeterostepError, match=r"0\.4 for 10 steps \(dense steps: 1, then one in 3\)"):
        schedule(10, share=0.1, divisors=(3,)).check()


def test_a_replay_needs_one_share_a_step_and_dense_ones_to_go_by():
    config = HSAConfig(share=[1, 1, 0.5, 0])
    assert config.target == pytest.approx(0.625)
    schedule(4, share=[1, 1, 0.5, 0]).check()
    schedule(4, share=[1, 0, 0, 1]).check()
    with pytest.raises(HeterostepError, match="share is for 4 steps, but the run has 5"):
        schedule(5, share=[1, 1, 0.5, 0]).check()
    with pytest.raises(HeterostepError, match="^share must be 1 at step 0"):
        schedule(3, share=[0, 1, 1]).check()
    with pytest.raises(HeterostepError, match=r"needs two dense steps before the first sparse one \(step 2\)"):
        schedule(4, share=[1, 0, 0.5, 1]).check()


def test_a_replay_may_leave_out_what_each_step_evaluates_at_the_least():
    """LTX-2's sound runs at every step: that takes no ranking."""
    tokens = Tokens(640, least=1)
    made = schedule(4, tokens, share=[1, 1 / 640, 1, 0])
    made.check()
    assert made.plan() == [640, 1, 640, 1]


def test_sigmas_that_rise_are_refused():
    rising = Schedule(HSAConfig(share=0.5), Run((0.0, 0.5, 1.0)))
    with pytest.raises(HeterostepError, match="^the first sigma is 1.2: give sigmas from 1"):
        Schedule(HSAConfig(share=0.5), Run((1.2, 1.0, 0.5, 0.0), Tokens(640))).check()
    with pytest.raises(HeterostepError, match="sigmas must fall"):
        rising.check()


@pytest.mark.parametrize("policy", ["auto", "hsa"])
def test_the_second_expert_costs_one_dense_step(policy):
    two = schedule(share=0.5, policy=policy, restarts=(13,), tokens=Tokens(100))
    assert two.lowest_share > schedule(share=0.5, policy=policy).lowest_share
    counts = two.plan()
    assert counts[13] == 100 and counts[:2] == [100, 100] and sum(counts) == 2000
    with pytest.raises(HeterostepError, match="second transformer"):
        schedule(share=0.01, policy=policy, restarts=(13,)).check()
    with pytest.raises(HeterostepError, match="must be 1 at step 2"):
        schedule(4, share=[1, 1, 0.5, 0.5], restarts=(2,)).check()


@pytest.mark.parametrize("options", [{}, {"sparse_share": 0.3}, {"policy": "hsa"}, {"round_robin": 4}])
def test_what_is_behind_is_not_corrected(options):
    made = schedule(runtime=0.5, dense_end=2, **options)
    counts = made.plan()
    begins = [made.anew_from(counts, step) for step in range(40)]
    begin = next(begin for begin in begins if begin is not None and begin > 12)
    again = made.within_seconds(counts, begin, [], 8000.0, float)
    assert again[:begin] == counts[:begin] and len(again) == 40 and again[-2:] == [640, 640]
    assert 8000 - 640 <= sum(again[begin:]) <= 8000


def test_a_gap_in_which_tokens_run_alone_stays_as_its_kv_were_kept():
    whole, single = schedule(share=0.5), schedule(share=0.5, sparse_share=0.3)
    for made in (whole, single):
        counts = made.plan()
        dense = [step for step, count in enumerate(counts) if count == 640]
        first, second = dense[4:6]
        assert made.anew_from(counts, first) == (first if made is whole else second)
        assert made.anew_from(counts, next(s for s, c in enumerate(counts) if c < 640)) is None
    assert schedule(share=0.5, policy="hsa").replans is False
    # Where every step has tokens of its own, the second goes without K and V if the third is dense.
    sound = schedule(share=0.5, tokens=Tokens(640, least=1))
    assert [sound.anew_from([640] * 5 + [1] * 35, step) for step in (0, 1, 2)] == [0, 2, 2]
    assert sound.anew_from([640, 640, 1, 1, 640] + [1] * 35, 1) == 4
    assert schedule(share=[1.0] * 40).replans is False


def test_seconds_buy_whole_steps():
    """Each step that is not empty has a fixed cost; what is left over never costs a whole step."""
    made, total = schedule(runtime=0.5, tokens=Tokens(75_600)), 75_600

    def cost(count):
        return 1.0 if count == total else 0.01

    for budget in (5.4, 8.4, 9.4, 16.3, 27.2):
        counts = made.within_seconds(made.plan(), 0, [Change(0, 1, 0.3)], budget, cost)
        assert sum(map(cost, counts)) <= budget
        assert sum(count == total for count in counts) == int(budget)


def test_seconds_that_turn_out_to_be_left_are_spent():
    """A timed run whose plan gave up its dense steps gets them when skipped ones prove cheap."""
    tokens = Tokens(640, least=1)

    def cost(count):
        return 0.1 + 0.9 * count / 640

    made = schedule(20, runtime=0.5, tokens=tokens)
    counts = [640] * 5 + [1] * 15
    assert made.has_no_dense_ahead(counts, 9) and not made.has_no_dense_ahead(counts, 3)
    assert not schedule(20, share=0.5, tokens=tokens).has_no_dense_ahead(counts, 9)
    for seconds, dense in ((3.0, 2), (1.7, 0), (1.2, 0)):
        new = made.with_seconds_left(counts, 10, [], seconds, cost)
        ahead = new[10:]
        assert new[:10] == counts[:10] and ahead.count(640) == dense
        assert sum(map(cost, ahead)) <= seconds + 1e-9
        if dense:
            assert ahead[0] == 640 and sum(map(cost, ahead)) > seconds - 0.9
        else:
            # What is less than a dense step is left.
            assert new == counts
    # Whole steps alone: what is less than one is left.
    whole = schedule(20, runtime=0.5)
    counts = [640] * 5 + [0] * 15
    assert whole.with_seconds_left(counts, 10, [], 0.8, lambda count: count / 640) == counts


def test_where_fewer_steps_are_better_a_run_says_so():
    assert "4 steps may give" in schedule(8, share=0.5, from_frames=True).advice
    for steps, share, from_frames in ((9, 0.5, True), (8, 1, True), (8, 0.5, False)):
        assert schedule(steps, share=share, from_frames=from_frames).advice is None


def test_a_budget_in_seconds_is_met_from_below():
    def cost(count):
        return 0.01 + count / 100 if count else 0.0

    def plan(evaluations):
        return by_divisors(evaluations, Tokens(100), 30, (1, 2, 4, 8))

    for seconds in (5.0, 9.5, 14.0, 100.0):
        evaluations = evaluations_within(seconds, cost, 3000, plan)
        assert sum(map(cost, plan(evaluations))) <= seconds
        if evaluations < 3000:
            assert sum(map(cost, plan(evaluations + 1))) > seconds
