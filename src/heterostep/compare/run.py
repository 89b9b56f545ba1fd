"""The whole comparison: every method at every dial value on every prompt, interleaved, resumable, into one folder."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import numpy as np
import torch

import heterostep
from heterostep.compare import summary
from heterostep.compare.folder import Folder
from heterostep.compare.judging import Judges, free_cores
from heterostep.compare.measure import Prompt, Record, generate, likeness, refuses_batch
from heterostep.compare.methods.method import Method
from heterostep.errors import HeterostepError, first_line
from heterostep.files import replacing, writing

DENSE = "dense"
CHANCE = "dense, another seed"
# Added to a prompt's seed for the dense run that the figures at chance come from.
OTHER_SEED = 7919
# Visits whose clips may wait to be judged: clips are large.
MOST_WAITING = 4
SCHEMA = 3


@dataclass(frozen=True)
class Settings:
    """What a comparison is of; a folder holds one.

    Attributes:
        model: "the bundled model", a folder or a hub id.
        options: the dense call's options: sizes, guidance, steps.
        runtimes: over the dense loop's, at which the curves are read off.
        repeats: how often everything is timed.
        points: dial values for each method that is not set by a budget.
        shown: prompts whose videos are kept.
        judged: whether the bundled model's world can judge the videos.
        batch: prompts that are generated in one call. Above 1 nothing is timed.
        seeds: noises that each caption is generated from; the prompts list them all.
        regime: name of the published settings that these are (`heterostep.compare.regimes`), or None.
    """

    model: str
    mode: str
    options: dict[str, Any]
    runtimes: tuple[float, ...]
    fps: float
    repeats: int = 1
    points: int = 4
    shown: int = 2
    judged: bool = False
    batch: int = 1
    seeds: int = 1
    regime: str | None = None

    @property
    def cost(self) -> str:
        """What the curves are against, and the asked runtimes are of: a batch's seconds are not a video's."""
        return summary.RUNTIME if self.batch == 1 else summary.EVALUATIONS


@dataclass(frozen=True)
class Visit:
    """One call of the pipeline that is to be made. `method` is None for the dense ones."""

    repeat: int
    prompts: range
    name: str
    value: float
    method: Method | None

    @property
    def keys(self) -> list[list[Any]]:
        """Of the lines in the log, one for each prompt."""
        return [[self.repeat, prompt, self.name, self.value] for prompt in self.prompts]


class _Clock:
    """How long the rest will take: as the same took before, or as all did on average."""

    def __init__(self, visits: Sequence[Visit]) -> None:
        self._left = Counter((visit.name, visit.value) for visit in visits)
        self._took: dict[tuple[str, float], list[float]] = {}

    def note(self, visit: Visit, seconds: float) -> None:
        """A visit is made."""
        kind = visit.name, visit.value
        self._left[kind] -= 1
        self._took.setdefault(kind, []).append(seconds)

    def drop(self, gone: Callable[[str, float], bool]) -> None:
        """These methods at these values are not visited again."""
        self._left = Counter({kind: count for kind, count in self._left.items() if not gone(*kind)})

    def left(self) -> float | None:
        """Seconds; None where nothing is left."""
        mean = statistics.mean(seconds for each in self._took.values() for seconds in each)
        kinds = [(count, self._took.get(kind, [mean])) for kind, count in self._left.items() if count]
        return sum(count * statistics.mean(took) for count, took in kinds) if kinds else None


def _said_left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return ", less than a minute left" if seconds < 60 else f", about {round(seconds / 60)} min left"


def sweep(method: Method, settings: Settings) -> list[float]:
    """The method's dial values in this comparison, from slow to fast."""
    if method.budget:
        return sorted({runtime for runtime in settings.runtimes if runtime < 1}, reverse=True)
    count = min(settings.points, len(method.values))
    if count == 1:
        return [method.values[-1]]
    return [method.values[round(i * (len(method.values) - 1) / (count - 1))] for i in range(count)]


@dataclass
class _Made:
    """One call's lines for the log, what is still to be added to each of them, and what to say of it."""

    lines: list[dict[str, Any]]
    said: str
    figures: list[Future[dict[str, Any]]] = field(default_factory=list)


