import math

import pytest
import torch

from heterostep.engine.trajectory import Trajectory, relative_change
from heterostep.sigmas import nominal_sigmas

SIGMAS = nominal_sigmas(12, 3.0)
TIMES = [math.log(max(1 - sigma, 1e-4)) for sigma in SIGMAS]


def test_given_values_do_not_count():
    old, new = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    new[0, 0], new[1, 1] = 3.0, 2.0
    ignored = torch.zeros(2, 3, 4, dtype=torch.bool)
    ignored[:, 0] = True
    assert relative_change(new, old).tolist() == pytest.approx([8 / 20, 4 / 16])
    assert relative_change(new, old, ignored).tolist() == pytest.approx([0, 4 / 12])


def line(step, at, start, stop):
    return start + (stop - start) * (TIMES[at] - TIMES[step[0]]) / (TIMES[step[1]] - TIMES[step[0]])


@pytest.mark.parametrize("sparse", [False, True])
def test_a_gap_is_integrated_again_when_its_end_is_known(sparse):
    """With Euler the sample ends where a line between the known velocities leads, but for what mistrust takes away."""
    start, stop = torch.full((1, 4), 2.0), torch.full((1, 4), 2.5)
    trajectory = Trajectory(SIGMAS, TIMES, corrects=True)
    x = torch.zeros(1, 4)
    assert trajectory.evaluated(3, start, None)[1] is start
    x = x + (SIGMAS[4] - SIGMAS[3]) * start
    for step in (4, 5, 6):
        trajectory.skipped(step, start, sparse and step == 5)
        x = x + (SIGMAS[step + 1] - SIGMAS[step]) * start
    change, given = trajectory.evaluated(7, stop, None)
    assert change.item() == pytest.approx(0.2)
    if sparse:
        # Some tokens were evaluated in the gap: a line would leave that out.
        assert given is stop
        return
    right = sum((SIGMAS[i + 1] - SIGMAS[i]) * line((3, 7), i, start, stop) for i in range(3, 7))
    missed = right - x
    dsigma = SIGMAS[8] - SIGMAS[7]
    torch.testing.assert_close(given, stop + 0.8 * missed * (1 / dsigma + 1 / SIGMAS[7]))


def test_nothing_is_corrected_without_a_gap_or_where_it_is_not_asked():
    v, w = torch.ones(1, 4), torch.full((1, 4), 1.2)
    for corrects, steps in ((True, (3, 4)), (False, (3, 7))):
        trajectory = Trajectory(SIGMAS, TIMES, corrects)
        trajectory.evaluated(steps[0], v, None)
        for step in range(steps[0] + 1, steps[1]):
            trajectory.skipped(step, v, sparse=False)
        change, given = trajectory.evaluated(steps[1], w, None)
        assert given is w and change is not None
    trajectory.restart()
    assert trajectory.evaluated(9, v, None) == (None, v)
