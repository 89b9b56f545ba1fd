import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from heterostep.engine.clock import StepClock, StepCost


def test_fit_recovers_a_line_through_the_dense_steps():
    shares = [1.0, 1.0, 1.0, 0.5, 0.0, 0.25]
    cost = StepCost([9.0] + [0.2 + 0.8 * s if s else 0.01 for s in shares[1:]], shares)
    assert cost.dense == pytest.approx(1.0)
    assert cost.fixed == pytest.approx(0.2)
    assert cost.seconds(0.125) == pytest.approx(0.3)
    assert cost.seconds(0) == pytest.approx(0.01)
    assert cost.dense_run(40) == pytest.approx(40.0)
    assert cost.warmup == pytest.approx(8.0)


def test_first_calls_that_are_slow_are_warm_up():
    """Compilation of the first dense calls and of the first sparse ones; what is slow later was not."""
    cost = StepCost([4.0, 3.0, 1.0, 6.0, 0.6, 2.5, 1.0], [1, 1, 1, 0.5, 0.5, 1, 1])
    assert cost.dense == pytest.approx(1.0)
    assert cost.steady == pytest.approx([1.0, 1.0, 1.0, 0.6, 0.6, 2.5, 1.0])
    assert cost.warmup == pytest.approx(3.0 + 2.0 + 5.4)
    # The second evaluation may come later than the second step.
    late = StepCost([30.0, 0.0, 0.0, 5.0, 0.0, 1.0, 1.0, 5.0], [1, 0, 0, 1, 0, 1, 1, 1])
    assert late.steady == pytest.approx([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 5.0]) and late.warmup == pytest.approx(33.0)
    # The first that keeps K and V, however late that is.
    keeping = StepCost([1.0, 1.0, 1.0, 7.0, 1.0], [1] * 5, kept={3, 4})
    assert keeping.steady == pytest.approx([1.0] * 5)
    steady = StepCost([1.2, 1.0, 1.1, 0.5], [1, 1, 1, 0.5])
    assert steady.warmup == 0 and steady.steady == [1.2, 1.0, 1.1, 0.5]


def test_in_a_second_run_of_the_kind_all_seconds_count():
    """Recording CUDA graphs is slow in each run, compilation in the first alone."""
    durations, shares = [1.0, 1.0, 0.4, 0.4, 0.05, 0.05], [1, 1, *[0.01] * 4]
    first, second = StepCost(durations, shares), StepCost(durations, shares, warm=True)
    assert first.warmup == pytest.approx(0.7, abs=0.05)
    assert second.warmup == 0 and second.steady == durations
    assert second.seconds(0.01) == pytest.approx(first.seconds(0.01))


def test_what_a_sparse_step_costs_is_not_told_by_its_slow_first_calls():
    """Compiled, then recorded as a CUDA graph: the first three may be slow, as LTX-2's are on a GPU."""
    dense, slow = [1.75, 0.46, 0.46], [2.55, 0.39, 0.49]
    assert StepCost([*dense, slow[0]], [1, 1, 1, 0.01]).fixed == 0
    # So far they say nothing of whether a target can be met.
    assert not StepCost([*dense, *slow], [1, 1, 1, *[0.01] * 3]).settled
    assert StepCost([*dense, *slow, 0.05], [1, 1, 1, *[0.01] * 4]).settled
    assert StepCost([*dense, *slow, 0.05], [1, 1, 1, *[0.01] * 4]).fixed == pytest.approx(0.045, abs=0.01)
    cost = StepCost([*dense, *slow, 0.05, 0.05, 0.3], [1, 1, 1, *[0.01] * 6])
    assert cost.fixed == pytest.approx(0.05, abs=0.01)
    assert cost.steady[3:6] == pytest.approx([0.05] * 3, abs=0.01) and cost.steady[8] == 0.3


def test_before_a_sparse_step_cost_follows_the_tokens():
    cost = StepCost([2.0, 1.0], [1.0, 1.0])
    assert cost.seconds(0.25) == pytest.approx(0.25)
    assert cost.seconds(0) == 0


def test_the_target_is_measured_in_steps_of_the_pipeline_itself():
    """Calls that keep K and V take other seconds: LTX-2's less, for one kernel does there what several do."""
    durations, shares = [0.473, 0.484, 0.415, 0.423, 0.417, 0.046], [1, 1, 1, 1, 1, 0.01]
    cost = StepCost(durations, shares, warm=True, kept={2, 3, 4, 5})
    assert cost.dense == 0.417
    assert cost.dense_run(40) == pytest.approx(40 * 0.473)
    # In the process's first run the second call waits for kernels.
    cold = StepCost([0.479, 1.335, *durations[2:]], shares, kept={2, 3, 4, 5})
    assert cold.dense_run(40) == pytest.approx(40 * 0.479)
    # Alone, a first step is believed as far as keeping K and V explains it.
    assert StepCost(durations, shares, kept=range(1, 6)).dense_run(40) == pytest.approx(40 * 0.473)
    warming = StepCost([0.6, *durations[1:]], shares, kept=range(1, 6))
    assert warming.dense_run(40) == pytest.approx(40 * warming.dense)
    # Where every call keeps them, they are all there is.
    assert StepCost(durations[2:], shares[2:], kept={0, 1, 2, 3}).dense_run(40) == pytest.approx(40 * 0.417)


