import itertools
import math

import pytest
import torch

from heterostep.engine.trajectory import Correction, SchedulerInput, Trajectory, relative_change
from heterostep.sigmas import nominal_sigmas

SIGMAS = nominal_sigmas(12, 3.0)
LOG_ALPHAS = [math.log(max(1 - sigma, 1e-4)) for sigma in SIGMAS]


def test_given_values_do_not_count():
    old, new = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    new[0, 0], new[1, 1] = 3.0, 2.0
    ignored = torch.zeros(2, 3, 4, dtype=torch.bool)
    ignored[:, 0] = True
    assert relative_change(new, old).tolist() == pytest.approx([8 / 20, 4 / 16])
    assert relative_change(new, old, ignored).tolist() == pytest.approx([0, 4 / 12])


def line(step, at, start, stop):
    return start + (stop - start) * (LOG_ALPHAS[at] - LOG_ALPHAS[step[0]]) / (LOG_ALPHAS[step[1]] - LOG_ALPHAS[step[0]])


HALF = torch.tensor([0.5])


@pytest.mark.parametrize("known", [True, False])
def test_a_gap_is_integrated_again_when_its_end_is_known(known):
    """With Euler the sample ends where a line between the known velocities leads, but for what mistrust takes away."""
    start, stop = torch.full((1, 4), 2.0), torch.full((1, 4), 2.5)
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, Correction.VELOCITY)
    x = torch.zeros(1, 4)
    assert trajectory.on_dense_step(3, start, None)[1].velocity is start
    x = x + (SIGMAS[4] - SIGMAS[3]) * start
    for step in (4, 5, 6):
        if not known:
            trajectory.leave_gap()
        assert trajectory.on_skipped_step(step, start, HALF) is start
        x = x + (SIGMAS[step + 1] - SIGMAS[step]) * start
    change, given = trajectory.on_dense_step(7, stop, None)
    assert change.item() == pytest.approx(0.2)
    if not known:
        # Some values were evaluated in the gap, which is not known: a line would leave them out.
        assert given.velocity is stop
        return
    right = sum((SIGMAS[i + 1] - SIGMAS[i]) * line((3, 7), i, start, stop) for i in range(3, 7))
    missed = right - x
    dsigma = SIGMAS[8] - SIGMAS[7]
    assert given.sample_shift is None
    torch.testing.assert_close(given.velocity, stop + 0.8 * missed * (1 / dsigma + 1 / SIGMAS[7]))
    # At the next step the velocities are the model's again.
    assert trajectory.on_skipped_step(8, stop, HALF) is stop


def gap(trajectory, start, stop, velocities, weight=HALF):
    """From one dense step (number, velocity) to the next: what the scheduler was given in between, and at its end."""
    trajectory.on_dense_step(*start, None)
    given = [trajectory.on_skipped_step(start[0] + 1 + i, v, weight) for i, v in enumerate(velocities)]
    return given, trajectory.on_dense_step(*stop, None)


def test_where_the_sample_can_be_moved_it_is_and_the_clean_sample_is_kept():
    start, stop = torch.full((1, 4), 2.0), torch.full((1, 4), 2.5)
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, Correction.SAMPLE)
    _, (_, given) = gap(trajectory, (3, start), (6, stop), [start, start])
    missed = sum((SIGMAS[i + 1] - SIGMAS[i]) * (line((3, 6), i, start, stop) - start) for i in range(3, 6))
    torch.testing.assert_close(given.sample_shift, 0.8 * missed)
    # x - sigma v, before and after.
    torch.testing.assert_close(given.sample_shift - SIGMAS[6] * given.velocity, -SIGMAS[6] * stop)


def test_what_is_extrapolated_follows_the_move_until_the_next_dense_step():
    """Two velocities that are both made elsewhere, by the same, have a slope that is right as it is."""
    start, stop = torch.full((1, 4), 2.0), torch.full((1, 4), 2.5)
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, Correction.SAMPLE)
    _, (_, given) = gap(trajectory, (3, start), (6, stop), [start, start])
    shift = given.velocity - stop
    ahead = (LOG_ALPHAS[7] - LOG_ALPHAS[6]) / (LOG_ALPHAS[6] - LOG_ALPHAS[3])
    torch.testing.assert_close(trajectory.on_skipped_step(7, stop, HALF), stop + shift * (1 + 0.5 * ahead))
    torch.testing.assert_close(trajectory.on_skipped_step(8, stop, 0 * HALF), stop + shift)


