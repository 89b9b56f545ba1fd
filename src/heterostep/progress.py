"""A run's progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from heterostep import interrupts
from heterostep.config import HSAConfig
from heterostep.engine.report import StepInfo


def describe(info: StepInfo, config: HSAConfig) -> str:
    """Where a run is and where it will end, on one line that fits beside a short bar in 80 columns."""
    made = {0.0: "skipped", 1.0: "evaluated"}.get(info.active_share, f"{info.active_share:.2f} tokens")
    text = f"{info.step + 1}/{info.num_inference_steps}, {made}, {info.elapsed_seconds:.1f} s"
    ends = info.projected_share if config.runtime is None else info.projected_runtime
    if config.target == 1 or ends is None:
        return text
    what = "share " if config.runtime is None else ""
    return f"{text}, ends at {what}{ends:.2f} of dense (asked {config.target:.2f})"


class RunProgress:
    """Call it with each `StepInfo` of one generation, inside a with block.

    Args:
        name: what is being generated.
        config: the run's dial, for the target.
        quiet: show nothing.
    """

    def __init__(self, name: str, config: HSAConfig, quiet: bool = False) -> None:
        self.name, self.config = name, config
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(10),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task(name, total=None, text="encoding the prompt")

    def __enter__(self) -> RunProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.update(self.task, description=self.name)
        self.bar.stop()

    def __call__(self, info: StepInfo) -> None:
        interrupts.check()
        done, total = info.step + 1, info.num_inference_steps
        text = describe(info, self.config)
        self.bar.update(self.task, completed=done, total=total, text=text)
        if done == total:
            self.bar.update(self.task, description="decoding")
        # Some ten lines tell a log enough.
        if not self.console.is_terminal and (done * 10 // total > info.step * 10 // total or done == 1):
            self.console.print(f"{self.name} {text}", soft_wrap=True)
