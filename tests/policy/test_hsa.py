import random

import pytest

from heterostep.config import HSAConfig
from heterostep.policy import Run, Tokens, make
from heterostep.policy.hsa import by_divisors
from heterostep.sigmas import nominal_sigmas

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


def test_too_small_a_budget_gives_the_fewest_dense_steps_and_too_large_a_dense_window():
    assert by_divisors(0, Tokens(10), 9, DIVISORS) == [10, 0, 0, 0, 0, 0, 0, 0, 10]
    assert by_divisors(10**6, Tokens(10), 3, DIVISORS) == [10, 10, 10]


def test_groups_meet_at_multiples_of_the_larger_divisor():
    counts = by_divisors(6 * 100 + 6 * 30, Tokens(100), 24, DIVISORS)
    assert [i for i, c in enumerate(counts) if c == 100] == [0, 4, 8, 12, 16, 20]
    assert [i for i, c in enumerate(counts) if c == 30] == [2, 6, 10, 14, 18, 22]


def test_counts_come_from_a_few_sizes():
    tokens = Tokens(32_760)
    sizes = set()
    for budget in range(300_000, 1_200_000, 10_000):
        sizes |= set(by_divisors(budget, tokens, 38, DIVISORS, spend_remainder=False))
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


@pytest.mark.parametrize("divisors", [(3,), (1, 3, 9), (2, 4)])
def test_other_divisors_spend_what_they_can(divisors):
    for budget in range(0, 400, 7):
        counts = by_divisors(budget, Tokens(20), 18, divisors)
        lowest = 20 * -(-18 // divisors[-1])
        highest = 20 * -(-18 // divisors[0])
        assert sum(counts) == min(max(budget, lowest), highest)


@pytest.mark.parametrize("target", [0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 40])
def test_the_window_stays_inside_the_run(steps, target):
    run = Run(nominal_sigmas(steps), Tokens(320))
    for config in (HSAConfig(share=target, policy="hsa"), HSAConfig(runtime=target, policy="hsa")):
        policy = make(config, run)
        start, stop = policy.window
        assert 0 < start <= stop <= steps
        # From any step on, the plan has a count for each that is left.
        for step in range(steps):
            counts = policy.replan(int(target * (steps - step) * 320), step, spend_remainder=False)
            assert len(counts) == steps - step


def test_velocities_are_held_as_they_are():
    assert HSAConfig(share=0.5, policy="hsa").extrapolate == 0
    assert HSAConfig(share=0.5, divisors=(1, 2)).policy == "hsa"