def test_a_gap_after_a_gap_is_integrated_from_the_corrected_velocity():
    start, stop, end = (torch.full((1, 4), value) for value in (2.0, 2.5, 2.9))
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, Correction.SAMPLE)
    _, (_, given) = gap(trajectory, (3, start), (6, stop), [start, start])
    shift = given.velocity - stop
    inside = [trajectory.on_skipped_step(step, stop, HALF) for step in (7, 8)]
    change, given = trajectory.on_dense_step(9, end, None)
    assert change.item() == pytest.approx(((end - stop - shift) / end).mean().item())
    widths = [SIGMAS[i + 1] - SIGMAS[i] for i in (6, 7, 8)]
    lines = [line((6, 9), i, stop + shift, end) for i in (6, 7, 8)]
    missed = sum(w * (right - wrong) for w, right, wrong in zip(widths, lines, [stop + shift, *inside]))
    torch.testing.assert_close(given.sample_shift, (1 - change) * missed)
    # What comes next is extrapolated from two velocities that were made elsewhere, each by its own move.
    now = given.velocity - end
    ahead = 0.5 * (LOG_ALPHAS[10] - LOG_ALPHAS[9]) / (LOG_ALPHAS[9] - LOG_ALPHAS[6])
    torch.testing.assert_close(trajectory.on_skipped_step(10, end, HALF), end + now + ahead * (now - shift))


def test_another_model_does_not_follow_this_ones_moves():
    start, stop = torch.full((1, 4), 2.0), torch.full((1, 4), 2.5)
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, Correction.SAMPLE)
    gap(trajectory, (3, start), (6, stop), [start, start])
    trajectory.restart()
    assert trajectory.on_dense_step(7, start, None) == (None, SchedulerInput(start))
    assert trajectory.on_skipped_step(8, start, HALF) is start
    assert trajectory.on_dense_step(9, start, None)[1].sample_shift.abs().max() < 1e-6


def test_a_step_made_twice_and_a_velocity_of_another_shape_are_survived():
    start, stop = torch.full((1, 4), 2.0), torch.full((1, 4), 2.5)
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, Correction.SAMPLE)
    gap(trajectory, (3, start), (6, stop), [start, start])
    trajectory.on_dense_step(6, stop, None)
    assert trajectory.on_skipped_step(7, stop, HALF).isfinite().all()
    wider = torch.full((1, 6), 2.0)
    assert trajectory.on_dense_step(8, wider, None) == (None, SchedulerInput(wider))
    assert trajectory.on_skipped_step(9, wider, HALF) is wider


def test_all_processes_go_by_one_change():
    start, stop = torch.full((1, 4), 2.0), torch.full((1, 4), 2.5)
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, Correction.SAMPLE)
    trajectory.on_dense_step(3, start, None)
    trajectory.on_skipped_step(4, start, HALF)
    change, given = trajectory.on_dense_step(5, stop, None, lambda own: torch.ones_like(own))
    assert change.item() == 1 and given.sample_shift.abs().max() == 0


def test_a_gap_of_which_too_little_is_known_ends_what_follows_the_move():
    start, stop = torch.full((1, 4), 2.0), torch.full((1, 4), 2.5)
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, Correction.SAMPLE)
    gap(trajectory, (3, start), (6, stop), [start, start])
    trajectory.leave_gap()
    assert trajectory.on_skipped_step(7, stop, HALF) is stop


EVALUATED = torch.tensor([[False, False, True, True]])


