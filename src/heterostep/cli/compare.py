"""`heterostep compare`."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heterostep import making
from heterostep.cli.options import (
    DEVICE_HELP,
    DTYPE_HELP,
    MOST_STEPS,
    check_folder,
    check_guidance,
    out_of_memory,
    silence,
    those_given,
    why_foreign,
)
from heterostep.devices import Dtype, device_of, precision_of
from heterostep.errors import HeterostepError
from heterostep.files import writing
from heterostep.order import check_model, default_steps

if TYPE_CHECKING:
    from heterostep.compare.measure import Prompt
    from heterostep.compare.run import Settings

# To make so many and hold them takes a moment; a comparison of them takes weeks.
MOST_CAPTIONS = 10_000
USUAL_COUNT = 2


def compare(
    out: Annotated[Path, typer.Option(help="Folder; a comparison that was stopped goes on.")] = Path("report"),
    prompts: Annotated[
        Path | None, typer.Option(help="File, a prompt a line.  [default: the model's held-out ones]")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_CAPTIONS, help="Number of held-out captions, without --prompts.  [default: 2]"),
    ] = None,
    image_to_video: Annotated[
        bool, typer.Option("--image-to-video", help="Start from first frames; in --prompts their paths follow a tab.")
    ] = False,
    runtimes: Annotated[str, typer.Option(help="Targets as fractions of dense, comma-separated.")] = "1,0.75,0.5,0.25",
    methods: Annotated[str, typer.Option(help="Comma-separated names, or all.")] = "all",
    points: Annotated[
        int, typer.Option(min=1, help="Number of threshold values swept for methods that have no budget.")
    ] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is timed.")] = 1,
    batch: Annotated[
        int,
        typer.Option(
            min=1, help="Prompts per pipeline call. Above 1, cost is counted in token evaluations instead of seconds."
        ),
    ] = 1,
    seeds: Annotated[int, typer.Option(min=1, max=10**6, help="Seeds per prompt.")] = 1,
    videos: Annotated[int, typer.Option(min=0, help="Prompts whose videos are shown.")] = 2,
    regime: Annotated[
        str | None,
        typer.Option(
            help="Settings of published checkpoints, comma-separated names or all: one comparison each. "
            "Or of your own, as in euler-25-shift-7-guidance-5."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers folder or hub id.  [default: the bundled model]")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_STEPS, help="Steps of the dense run.  [default: the model's, or 40]")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.  [default: the model's]")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.  [default: the model's]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the video.  [default: the model's]")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Seed of the first prompt; the next one has the next.")
    ] = 0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: Annotated[Dtype, typer.Option(help=DTYPE_HELP)] = Dtype.auto,
    vbench: Annotated[
        bool, typer.Option("--vbench", help="Add scores by the vbench command; keeps the videos of all prompts.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print neither progress nor table.")] = False,
) -> None:
    """Draw the quality-runtime frontier of heterostep and its peers on one model."""
    wanted = _runtimes(runtimes)
    _check(out, prompts, count, model, regime, steps, guidance, batch, repeats, vbench)
    making.check_known_sizes(model, height, width, frames)
    from heterostep.compare.methods import METHODS
    from heterostep.compare.run import Settings

    task = "image" if image_to_video else "text"
    todo_regimes = [] if regime is None else _regimes(regime, task)
    chosen = _methods(methods, METHODS)
    source = _Source(model, prompts, count or USUAL_COUNT, seed, seeds, image_to_video)
    source.check(quiet)
    asked = {"height": height, "width": width, "num_frames": frames, "guidance_scale": guidance}
    with silence(), out_of_memory("lower the size or --batch, or take a smaller --dtype"):
        place = device_of(device)
        pipe, defaults = making.load(model, image_to_video, precision_of(dtype, place))
        options = _options(pipe, defaults, asked, steps or default_steps(model))
        todo = source.read(options["width"], options["height"])
        pipe.to(place)
        settings = Settings(
            model="the bundled model" if model is None else model,
            mode=task,
            options=options,
            runtimes=wanted,
            fps=defaults["fps"],
            repeats=repeats,
            points=points,
            shown=max(videos, len(todo)) if vbench else videos,
            judged=model is None and prompts is None,
            batch=batch,
            seeds=seeds,
        )
        run = _Run(pipe, todo, chosen, settings, out, (lambda line: None) if quiet else _tell)
        if regime is not None:
            written, show = _compare_regimes(run, todo_regimes, regime.strip() == "all")
        else:
            written, show = _compare_one(run, videos if vbench else None)
    if not quiet:
        show()
        typer.echo(f"{written}")


def _check(
    out: Path,
    prompts: Path | None,
    count: int | None,
    model: str | None,
    regime: str | None,
    steps: int | None,
    guidance: float | None,
    batch: int,
    repeats: int,
    vbench: bool,
) -> None:
    """Check that the options go together, and what they name is there."""
    if batch > 1 and repeats > 1:
        raise HeterostepError("--repeats is for timings, and a batch is not timed: leave out --repeats or --batch")
    given = those_given({"--steps": steps is not None, "--guidance": guidance is not None, "--vbench": vbench})
    if regime is not None and given:
        raise HeterostepError(f"--regime has settings of its own: leave out {given}")
    check_guidance("--guidance", guidance)
    check_folder(out)
    if prompts is not None and prompts.is_dir():
        raise HeterostepError(f"{prompts} is a folder, not a file of prompts")
    if prompts is not None and not prompts.is_file():
        raise HeterostepError(f"{prompts} {'is not a file of prompts' if prompts.exists() else 'does not exist'}")
    if prompts is not None and count is not None:
        raise HeterostepError("--count is of held-out captions: leave out --count or --prompts")
    check_model(model)
    if missing := [name for name in ("torchmetrics", "jinja2") if importlib.util.find_spec(name) is None]:
        raise HeterostepError(
            f"the comparison needs {' and '.join(missing)}: pip install '.[compare]' in heterostep's checkout"
        )
    if vbench:
        from heterostep.compare import vbench as scores

        scores.command()


@dataclass(frozen=True)
class _Source:
    """Where the prompts come from: a file, a model's folder, or the bundled model's world."""

    model: str | None
    file: Path | None
    count: int
    seed: int
    seeds: int
    with_image: bool

    def check(self, quiet: bool) -> None:
        """Find faults before the model is loaded, which knows the size that first frames of a file are cropped to."""
        from heterostep.compare import prompts

        if self.file is not None:
            read = prompts.read_prompts(self.file, self.seed, (1, 1) if self.with_image else None)
            if self.model is None and not quiet:
                _tell_of_foreign([prompt.text for prompt in read])
        elif self.model is not None:
            prompts.held_out_of(self.model, self.count, self.seed, self.with_image)

    def read(self, width: int, height: int) -> list[Prompt]:
        """The prompts, with all their seeds."""
        from heterostep.compare import prompts

        if self.file is not None:
            found = prompts.read_prompts(self.file, self.seed, (width, height) if self.with_image else None)
        elif self.model is not None:
            found = prompts.held_out_of(self.model, self.count, self.seed, self.with_image)
        else:
            found = prompts.held_out(self.count, self.seed, self.with_image)
        return prompts.with_seeds(found, self.seeds)


def _options(pipe: Any, defaults: dict[str, Any], asked: dict[str, Any], steps: int) -> dict[str, Any]:
    """The dense call's options; None is the model's."""
    from heterostep import checkpoints

    options = {name: defaults[name] if value is None else value for name, value in asked.items()}
    checkpoints.check_sizes(pipe, **{name: options[name] for name in making.SIZES})
    return options | {"num_inference_steps": steps}


@dataclass(frozen=True)
class _Run:
    """What is to be compared, as `heterostep.compare.run.Comparison` takes it."""

    pipe: Any
    prompts: list[Prompt]
    methods: list[Any]
    settings: Settings
    out: Path
    tell: Callable[[str], None]

    @property
    def command(self) -> str:
        return "heterostep " + " ".join(map(shlex.quote, sys.argv[1:]))


def _compare_regimes(run: _Run, wanted: list[Any], where_possible: bool) -> tuple[Path, Callable[[], None]]:
    """One comparison for each regime.

    Args:
        where_possible: leave out the regimes that the pipeline refuses.

    Returns:
        the page, and what shows the results on the terminal.
    """
    from heterostep.compare import matrix, regimes
    from heterostep.compare.methods import METHODS

    if where_possible:
        wanted = [each for each in wanted if regimes.refuses(run.pipe, each) is None]
    written = matrix.compare_regimes(
        run.pipe, run.prompts, run.methods, wanted, run.settings, run.out, run.command, run.tell, list(METHODS.values())
    )
    found = matrix.read(run.out)
    _check_compared([found[each.name] for each in wanted], run.out)
    return written, lambda: typer.echo(matrix.table(matrix.matrix(found, run.settings.runtimes)))


def _compare_one(run: _Run, scored: int | None) -> tuple[Path, Callable[[], None]]:
    """One comparison in the model's own settings; `scored` prompts keep their videos once VBench has scored all.

    Returns:
        as `_compare_regimes`.
    """
    from heterostep.compare import page, table
    from heterostep.compare.methods import METHODS
    from heterostep.compare.methods.calibration import calibrate_with
    from heterostep.compare.run import Comparison

    calibrate_with(run.pipe, **{name: run.settings.options[name] for name in (*making.SIZES, "guidance_scale")})
    known = list(METHODS.values())
    results = Comparison(run.pipe, run.prompts, run.methods, run.settings, run.out, run.command, run.tell, known).run()
    if scored is not None:
        import torch

        from heterostep.compare import vbench

        # VBench has networks of its own to put there.
        run.pipe.to("cpu")
        torch.cuda.empty_cache()
        results = vbench.score(run.out, scored, run.tell)
    with writing(run.out / "index.html"):
        written = page.write_page(run.out)
    _check_compared([results], run.out)
    return written, lambda: table.show(results)


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _check_compared(results: list[dict[str, Any]], out: Path) -> None:
    """Check that any method could be run anywhere."""
    if not any(each["curves"] for each in results):
        reasons = dict.fromkeys(f"{each['name']}: {each['reason']}" for made in results for each in made["methods"])
        raise HeterostepError(f"nothing could be compared ({'; '.join(reasons)}); the dense videos are in {out}")


def _tell_of_foreign(prompts: list[str]) -> None:
    """A note of those that the bundled model cannot follow."""
    foreign = [(prompt, reason) for prompt in prompts if (reason := why_foreign(prompt))]
    if foreign:
        prompt, reason = foreign[0]
        typer.echo(
            f"note: the bundled model knows drawn shapes only, and cannot follow {len(foreign)} of {len(prompts)} "
            f"prompts, such as {prompt!r} ({reason}); for others give --model",
            err=True,
        )


def _runtimes(text: str) -> tuple[float, ...]:
    try:
        values = tuple(sorted({float(part) for part in text.split(",")}, reverse=True))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 1 for value in values):
        raise HeterostepError(f"--runtimes expects numbers above 0 and at most 1, as in 1,0.5,0.25, not {text!r}")
    return values


def _regimes(text: str, task: str) -> list[Any]:
    from heterostep.compare.regimes import named, suited

    if text.strip() == "all":
        return suited(task)
    names = [name.strip() for name in text.split(",") if name.strip()]
    found = [named(name) for name in dict.fromkeys(names or [text])]
    if long := [regime.name for regime in found if regime.steps > MOST_STEPS]:
        raise HeterostepError(f"{long[0]} has more than {MOST_STEPS} steps")
    return found


def _methods(text: str, known: dict[str, Any]) -> list[Any]:
    names = list(known) if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise HeterostepError(f"--methods names none; the methods are {', '.join(known)}")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise HeterostepError(f"no such method: {', '.join(unknown)}; the methods are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]
