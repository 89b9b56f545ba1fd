import torch

from heterostep.engine.velocity import velocity_change


def test_score_is_the_relative_change_in_l1_per_sigma():
    old = torch.tensor([[[1.0, -1.0], [2.0, 2.0]]])
    new = torch.tensor([[[1.5, -1.0], [2.0, 0.0]]])
    scores = velocity_change(new, old, torch.tensor([[0.5, 0.25]]))
    torch.testing.assert_close(scores, torch.tensor([[0.5 / 2 / 0.5, 2 / 4 / 0.25]]))


def test_score_survives_zero_velocity_and_low_precision():
    scores = velocity_change(torch.ones(1, 3, 4).bfloat16(), torch.zeros(1, 3, 4).bfloat16(), torch.zeros(1, 3))
    assert scores.dtype == torch.float32 and not scores.isnan().any()
