import random

import pytest
import torch

from heterostep.allocation import Tokens, active_tokens, allocate, evaluations_within, rank

DIVISORS = (1, 2, 4, 8)


def test_every_budget_is_spent_exactly():
    draw = random.Random(0)
    for _ in range(500):
        tokens, steps = draw.randint(1, 500), draw.randint(1, 40)
        lowest = tokens * -(-steps // 8)
        budget = draw.randint(lowest, tokens * steps)
        counts = allocate(budget, Tokens(tokens), steps, DIVISORS)
        assert sum(counts) == budget
        assert len(counts) == steps and counts[0] == tokens
        assert all(0 <= count <= tokens for count in counts)


def test_too_small_a_budget_gives_the_fewest_meetings_and_too_large_a_dense_window():
    assert allocate(0, Tokens(10), 9, DIVISORS) == [10, 0, 0, 0, 0, 0, 0, 0, 10]
    assert allocate(10**6, Tokens(10), 3, DIVISORS) == [10, 10, 10]


def test_groups_meet_at_multiples_of_the_larger_divisor():
    counts = allocate(6 * 100 + 6 * 30, Tokens(100), 24, DIVISORS)
    assert [i for i, c in enumerate(counts) if c == 100] == [0, 4, 8, 12, 16, 20]
    assert [i for i, c in enumerate(counts) if c == 30] == [2, 6, 10, 14, 18, 22]


def test_a_budget_in_seconds_is_met_from_below():
    def cost(count):
        return 0.01 + count / 100 if count else 0.0

    def plan(evaluations):
        return allocate(evaluations, Tokens(100), 30, DIVISORS)

    for seconds in (5.0, 9.5, 14.0, 100.0):
        evaluations = evaluations_within(seconds, cost, 3000, plan)
        assert sum(map(cost, plan(evaluations))) <= seconds
        if evaluations < 3000:
            assert sum(map(cost, plan(evaluations + 1))) > seconds


def test_counts_come_from_a_few_sizes():
    tokens = Tokens(32_760)
    sizes = set()
    for budget in range(300_000, 1_200_000, 10_000):
        sizes |= set(allocate(budget, tokens, 38, DIVISORS, exact=False))
    assert all(size % tokens.unit == 0 or size == tokens.total for size in sizes) and len(sizes) <= 34
    one = allocate(619_123, tokens, 38, DIVISORS)
    assert sum(one) == 619_123 and len(set(one)) <= 5


def test_a_cycle_begins_where_another_model_takes_over():
    counts = allocate(8 * 100, Tokens(100), 24, DIVISORS, restarts=[10, 30])
    assert [step for step, count in enumerate(counts) if count == 100] == [0, 4, 8, 10, 14, 18, 22]
    assert sum(counts) == 800


def test_a_floor_is_kept_at_every_step():
    counts = allocate(1000, Tokens(100, least=2), 30, DIVISORS)
    assert min(counts) == 2 and sum(counts) == 1000


def test_each_sample_has_its_own_active_tokens():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.7, 0.0, 0.1, 0.8]])
    assert active_tokens(rank(scores), 2).tolist() == [[1, 2], [0, 3]]


def test_ties_keep_the_order_of_the_tokens():
    assert rank(torch.zeros(1, 50)).tolist() == [list(range(50))]


@pytest.mark.parametrize("divisors", [(3,), (1, 3, 9), (2, 4)])
def test_other_divisors_spend_what_they_can(divisors):
    for budget in range(0, 400, 7):
        counts = allocate(budget, Tokens(20), 18, divisors)
        lowest = 20 * -(-18 // divisors[-1])
        highest = 20 * -(-18 // divisors[0])
        assert sum(counts) == min(max(budget, lowest), highest)
