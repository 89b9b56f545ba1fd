import pytest
import torch

from heterostep.policy import Tokens
from heterostep.policy.allocation import active_tokens, evaluations_within, rank
from heterostep.policy.hsa import by_divisors


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


def test_each_sample_has_its_own_active_tokens():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.7, 0.0, 0.1, 0.8]])
    assert active_tokens(rank(scores), 2).tolist() == [[1, 2], [0, 3]]


@pytest.mark.parametrize("count", [1, 50])
def test_ties_keep_the_order_of_the_tokens(count):
    assert rank(torch.zeros(1, count)).tolist() == [list(range(count))]
