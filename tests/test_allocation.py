import random

import pytest
import torch

from heterostep.allocation import (
    Tokens,
    active_tokens,
    by_divisors,
    by_growing_gaps,
    evaluations_within,
    meeting_steps,
    rank,
)

DIVISORS = (1, 2, 4, 8)


def test_divisors_spend_every_budget_exactly():
    draw = random.Random(0)
    for _ in range(500):
        tokens, steps = draw.randint(1, 500), draw.randint(1, 40)
        lowest = tokens * -(-steps // 8)
        budget = draw.randint(lowest, tokens * steps)
        counts = by_divisors(budget, Tokens(tokens), steps, DIVISORS)
        assert sum(counts) == budget
        assert len(counts) == steps and counts[0] == tokens
        assert all(0 <= count <= tokens for count in counts)


def test_growing_gaps_spend_every_budget_exactly():
    draw = random.Random(1)
    for _ in range(500):
        total, length, first = draw.randint(2, 500), draw.randint(1, 40), draw.randint(1, 30)
        tokens, steps = Tokens(total, draw.choice((0, 1))), range(first, first + length)
        restarts = tuple(sorted(draw.sample(range(1, 70), draw.choice((0, 1, 2)))))
        between = draw.choice((0.0, 0.2, 0.5, 1.0))
        lowest = sum(by_growing_gaps(0, tokens, steps, between, restarts))
        budget = draw.randint(0, total * length)
        counts = by_growing_gaps(budget, tokens, steps, between, restarts)
        assert sum(counts) == max(budget, lowest)
        assert counts[0] == total and all(tokens.least <= count <= total for count in counts)
        assert all(counts[step - first] == total for step in restarts if step in steps)


def test_gaps_grow_with_the_step_and_the_last_one_fits():
    for count in range(3, 20):
        meetings = meeting_steps(count, 4, 40)
        gaps = [b - a for a, b in zip(meetings, meetings[1:])]
        assert len(meetings) == count and meetings[0] == 4 and meetings[-1] < 40
        assert all(later >= earlier - 1 for earlier, later in zip(gaps, gaps[1:])), gaps
        # What the last velocities are held for is no longer than the law has it.
        assert 40 - meetings[-1] <= 1.5 * gaps[-1] + 1, gaps
    assert meeting_steps(36, 4, 40) == tuple(range(4, 40)) == meeting_steps(99, 4, 40)
    assert meeting_steps(1, 4, 40) == (4,)


def test_meetings_begin_again_where_another_model_takes_over():
    meetings = meeting_steps(6, 4, 40, (17,))
    assert 17 in meetings and len(meetings) <= 6 and meetings[0] == 4
    assert meeting_steps(1, 4, 40, (17, 30)) in [(4,), (4, 17, 30)]


def test_what_meetings_leave_goes_to_the_middles_of_gaps():
    tokens, steps = Tokens(320), range(4, 40)
    counts = by_growing_gaps(8 * 320, tokens, steps, between=0.25)
    meetings = [step for step, count in zip(steps, counts) if count == 320]
    assert len(meetings) == 6
    for a, b in zip(meetings, [*meetings[1:], 40]):
        inside = {step: counts[step - 4] for step in range(a + 1, b) if counts[step - 4]}
        assert len(inside) <= 1 and all(abs(step - (a + b) / 2) <= 0.5 for step in inside)
    whole = by_growing_gaps(8 * 320 + 50, tokens, steps, between=None)
    assert set(whole) == {0, 320} and sum(whole) == 8 * 320
    # What is left over by chance is spent once, in the last gap, and where it need not be exact only if it is worth it.
    counts = by_growing_gaps(8 * 320 + 50, tokens, steps)
    (at,) = (step for step, count in enumerate(counts) if 0 < count < 320)
    assert counts[at] == 50 and all(count == 0 for count in counts[at + 1 :])
    assert sum(by_growing_gaps(8 * 320 + 30, tokens, steps, exact=False)) == 8 * 320
    assert sum(by_growing_gaps(8 * 320 + 300, tokens, steps, exact=False)) == 8 * 320 + 300


@pytest.mark.parametrize("fixed", [0.0, 0.05, 0.2, 0.4])
def test_seconds_buy_the_most_whole_steps_that_fit(fixed):
    """Each step that is not empty has a fixed cost; what is left over never costs a whole step."""
    tokens, steps = Tokens(75_600), range(12, 40)

    def cost(count):
        return fixed + (1 - fixed) * count / tokens.total if count else 0.0

    def plan(evaluations):
        return by_growing_gaps(evaluations, tokens, steps, exact=False)

    for budget in (3.0, 8.0, 8.3, 9.2, 15.9, 27.0):
        counts = plan(evaluations_within(budget, cost, tokens.total * len(steps), plan))
        assert sum(map(cost, counts)) <= budget
        assert sum(count == tokens.total for count in counts) == int(budget)


def test_too_small_a_budget_gives_the_fewest_meetings_and_too_large_a_dense_window():
    assert by_divisors(0, Tokens(10), 9, DIVISORS) == [10, 0, 0, 0, 0, 0, 0, 0, 10]
    assert by_divisors(10**6, Tokens(10), 3, DIVISORS) == [10, 10, 10]


def test_groups_meet_at_multiples_of_the_larger_divisor():
    counts = by_divisors(6 * 100 + 6 * 30, Tokens(100), 24, DIVISORS)
    assert [i for i, c in enumerate(counts) if c == 100] == [0, 4, 8, 12, 16, 20]
    assert [i for i, c in enumerate(counts) if c == 30] == [2, 6, 10, 14, 18, 22]


def test_a_budget_in_seconds_is_met_from_below():
    def cost(count):
        return 0.01 + count / 100 if count else 0.0

    def plan(evaluations):
        return by_divisors(evaluations, Tokens(100), 30, DIVISORS)

    for seconds in (5.0, 9.5, 14.0, 100.0):
        evaluations = evaluations_within(seconds, cost, 3000, plan)
        assert sum(map(cost, plan(evaluations))) <= seconds
        if evaluations < 3000:
            assert sum(map(cost, plan(evaluations + 1))) > seconds


def test_counts_come_from_a_few_sizes():
    tokens = Tokens(32_760)
    sizes = set()
    for budget in range(300_000, 1_200_000, 10_000):
        sizes |= set(by_divisors(budget, tokens, 38, DIVISORS, exact=False))
    assert all(size % tokens.unit == 0 or size == tokens.total for size in sizes) and len(sizes) <= 34
    one = by_divisors(619_123, tokens, 38, DIVISORS)
    assert sum(one) == 619_123 and len(set(one)) <= 5


def test_a_cycle_begins_where_another_model_takes_over():
    counts = by_divisors(8 * 100, Tokens(100), 24, DIVISORS, restarts=[10, 30])
    assert [step for step, count in enumerate(counts) if count == 100] == [0, 4, 8, 10, 14, 18, 22]
    assert sum(counts) == 800


def test_a_floor_is_kept_at_every_step():
    counts = by_divisors(1000, Tokens(100, least=2), 30, DIVISORS)
    assert min(counts) == 2 and sum(counts) == 1000


def test_each_sample_has_its_own_active_tokens():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.7, 0.0, 0.1, 0.8]])
    assert active_tokens(rank(scores), 2).tolist() == [[1, 2], [0, 3]]


def test_ties_keep_the_order_of_the_tokens():
    assert rank(torch.zeros(1, 50)).tolist() == [list(range(50))]


@pytest.mark.parametrize("divisors", [(3,), (1, 3, 9), (2, 4)])
def test_other_divisors_spend_what_they_can(divisors):
    for budget in range(0, 400, 7):
        counts = by_divisors(budget, Tokens(20), 18, divisors)
        lowest = 20 * -(-18 // divisors[-1])
        highest = 20 * -(-18 // divisors[0])
        assert sum(counts) == min(max(budget, lowest), highest)
