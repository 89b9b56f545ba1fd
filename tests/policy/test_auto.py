"""Plans of equal change, alone: budgets, monotony, restarts, and a made-up profile of change that is met."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heterostep.config import HSAConfig
from heterostep.engine.schedule import Schedule
from heterostep.policy import Change, Run, Tokens, make
from heterostep.policy.auto import LEVEL
from heterostep.sigmas import nominal_sigmas

TOTAL = 320


def auto(num_steps=40, shift=5.0, tokens=None, restarts=(), from_frames=False, **options):
    run = Run(nominal_sigmas(num_steps, shift), tokens or Tokens(TOTAL), restarts, from_frames)
    return make(HSAConfig(share=0.5, **options), run)


def dense(counts, total=TOTAL):
    return [step for step, count in enumerate(counts) if count == total]


steps_and_shares = given(
    num_steps=st.integers(1, 100), share=st.floats(0.01, 1.0), shift=st.floats(1.0, 16.0), least=st.sampled_from([0, 1])
)


@steps_and_shares
def test_in_seconds_there_are_whole_steps_alone(num_steps, share, shift, least):
    """A call of a new size takes longer than its tokens do, so what is less than a dense step is left."""
    policy = auto(num_steps, shift, Tokens(TOTAL, least))
    counts = policy.replan(int(share * num_steps * TOTAL), 0, spend_remainder=False)
    assert set(counts) <= {least, TOTAL}


@steps_and_shares
def test_every_budget_is_spent(num_steps, share, shift, least):
    """In whole steps, the most that fit; on LTX-2, where every step runs something, to the last evaluation."""
    policy = auto(num_steps, shift, Tokens(TOTAL, least), sparse_share=0)
    budget = int(share * num_steps * TOTAL)
    counts, lowest = policy.plan(budget), sum(policy.plan(0))
    assert len(counts) == num_steps and counts[0] == TOTAL
    assert all(least <= count <= TOTAL for count in counts)
    if least:
        assert sum(counts) == max(budget, lowest)
    else:
        assert set(counts) <= {0, TOTAL}
        assert sum(counts) == max(budget // TOTAL * TOTAL, lowest)


@given(num_steps=st.integers(2, 60), share=st.floats(0.1, 1.0), from_frames=st.booleans())
def test_single_tokens_get_what_whole_steps_leave_where_that_is_much(num_steps, share, from_frames):
    """A twentieth of them or more, and half of the steps or more dense; two dense steps come before, to rank tokens."""
    run = Run(nominal_sigmas(num_steps, 5.0), Tokens(TOTAL), from_frames=from_frames)
    schedule = Schedule(HSAConfig(share=share), run)
    whole, left = divmod(schedule.budget, TOTAL)
    if not whole:
        return
    much = whole >= max(2, num_steps / 2) and left >= TOTAL * max(whole * (1 / 20), 1 / 8)
    assert schedule.policy.sparse is much
    counts = schedule.plan()
    for step in (0, *dense(counts)[1:]):
        changes = [Change(a, b, 0.3) for a, b in zip(dense(counts[: step + 1]), dense(counts[: step + 1])[1:])]
        if (begin := schedule.anew_from(counts, step)) is not None:
            counts = schedule.within_share(counts, begin, changes)
        some = [at for at, count in enumerate(counts) if 0 < count < TOTAL]
        second = ([*dense(counts), num_steps, num_steps])[1]
        room = 0 in counts[second:] or bool(some)
        assert sum(counts) == (schedule.budget if much and room else whole * TOTAL)
        assert len(some) == (much and room) and all(at > second for at in some)
    assert schedule.leave_out_single_tokens() and set(schedule.plan()) <= {0, TOTAL}


@given(num_steps=st.integers(4, 60), share=st.floats(0.2, 1.0), sparse_share=st.floats(0.05, 1.0))
def test_with_single_tokens_the_last_evaluation_is_spent(num_steps, share, sparse_share):
    policy = auto(num_steps, sparse_share=sparse_share)
    budget = int(share * num_steps * TOTAL)
    counts = policy.plan(budget)
    if budget < 2 * TOTAL:
        # There is no change that tokens could be ranked by.
        assert counts == [TOTAL, *[0] * (num_steps - 1)]
        return
    assert sum(counts) == max(budget, sum(policy.plan(0)))
    assert all(0 <= count <= TOTAL for count in counts)


@given(
    num_steps=st.integers(1, 12),
    share=st.floats(0.1, 1.0),
    sparse_share=st.floats(0.05, 1.0),
    start=st.integers(1, 3),
    end=st.integers(0, 3),
)
def test_a_plan_with_single_tokens_can_be_replayed_and_keeps_its_share(num_steps, share, sparse_share, start, end):
    options = {"sparse_share": sparse_share, "dense_start": start, "dense_end": end}
    run = Run(nominal_sigmas(num_steps), Tokens(TOTAL))
    schedule = Schedule(HSAConfig(share=share, **options), run)
    if share < schedule.lowest_share:
        return
    counts = schedule.plan()
    assert sum(counts) <= share * num_steps * TOTAL + 1e-6
    shares = [count / TOTAL for count in counts]
    Schedule(HSAConfig(share=shares), run).check()


@given(num_steps=st.integers(2, 100), shift=st.floats(1.0, 16.0), exponent=st.floats(0.6, 2.2))
def test_more_evaluations_make_no_gap_longer(num_steps, shift, exponent):
    policy = auto(num_steps, shift)
    passed = np.concatenate([[0.0], np.cumsum(policy.counted(exponent, 0))])

    def widest(number):
        steps = [*policy.dense_steps(number, 0, exponent, {0}), num_steps]
        assert len(steps) == number + 1 and steps == sorted(set(steps)) and steps[0] == 0
        # A step is the smallest gap there is.
        return max((passed[b] - passed[a] for a, b in zip(steps, steps[1:]) if b - a > 1), default=0.0)

    widths = [widest(number) for number in range(1, num_steps + 1)]
    largest = policy.counted(exponent, 0).max()
    assert all(later <= earlier + largest for earlier, later in zip(widths, widths[1:]))
    assert widths[-1] == 0


@given(
    num_steps=st.integers(8, 60),
    restarts=st.sets(st.integers(2, 59), max_size=2),
    share=st.floats(0.2, 0.9),
    begin=st.integers(0, 30),
)
def test_restarts_are_dense_from_wherever_it_is_planned(num_steps, restarts, share, begin):
    restarts = tuple(sorted(step for step in restarts if step < num_steps))
    begin = min(begin, num_steps - 1)
    policy = auto(num_steps, restarts=restarts)
    counts = policy.replan(int(share * (num_steps - begin) * TOTAL), begin)
    assert len(counts) == num_steps - begin and counts[0] == TOTAL
    assert all(counts[step - begin] == TOTAL for step in restarts if step >= begin)


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0, 16.0])
@pytest.mark.parametrize("exponent", [0.9, 1.3, 1.7])
def test_a_made_up_profile_is_met_with_equal_changes(shift, exponent):
    """Velocities change by a law of their own level and exponent; from the second evaluation on that is measured."""
    schedule = Schedule(HSAConfig(share=0.4), Run(nominal_sigmas(50, shift), Tokens(TOTAL)))
    policy = schedule.policy
    true = np.concatenate([[0.0], np.cumsum(1.3 * LEVEL * policy.rates(exponent))])
    counts, changes, last = schedule.plan(), [], 0
    for step in range(50):
        if counts[step] != TOTAL:
            continue
        if step:
            changes.append(Change(last, step, true[step] - true[last]))
        last = step
        if (begin := schedule.anew_from(counts, step)) is not None:
            counts = schedule.within_share(counts, begin, changes)
    assert sum(counts) == 20 * TOTAL
    assert policy.exponent(changes) == pytest.approx(exponent, abs=0.12)
    # Beside gaps of one step, which cannot be shorter, and the first, before which nothing is known, all count alike.
    counted = np.concatenate([[0.0], np.cumsum(1.3 * LEVEL * policy.counted(exponent, 0))])
    long = [counted[gap.stop] - counted[gap.start] for gap in changes[1:] if gap.stop - gap.start > 1]
    assert long and max(long) < 2.2 * min(long)


def test_the_first_change_tells_the_exponent():
    """What is given early changes little at the start: by that one number the tasks are told apart."""
    policy = auto(40, 3.0)
    text, image = policy.exponent([Change(0, 1, 1.05)]), policy.exponent([Change(0, 1, 0.15)])
    assert image < 1.3 < 1.5 < text
    assert policy.exponent([Change(0, 1, math.inf), Change(1, 2, 0.0)]) == policy.exponent([])
    # Without guidance all changes are about a third as large.
    text, image = (policy.exponent([Change(0, 1, value, guided=False)]) for value in (0.35, 0.05))
    assert image < 1.3 < 1.5 < text


@pytest.mark.parametrize("level", [0.1, 0.3])
@pytest.mark.parametrize("exponent", [1.1, 1.6])
def test_without_guidance_the_exponent_is_found_whatever_the_level(level, exponent):
    """A model that guidance was distilled into may change as a guided one does."""
    policy = auto(12, 7.0)
    passed = np.concatenate([[0.0], np.cumsum(level * policy.rates(exponent))])
    steps = [0, 1, 2, 4, 6, 9]
    changes = [Change(a, b, passed[b] - passed[a], guided=False) for a, b in zip(steps, steps[1:])]
    assert policy.exponent(changes) == pytest.approx(exponent, abs=0.16)


def test_before_anything_is_measured_the_task_is_what_is_known():
    assert auto(from_frames=True).exponent([]) < auto().exponent([])
    # Plain sampling with two of four steps would evaluate these two.
    assert dense(auto(4, from_frames=True).plan(2 * TOTAL)) == [0, 2]
    assert dense(auto(4).plan(2 * TOTAL)) == [0, 1]


def test_no_evaluation_is_spent_to_know_more():
    """The second one goes where the predicted change puts it, as all others do."""
    for number in (3, 5, 10, 12):
        for from_frames in (False, True):
            policy = auto(50, 12.0, from_frames=from_frames)
            counted = np.cumsum(policy.counted(policy.exponent([]), 0))
            second = dense(policy.plan(number * TOTAL))[1]
            # A part of the whole, as the other gaps: rounded to a step.
            assert counted[second - 2] <= counted[-1] / number <= counted[second]
    few = dense(auto(12, 7.0, from_frames=True).plan(3 * TOTAL))
    assert len(few) == 3 and few[:2] != [0, 1]
    # Tokens are ranked by a first change.
    assert dense(auto(12, 7.0, from_frames=True, sparse_share=0.2).plan(6 * TOTAL))[:2] == [0, 1]
    # Where every step reads K and V, they are kept from the second on.
    assert auto(8, tokens=Tokens(TOTAL, 1)).plan(3 * TOTAL)[:2] == [TOTAL, TOTAL]


def test_changes_near_pure_noise_count_for_less():
    def parts(num_steps, shift):
        policy = auto(num_steps, shift)
        return policy.counted(1.4, 0) / policy.rates(1.4)

    part = parts(50, 16.0)
    # Shift 16: the first five steps are those with a signal of less than 0.006.
    assert (np.diff(part) > -1e-12).all() and part[0] < 0.35 and part[1] < 0.7 and part[5] > 0.94
    assert part[10] > 0.99 and part[-1] == pytest.approx(1)
    # At low shifts none is like that but the first.
    assert (parts(40, 3.0)[1:] > 0.99).all()


def test_steps_that_are_asked_to_be_dense_are():
    counts = auto(20, dense_start=5, dense_end=2).plan(9 * TOTAL)
    assert counts[:5] == [TOTAL] * 5 and counts[-2:] == [TOTAL] * 2 and sum(counts) == 9 * TOTAL


def test_the_plan_is_near_to_what_a_search_found_on_a_real_model():
    """LeMiCa's searched steps for Wan 2.1 1.3B, 50 steps of shift 5: how far each of ours is from the nearest."""
    found = {
        25: [*range(13), 14, 16, 18, 21, 24, 29, 35, 40, 44, 47, 48, 49],
        14: [*range(6), 7, 10, 16, 23, 30, 37, 44, 49],
    }
    for number, searched in found.items():
        ours = dense(auto(50, 5.0).plan(number * TOTAL))
        assert len(ours) == number
        apart = np.abs(np.array(ours) - np.array(searched))
        equal = [round(step * 50 / number) for step in range(number)]
        by_equal_gaps = np.abs(np.array(equal) - np.array(searched))
        assert apart.mean() < 2 < 6 < by_equal_gaps.mean(), (ours, apart.mean())