def test_values_that_are_evaluated_in_a_gap_have_their_own_lines():
    """Two of four values are evaluated at step 5 of the gap from 3 to 7, one of them at step 6 again."""
    start, stop = torch.full((1, 4), 2.0), torch.full((1, 4), 2.5)
    middle, late = torch.tensor([[2.0, 2.0, 2.1, 2.4]]), torch.tensor([[2.0, 2.0, 2.1, 2.6]])
    again = torch.tensor([[False, False, False, True]])
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, Correction.SAMPLE)
    trajectory.on_dense_step(3, start, None)
    given = [start, *(trajectory.on_skipped_step(*each) for each in [(4, start, HALF), (5, middle, HALF, EVALUATED)])]
    given.append(trajectory.on_skipped_step(6, late, HALF, again))
    change, at_end = trajectory.on_dense_step(7, stop, None)
    paths = [[(3, 2.0), (7, 2.5)], [(3, 2.0), (7, 2.5)], [(3, 2.0), (5, 2.1), (7, 2.5)]]
    paths.append([(3, 2.0), (5, 2.4), (6, 2.6), (7, 2.5)])
    for value, path in enumerate(paths):
        right = sum(
            (SIGMAS[i + 1] - SIGMAS[i]) * line((before[0], after[0]), i, before[1], after[1])
            for before, after in itertools.pairwise(path)
            for i in range(before[0], after[0])
        )
        moved = sum((SIGMAS[i + 1] - SIGMAS[i]) * given[i - 3][0, value].item() for i in range(3, 7))
        assert at_end.sample_shift[0, value].item() == pytest.approx((1 - change.item()) * (right - moved), rel=1e-4)
    # The change is from one dense step to the next.
    assert change.item() == pytest.approx(0.2)


def test_a_step_of_single_tokens_made_twice_is_survived():
    start, stop = torch.full((1, 4), 2.0), torch.full((1, 4), 2.5)
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, Correction.SAMPLE)
    gap(trajectory, (3, start), (6, stop), [start, start])
    given = [trajectory.on_skipped_step(7, stop, HALF, EVALUATED) for _ in range(2)]
    torch.testing.assert_close(*given)
    assert trajectory.on_skipped_step(8, stop, HALF).isfinite().all()
    assert trajectory.on_dense_step(9, stop, None)[1].sample_shift.isfinite().all()


def test_a_value_that_is_evaluated_follows_the_move_no_more():
    start, stop = torch.full((1, 4), 2.0), torch.full((1, 4), 2.5)
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, Correction.SAMPLE)
    _, (_, corrected) = gap(trajectory, (3, start), (6, stop), [start, start])
    shift = (corrected.velocity - stop)[0, 0].item()
    given = trajectory.on_skipped_step(7, stop, HALF, EVALUATED)
    way = [LOG_ALPHAS[i + 1] - LOG_ALPHAS[i] for i in range(11)]
    ahead = 0.5 * way[6] / sum(way[3:6])
    assert given[0].tolist() == pytest.approx([2.5 + shift * (1 + ahead)] * 2 + [2.5] * 2)
    # Later theirs are extrapolated from one that is right and one that was made elsewhere.
    given, ahead = trajectory.on_skipped_step(8, stop, HALF), 0.5 * sum(way[6:8]) / sum(way[3:6])
    assert given[0].tolist() == pytest.approx(
        [2.5 + shift * (1 + ahead)] * 2 + [2.5 - 0.5 * way[7] / way[6] * shift] * 2
    )
    # At the gap's end each line begins where its value was evaluated, or the sample was moved to.
    change, at_end = trajectory.on_dense_step(9, stop, None)
    assert change.item() == pytest.approx(abs(shift) / 2.5, rel=1e-5)
    widths = [SIGMAS[i + 1] - SIGMAS[i] for i in (6, 7, 8)]
    moved = [widths[0] * (2.5 + shift) + widths[1] * 2.5 + widths[2] * given[0, value].item() for value in (2, 3)]
    right = widths[0] * line((6, 7), 6, 2.5 + shift, 2.5) + sum(widths[1:]) * 2.5
    assert at_end.sample_shift[0, 2:].tolist() == pytest.approx(
        [(1 - change.item()) * (right - each) for each in moved], rel=1e-4
    )