class Comparison:
    """Runs every method on every prompt, resumable, and writes results.json.

    Args:
        pipe: the pipeline, where it is to run.
        prompts: what to generate.
        methods: with what.
        settings: see `Settings`.
        folder: where everything goes; a comparison of the same settings that was stopped goes on, also with other
            methods, and with prompts added at the end.
        command: what the user typed, for the page.
        tell: called with one line after each call of the pipeline.
        known: methods that the folder's earlier generations may be by, in the order in which all are shown.

    Raises:
        HeterostepError: the folder holds another comparison or a damaged one, or cannot be written to; prompts were
            added and a method of the folder's is not given; or the pipeline makes one video at a time.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Prompt],
        methods: Sequence[Method],
        settings: Settings,
        folder: Path,
        command: str,
        tell: Callable[[str], None] = lambda line: None,
        known: Sequence[Method] = (),
    ) -> None:
        self.pipe, self.prompts, self.methods, self.settings = pipe, prompts, methods, settings
        self.folder, self.command, self.tell = folder, command, tell
        if settings.batch > 1 and (reason := refuses_batch(pipe, prompts[0].image is not None)):
            raise HeterostepError(reason)
        self.refused = {method.name: reason for method in methods if (reason := method.refuses(pipe)) is not None}
        self._store = Folder(folder, self._content())
        self._lines = self._made_so_far()
        self.failed = {line["key"][2]: line["error"] for line in self._lines if "error" in line}
        # Values of a method's dial that cannot be met, and why.
        self.left_out = {tuple(line["key"][2:]): line["left_out"] for line in self._lines if "left_out" in line}
        names = {line["key"][2] for line in self._lines} - {DENSE, CHANCE}
        catalogue = {method.name: method for method in (*known, *methods)}
        called = {method.name for method in methods}
        # All that results are about: this call's methods, and those that earlier calls made something by.
        self.shown = [method for name, method in catalogue.items() if name in called | names]
        for name in sorted(names - set(catalogue)):
            values = {line["key"][3] for line in self._lines if line["key"][2] == name}
            self.shown.append(_unknown(name, sorted(values, reverse=True)))
        if self._store.outgrown:
            if left := [method.name for method in self.shown if method.name not in called | set(self.failed)]:
                theirs, first = ", ".join(left), self._store.prompts
                raise HeterostepError(
                    f"{folder} has {theirs} for {first} of these {len(prompts)} prompts: "
                    f"give {theirs} too, or another folder"
                )
            self._store.grow()
            # A last batch that was not full is another one now.
            self._lines = self._made_so_far()

    def _content(self) -> dict[str, Any]:
        """What the comparison is of, as its folder has it."""
        pictures = [hashlib.sha256(p.image.tobytes()).hexdigest() for p in self.prompts if p.image is not None]
        prompts = [[p.text, p.seed] for p in self.prompts]
        return json.loads(json.dumps({"settings": asdict(self.settings), "prompts": prompts, "images": pictures}))

    def _made_so_far(self) -> list[dict[str, Any]]:
        return self._store.lines(DENSE, lambda prompt: self._batch(prompt - prompt % self.settings.batch))

    def _gone(self, name: str, value: float) -> bool:
        """Whether the method is not run at the value, this time or again."""
        return name in self.failed or (name, value) in self.left_out

    def _batch(self, first: int) -> range:
        """The prompts that are generated together, of which the first is given."""
        return range(first, min(first + self.settings.batch, self._store.prompts))

    def visits(self, methods: Sequence[Method] | None = None) -> Iterator[Visit]:
        """All generations in their order: A B A B over methods, batch by batch of prompts, then all again.

        Args:
            methods: by default this call's.
        """
        for repeat in range(self.settings.repeats):
            for prompts in map(self._batch, range(0, len(self.prompts), self.settings.batch)):
                yield Visit(repeat, prompts, DENSE, 1.0, None)
                if repeat == 0:
                    yield Visit(repeat, prompts, CHANCE, 1.0, None)
                for method in self.methods if methods is None else methods:
                    if method.name not in self.refused:
                        for value in sweep(method, self.settings):
                            yield Visit(repeat, prompts, method.name, value, method)

    def run(self) -> dict[str, Any]:
        """Make what has not been made yet, and write `results.json`.

        Returns:
            its content.
        """
        visits = list(self.visits())
        made = {json.dumps(line["key"]) for line in self._lines}
        todo = [(number, v) for number, v in enumerate(visits, 1) if json.dumps(v.keys[0]) not in made]
        clock = _Clock([visit for _, visit in todo if not self._gone(visit.name, visit.value)])
        # One video at a time is timed, so nothing may run beside it.
        processes = free_cores() if self.settings.batch > 1 else 0
        judges = Judges(processes if processes > 1 else 0)
        waiting: deque[_Made] = deque()
        try:
            for number, visit in todo:
                if self._gone(visit.name, visit.value):
                    continue
                if self._lines and visit.name == DENSE:
                    # What is known so far, should this be stopped.
                    self._write(complete=False)
                started = time.monotonic()
                waiting.append(self._make(visit, judges))
                said = waiting[-1].said
                self._settle(waiting, MOST_WAITING)
                clock.note(visit, time.monotonic() - started)
                clock.drop(self._gone)
                said += _said_left(clock.left())
                first, last = visit.prompts[0] + 1, visit.prompts[-1] + 1
                who = f"prompt {first}" if first == last else f"prompts {first}-{last}"
                self.tell(f"{number}/{len(visits)} {who} {visit.name} {visit.value:g}: {said}")
            self._settle(waiting, 0)
        finally:
            judges.close()
        return self._write(complete=self._complete())

    def _complete(self) -> bool:
        """Whether nothing is missing, also of the methods that only earlier calls were of."""
        made = {json.dumps(line["key"]) for line in self._lines}
        kept = [visit for visit in self.visits(self.shown) if not self._gone(visit.name, visit.value)]
        return all(json.dumps(key) in made for visit in kept for key in visit.keys)

    def _settle(self, waiting: deque[_Made], most: int) -> None:
        """Log what has been judged, in order; wait until at most so many are left."""
        while waiting and (len(waiting) > most or all(figures.done() for figures in waiting[0].figures)):
            made = waiting.popleft()
            for line, figures in zip(made.lines, made.figures):
                line |= figures.result()
            self._lines += made.lines
            self._store.append(made.lines)

    def _write(self, complete: bool) -> dict[str, Any]:
        results = self._results() | {"complete": complete}
        self._store.write_results(results)
        return results

    def _make(self, visit: Visit, judges: Judges) -> _Made:
        prompts = [self.prompts[at] for at in visit.prompts]
        if visit.name == CHANCE:
            prompts = [replace(prompt, seed=prompt.seed + OTHER_SEED) for prompt in prompts]
        try:
            made = generate(self.pipe, prompts, visit.method, visit.value, self.settings.options)
        except Exception as error:
            if visit.method is None:
                raise
            if isinstance(error, HeterostepError):
                # A budget that cannot be met: the curve does not reach it.
                reason = self.left_out[visit.name, visit.value] = first_line(error)
                return _Made([{"key": visit.keys[0], "left_out": reason}], f"left out: {reason}")
            # Somebody else's method may fail in any way; the others go on.
            self.failed[visit.name] = f"{type(error).__name__}: {first_line(error)}"
            return _Made([{"key": visit.keys[0], "error": self.failed[visit.name]}], self.failed[visit.name])
        timed = self.settings.cost == summary.RUNTIME
        cost = {"seconds": made.seconds if timed else None, "rows": made.rows}
        cost["peak_bytes"] = made.peak_bytes if timed else None
        done = _Made([{"key": key, **cost} for key in visit.keys], f"{made.seconds:.1f} s")
        if visit.repeat == 0:
            maps = [None] * len(prompts) if made.steps_maps is None else made.steps_maps
            for prompt, line, clip, steps_map in zip(prompts, done.lines, made.clips, maps):
                done.figures.append(self._judge(visit, prompt, line, clip, steps_map, judges))
        return done

    def _judge(
        self,
        visit: Visit,
        prompt: Prompt,
        line: dict[str, Any],
        clip: np.ndarray,
        steps_map: np.ndarray | None,
        judges: Judges,
    ) -> Future[dict[str, Any]]:
        """Add to a line what is known of its clip, uint8 [F, H, W, 3], and keep that.

        Returns:
            what is known later.
        """
        position = line["key"][1]
        kept = self._store.dense(position)
        if visit.name == DENSE:
            with writing(kept), replacing(kept) as part, part.open("wb") as file:
                np.save(file, clip)
        line |= likeness(clip, np.load(kept), self.pipe.device)
        if position < self.settings.shown:
            from heterostep.video import write_video
            from heterostep.viz import write_heatmap

            name = f"videos/{position}-{_slug(visit.name)}-{visit.value:g}"
            line["video"] = f"{name}.mp4"
            path = self.folder / line["video"]
            with writing(path):
                write_video(path, clip, self.settings.fps)
            if steps_map is not None:
                line["heatmap"] = f"{name}.png"
                path = self.folder / line["heatmap"]
                with writing(path):
                    write_heatmap(path, clip, steps_map, self.settings.fps)
        return judges.judge(clip, kept, prompt.text if self.settings.judged else None)

    def _records(self) -> list[Record]:
        cells: dict[tuple[int, str, float], list[dict[str, Any]]] = {}
        for line in self._lines:
            _, prompt, name, value = line["key"]
            if not self._gone(name, value):
                cells.setdefault((prompt, name, value), []).append(line)
        dense = {prompt: lines for (prompt, name, _), lines in cells.items() if name == DENSE}
        # A bound is about the budget that it is set to, whatever it costs.
        bounds = {method.name for method in self.shown if method.diagnostic}
        records = []
        for (prompt, name, value), lines in cells.items():
            first, seconds, runtime = lines[0], None, None
            if self.settings.cost == summary.RUNTIME:
                seconds = [line["seconds"] for line in lines]
                of_dense = statistics.median(line["seconds"] for line in dense[prompt])
                runtime = value if name in bounds else statistics.median(seconds) / of_dense
            evaluations = first["rows"] / dense[prompt][0]["rows"]
            optional = ("vmaf", "caption", "displacement", "flicker", "activity", "video", "heatmap")
            records.append(
                Record(
                    method=name,
                    value=value,
                    prompt=prompt,
                    seconds=seconds,
                    runtime=runtime,
                    evaluations=value if name in bounds else evaluations,
                    peak_bytes=first["peak_bytes"],
                    psnr=first["psnr"],
                    ssim=first["ssim"],
                    lpips=first["lpips"],
                    **{key: first.get(key) for key in optional},
                )
            )
        return records

    def _first(self, key: str) -> Any:
        """The first value of a key that is in some lines of the log; None where it is in none."""
        return next((line[key] for line in self._lines if line.get(key)), None)

    def _results(self) -> dict[str, Any]:
        records = [record.to_dict() for record in self._records()]
        dense, chance = ([r for r in records if r["method"] == name] for name in (DENSE, CHANCE))
        rest = [r for r in records if r["method"] not in (DENSE, CHANCE)]
        cost = self.settings.cost
        names = [method.name for method in self.shown]
        lines = sorted(summary.curves(rest, dense, cost), key=lambda line: names.index(line["method"]))
        bounds = [method.name for method in self.shown if method.diagnostic]
        options = self.settings.options
        sizes = ("num_inference_steps", "height", "width", "num_frames", "guidance_scale")
        return {
            "schema": SCHEMA,
            "complete": True,
            "command": self.command,
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name() if self.pipe.device.type == "cuda" else None,
                "platform": platform.platform(),
            },
            "versions": {
                "heterostep": heterostep.__version__,
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "python": sys.version.split()[0],
            },
            "settings": {name: options.get(name) for name in sizes}
            | {"model": self.settings.model, "mode": self.settings.mode, "fps": self.settings.fps}
            | {"runtimes": list(self.settings.runtimes), "repeats": self.settings.repeats}
            | {"cost": cost, "batch": self.settings.batch, "seeds": self.settings.seeds}
            | {"regime": self.settings.regime},
            "prompts": [{"prompt": p.text, "seed": p.seed} for p in self.prompts],
            "methods": [self._account(method, rest) for method in self.shown],
            **{name: self._first(name) for name in ("lpips_missing", "vmaf_missing")},
            "dense": dense,
            "chance": chance,
            "generations": rest,
            "curves": lines,
            "frontier": summary.frontier(lines, self.settings.runtimes, bounds, cost),
        }

    def _account(self, method: Method, records: list[dict[str, Any]]) -> dict[str, Any]:
        made = Counter(record["value"] for record in records if record["method"] == method.name)
        refused, failed = self.refused.get(method.name), self.failed.get(method.name)
        reasons = [each for each in (refused, failed) if each]
        reasons += [f"without {value:g}: {why}" for (name, value), why in self.left_out.items() if name == method.name]
        if method not in self.methods and made and min(made.values()) < len(self.prompts):
            reasons.append(f"stopped after {min(made.values())} of {len(self.prompts)} prompts, and not gone on with")
        # What an earlier call made is there, also where this one could not.
        status = "failed" if failed else "ran" if made or not reasons else "not supported"
        return {
            "name": method.name,
            "label": method.label,
            "dial": method.dial,
            "status": status,
            "reason": "; ".join(reasons) or None,
            "diagnostic": method.diagnostic,
            "whole_batch": method.whole_batch,
        }


def _unknown(name: str, values: Sequence[float]) -> Method:
    """A method that is known by its generations alone, which are at these values of its dial."""

    def apply(pipe: Any, value: float, num_steps: int) -> NoReturn:
        raise HeterostepError(f"no such method: {name}")

    return Method(name, name, "its dial", tuple(values), apply)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