def test_one_slow_first_call_does_not_make_evaluations_dear():
    """LTX-2's second call waits for its kernels: by its seconds a run could afford a few evaluations only."""
    assert StepCost([0.479, 3.058], [1, 1]).dense == 0.479
    assert StepCost([0.479, 3.058, 0.415], [1, 1, 1], kept={2}).dense == 0.415
    assert StepCost([3.0, 0.4], [1, 1]).dense == 0.4


def test_steps_count_by_the_calls_that_guidance_makes():
    """Twice as long while there are two; the dense run has them where this run had them, and goes on as it is."""
    durations, shares = [2.0, 2.1, 0.0, 2.0, 1.0, 0.0, 1.0], [1, 1, 0, 1, 1, 0, 1]
    samples = dict(enumerate([2, 2, 2, 2, 1, 1, 1]))
    cost = StepCost(durations, shares, samples=samples)
    assert cost.dense == cost.seconds(1) == 1.0 and cost.warmup == 0
    assert cost.dense_run(12) == pytest.approx(4 * 2 + 8 * 1)
    before = StepCost(durations[:4], shares[:4], samples={at: 2 for at in range(4)})
    assert before.dense_run(12) == pytest.approx(24.0)


def test_cost_never_falls_with_the_share():
    cost = StepCost([1.0, 1.0, 3.0], [1.0, 1.0, 0.5])
    assert 0 <= cost.seconds(0.1) <= cost.seconds(0.5) <= cost.seconds(1)


def test_on_a_gpu_the_first_step_begins_when_all_before_it_is_done(monkeypatch):
    """Else a part of it would be hidden behind that, where the host is slower than the GPU."""
    done = []
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: done.append("waited"))
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: SimpleNamespace(record=lambda: done.append("mark")))
    clock = StepClock(torch.device("cuda"))
    clock.mark()
    clock.mark()
    assert done == ["waited", "mark", "mark"]


def test_clock_measures_between_marks():
    clock = StepClock(torch.device("cpu"))
    clock.mark()
    time.sleep(0.02)
    clock.mark()
    assert len(clock.durations()) == 1 and clock.durations()[0] >= 0.02


def test_what_is_not_a_steps_is_left_out(monkeypatch):
    """Whether it comes within a step or between two."""
    now = iter([0.0, 1.0, 1.5, 4.5, 5.0, 5.0, 7.0, 8.0])
    monkeypatch.setattr("heterostep.engine.clock.time.perf_counter", lambda: next(now))
    clock = StepClock(torch.device("cpu"))
    clock.mark()
    for _ in range(2):
        clock.mark()
        with clock.paused():
            pass
    assert clock.durations() == [1.0, 1.0]
    clock.mark()
    assert clock.durations() == [1.0, 1.0, 1.0]


def test_a_step_in_which_the_process_stood_still_counts_as_it_was_expected():
    """Stopped for the time of forty steps: else the rest of the run would be skipped."""
    cost = StepCost([1.0, 1.0, 40.0, 0.1, 1.0], [1, 1, 1, 0, 1])
    assert cost.steady == pytest.approx([1.0, 1.0, 1.0, 0.1, 1.0]) and cost.warmup == pytest.approx(39.0)
    skipped = StepCost([1.0, 1.0, 1.0, 30.0, 0.1, 0.1], [1, 1, 1, 0, 0, 0], warm=True)
    assert skipped.steady[3] == pytest.approx(0.1) and skipped.warmup == pytest.approx(29.9)
    # Of the first skipped one it is not known yet what it takes.
    assert StepCost([1.0, 1.0, 30.0], [1, 1, 0]).steady == pytest.approx([1.0, 1.0, 1.0])
    # Recording a CUDA graph takes what it takes, in each run.
    assert StepCost([0.1, 0.1, 0.1, 1.0], [1, 1, 1, 0.01], warm=True).warmup == 0


def test_on_a_gpu_what_is_not_a_steps_is_measured_by_events_too(monkeypatch):
    """Each is waited for before it is read: a callback may have left another stream current."""
    now = iter([0.0, 1000.0, 1500.0, 4500.0, 5000.0])

    class Event:
        def __init__(self, enable_timing):
            self.at, self.done = next(now), False

        def record(self):
            pass

        def synchronize(self):
            self.done = True

        def elapsed_time(self, other):
            assert self.done and other.done
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    clock.mark()
    clock.mark()
    with clock.paused():
        pass
    clock.mark()
    assert clock.durations() == [1.0, 1.0]