class Value:
    """One value's evaluations, and what must follow from them: `Trajectory` in plain numbers."""

    def __init__(self, correction):
        self.evaluations, self.given, self.gap, self.correction = [], {}, 0, correction  # (step, velocity, shift)

    def extrapolated(self, step, weight, shifted):
        (last, v, shift), (before, u, previous) = self.evaluations[-1], self.evaluations[-2]
        ahead = weight * (LOG_ALPHAS[step] - LOG_ALPHAS[last]) / (LOG_ALPHAS[last] - LOG_ALPHAS[before])
        return v + ahead * (v - u) + (shift + ahead * (shift - previous) if shifted else 0)

    def dense(self, step, velocity, change):
        """The velocity that the scheduler is given, and the sample's move."""
        shift = move = 0.0
        given = velocity
        if step - self.gap > 1:
            ends = [(at, v + s) for at, v, s in self.evaluations if at >= self.gap] + [(step, velocity)]
            lines = {
                i: line((start, stop), i, v, u)
                for (start, v), (stop, u) in itertools.pairwise(ends)
                for i in range(start, stop)
            }
            missed = sum((SIGMAS[i + 1] - SIGMAS[i]) * (lines[i] - self.given[i]) for i in range(self.gap, step))
            move = max(1 - change, 0) * missed
            given = velocity + move / SIGMAS[step]
            if self.correction is Correction.SAMPLE:
                shift = move / SIGMAS[step]
            else:
                given, move = given + move / (SIGMAS[step + 1] - SIGMAS[step]), 0.0
        self.evaluations.append((step, velocity, shift))
        self.gap, self.given[step] = step, velocity + shift
        return given, move


@pytest.mark.parametrize("correction", [Correction.SAMPLE, Correction.VELOCITY])
@pytest.mark.parametrize("seed", range(8))
def test_evaluations_in_any_order_are_as_counted_value_by_value(correction, seed):
    """Two samples of six values; single ones run at any step between the dense ones, some of them again and again."""
    random = torch.Generator().manual_seed(seed)
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, correction)
    values = [[Value(correction) for _ in range(6)] for _ in range(2)]
    velocity, moved = 2 + 0.1 * torch.randn(2, 6, generator=random), False
    for step in range(12):
        velocity = velocity + 0.05 * torch.randn(2, 6, generator=random)
        if step in (0, 1, 5, 9):
            change, given = trajectory.on_dense_step(step, velocity, None)
            for i, j in itertools.product(range(2), range(6)):
                of = 0.0 if change is None else change[i].item()
                right, move = values[i][j].dense(step, velocity[i, j].item(), of)
                assert given.velocity[i, j].item() == pytest.approx(right, rel=1e-4)
                shift = 0.0 if given.sample_shift is None else given.sample_shift[i, j].item()
                assert shift == pytest.approx(move, rel=1e-3, abs=1e-6)
                moved |= right != velocity[i, j].item()
            continue
        weight = torch.rand(2, generator=random)
        evaluated = torch.rand(2, 6, generator=random) < 0.4 if step != 6 else torch.zeros(2, 6, dtype=torch.bool)
        raw = torch.empty(2, 6)
        for i, j in itertools.product(range(2), range(6)):
            if evaluated[i, j]:
                values[i][j].evaluations.append((step, velocity[i, j].item(), 0.0))
            raw[i, j] = values[i][j].extrapolated(step, weight[i].item(), False)
        given = trajectory.on_skipped_step(step, raw, weight, evaluated if evaluated.any() else None)
        for i, j in itertools.product(range(2), range(6)):
            right = values[i][j].extrapolated(step, weight[i].item(), True)
            assert given[i, j].item() == pytest.approx(right, rel=1e-4)
            values[i][j].given[step] = right
    assert moved


@pytest.mark.parametrize("correction", list(Correction))
def test_nothing_is_corrected_without_a_gap_or_where_it_is_not_asked(correction):
    v, w = torch.ones(1, 4), torch.full((1, 4), 1.2)
    trajectory = Trajectory(SIGMAS, LOG_ALPHAS, correction)
    last = 7 if correction is Correction.NONE else 4
    given, (change, at_end) = gap(trajectory, (3, v), (last, w), [v] * (last - 4))
    assert all(each is v for each in given) and change is not None
    assert at_end.velocity is w and at_end.sample_shift is None
    trajectory.restart()
    assert trajectory.on_dense_step(9, v, None) == (None, SchedulerInput(v))
