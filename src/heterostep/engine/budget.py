"""What is left to spend: the rest of a run, planned anew after each step within its share or its seconds."""

from __future__ import annotations

from heterostep.engine.clock import StepCost
from heterostep.engine.generation import Generation
from heterostep.engine.schedule import TOLERANCE


def fitted_cost(generation: Generation) -> tuple[StepCost, list[float]] | None:
    """Step costs fitted to what has been timed, and those seconds; None before the first dense step has ended."""
    durations = generation.clock.durations()
    shares = [count / generation.total for count in generation.counts[: len(durations)]]
    if not any(share == 1 for share in shares):
        return None
    return StepCost(durations, shares, generation.warm, generation.kept, generation.samples_by_step), durations


def out_of_reach(generation: Generation, cost: StepCost) -> bool:
    """Whether the fewest evaluations that a run can make would take longer than its target in seconds."""
    runtime, schedule = generation.config.runtime, generation.schedule
    tokens = schedule.run.tokens
    if runtime is None or not tokens.least or not cost.settled:
        return False
    fewest = sum(cost.seconds(count / tokens.total) for count in schedule.policy.plan(0))
    return fewest > (1 + TOLERANCE) * runtime * cost.plain * schedule.run.num_steps


def plan_anew(generation: Generation) -> None:
    """After a step: the rest of the run within what is left of the share, or of the seconds."""
    schedule, step = generation.schedule, generation.step
    begin = schedule.anew_from(generation.counts, step)
    late = begin is None and schedule.has_no_dense_ahead(generation.counts, step)
    if late:
        begin = step + 1
    elif begin is None:
        return
    if generation.config.runtime is None:
        generation.counts = schedule.within_share(generation.counts, begin, generation.changes)
        return
    generation.clock.agree()
    fitted = fitted_cost(generation)
    if fitted is None:
        return
    cost, durations = fitted
    if out_of_reach(generation, cost):
        # To leave out all that can be would cost the video, and not meet the target either.
        generation.counts = schedule.within_share(generation.counts, begin, generation.changes)
        return
    planned = [cost.seconds(count / generation.total) for count in generation.counts[:begin]]
    # What has been made counts as it was timed, what comes before the new plan as it is expected.
    made = min(len(durations), begin)
    target = generation.config.runtime * cost.dense_run(schedule.run.num_steps)
    left = target - sum(cost.steady[:made]) - sum(planned[made:])
    if not schedule.policy.sparse:
        left += min(cost.dense / 2, TOLERANCE * target)

    def seconds(count: int) -> float:
        return cost.seconds(count / generation.total)

    replan = schedule.with_seconds_left if late else schedule.within_seconds
    generation.counts = replan(generation.counts, begin, generation.changes, left, seconds)
