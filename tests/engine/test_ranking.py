"""Which tokens a sparse step evaluates."""

import pytest
import torch

from heterostep.engine.ranking import active_tokens, by_falling_score


def test_each_sample_has_its_own_active_tokens():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.7, 0.0, 0.1, 0.8]])
    assert active_tokens(by_falling_score(scores), 2).tolist() == [[1, 2], [0, 3]]


@pytest.mark.parametrize("count", [1, 50])
def test_ties_keep_the_order_of_the_tokens(count):
    assert by_falling_score(torch.zeros(1, count)).tolist() == [list(range(count))]
