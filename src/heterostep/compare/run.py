"""The whole comparison: every method at every dial value on every prompt, interleaved, resumable, into one folder."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import heterostep
from heterostep.compare import summary
from heterostep.compare.measure import Prompt, Record, generate, likeness, world_scores
from heterostep.compare.method import Method
from heterostep.errors import HeterostepError, first_line
from heterostep.files import replacing

DENSE = "dense"
CHANCE = "dense, another seed"
# Added to a prompt's seed for the dense run that the figures at chance come from.
OTHER_SEED = 7919
SCHEMA = 1


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


@dataclass(frozen=True)
class Visit:
    """One generation that is to be made. `method` is None for the dense ones."""

    repeat: int
    prompt: int
    name: str
    value: float
    method: Method | None

    @property
    def key(self) -> list[Any]:
        return [self.repeat, self.prompt, self.name, self.value]


def sweep(method: Method, settings: Settings) -> list[float]:
    """The method's dial values in this comparison, from slow to fast."""
    if method.budget:
        return sorted({runtime for runtime in settings.runtimes if runtime < 1}, reverse=True)
    count = min(settings.points, len(method.values))
    if count == 1:
        return [method.values[-1]]
    return [method.values[round(i * (len(method.values) - 1) / (count - 1))] for i in range(count)]


class Comparison:
    """Args:
    pipe: the pipeline, where it is to run.
    prompts: what to generate.
    methods: with what.
    settings: see `Settings`.
    folder: where everything goes; a comparison of the same settings that was stopped goes on.
    command: what the user typed, for the page.
    tell: called with one line after each generation.

    Raises:
        HeterostepError: the folder holds another comparison.
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
    ) -> None:
        self.pipe, self.prompts, self.methods, self.settings = pipe, prompts, methods, settings
        self.folder, self.command, self.tell = folder, command, tell
        self.refused = {method.name: reason for method in methods if (reason := method.refuses(pipe)) is not None}
        self.failed: dict[str, str] = {}
        self._lines: list[dict[str, Any]] = []
        self._open()

    def _open(self) -> None:
        """Make the folder, or take up what is in it."""
        pictures = [hashlib.sha256(p.image.tobytes()).hexdigest() for p in self.prompts if p.image is not None]
        prompts = [[p.text, p.seed] for p in self.prompts]
        mine = json.loads(json.dumps({"settings": asdict(self.settings), "prompts": prompts, "images": pictures}))
        known = self.folder / "settings.json"
        (self.folder / "videos").mkdir(parents=True, exist_ok=True)
        (self.folder / "work").mkdir(exist_ok=True)
        if known.is_file():
            if json.loads(known.read_text()) != mine:
                raise HeterostepError(f"{self.folder} holds another comparison: give another folder, or remove it")
        else:
            with replacing(known) as part:
                part.write_text(json.dumps(mine, indent=1) + "\n")
        log = self.folder / "work" / "generations.jsonl"
        if log.is_file():
            # A line that was being written when the run was stopped is made again.
            for text in log.read_text().splitlines():
                try:
                    self._lines.append(json.loads(text))
                except ValueError:
                    continue
            with replacing(log) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        for line in self._lines:
            if line.get("error"):
                self.failed[line["key"][2]] = line["error"]

    def visits(self) -> Iterator[Visit]:
        """All generations in their order: A B A B over methods, prompt by prompt, then all again."""
        for repeat in range(self.settings.repeats):
            for prompt in range(len(self.prompts)):
                yield Visit(repeat, prompt, DENSE, 1.0, None)
                if repeat == 0:
                    yield Visit(repeat, prompt, CHANCE, 1.0, None)
                for method in self.methods:
                    if method.name not in self.refused:
                        for value in sweep(method, self.settings):
                            yield Visit(repeat, prompt, method.name, value, method)

    def run(self) -> dict[str, Any]:
        """Make what has not been made yet, and write `results.json`.

        Returns:
            its content.
        """
        visits = list(self.visits())
        made = {json.dumps(line["key"]) for line in self._lines}
        for position, visit in enumerate(visits):
            if json.dumps(visit.key) in made or visit.name in self.failed:
                continue
            if self._lines and visit.name == DENSE:
                # What is known so far, should this be stopped.
                self._write(complete=False)
            line = self._make(visit)
            self._lines.append(line)
            with (self.folder / "work" / "generations.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            said = line.get("error") or f"{line['seconds']:.1f} s"
            self.tell(f"{position + 1}/{len(visits)} prompt {visit.prompt + 1} {visit.name} {visit.value:g}: {said}")
        return self._write(complete=True)

    def _write(self, complete: bool) -> dict[str, Any]:
        results = self._results() | {"complete": complete}
        with replacing(self.folder / "results.json") as part:
            part.write_text(json.dumps(results, indent=1) + "\n")
        return results

    def _make(self, visit: Visit) -> dict[str, Any]:
        prompt = self.prompts[visit.prompt]
        if visit.name == CHANCE:
            prompt = Prompt(prompt.text, prompt.seed + OTHER_SEED, prompt.image)
        try:
            made = generate(self.pipe, prompt, visit.method, visit.value, self.settings.options)
        except Exception as error:
            if visit.method is None:
                raise
            # Somebody else's method may fail in any way; the others go on.
            self.failed[visit.name] = f"{type(error).__name__}: {first_line(error)}"
            return {"key": visit.key, "error": self.failed[visit.name]}
        line: dict[str, Any] = {"key": visit.key, "seconds": made.seconds, "rows": made.rows}
        line["peak_bytes"] = made.peak_bytes
        if visit.repeat == 0:
            kept = self.folder / "work" / f"dense-{visit.prompt}.npy"
            if visit.name == DENSE:
                with replacing(kept) as part, part.open("wb") as file:
                    np.save(file, made.clip)
            line |= likeness(made.clip, np.load(kept), self.pipe.device)
            if self.settings.judged:
                line |= world_scores(made.clip, prompt.text)
            if visit.prompt < self.settings.shown:
                from heterostep.video import write_video
                from heterostep.viz import write_heatmap

                name = f"videos/{visit.prompt}-{_slug(visit.name)}-{visit.value:g}"
                line["video"] = f"{name}.mp4"
                write_video(self.folder / line["video"], made.clip, self.settings.fps)
                if made.steps_map is not None:
                    line["heatmap"] = f"{name}.png"
                    write_heatmap(self.folder / line["heatmap"], made.clip, made.steps_map, self.settings.fps)
        return line

    def _records(self) -> list[Record]:
        cells: dict[tuple[int, str, float], list[dict[str, Any]]] = {}
        for line in self._lines:
            _, prompt, name, value = line["key"]
            if name not in self.failed:
                cells.setdefault((prompt, name, value), []).append(line)
        dense = {prompt: lines for (prompt, name, _), lines in cells.items() if name == DENSE}
        # A bound is about the budget that it is set to, whatever it costs.
        bounds = {method.name for method in self.methods if method.diagnostic}
        records = []
        for (prompt, name, value), lines in cells.items():
            first, seconds = lines[0], [line["seconds"] for line in lines]
            of_dense = statistics.median(line["seconds"] for line in dense[prompt])
            runtime, evaluations = statistics.median(seconds) / of_dense, first["rows"] / dense[prompt][0]["rows"]
            optional = ("caption", "displacement", "flicker", "video", "heatmap")
            records.append(
                Record(
                    method=name,
                    value=value,
                    prompt=prompt,
                    seconds=seconds,
                    runtime=value if name in bounds else runtime,
                    evaluations=value if name in bounds else evaluations,
                    peak_bytes=first["peak_bytes"],
                    psnr=first["psnr"],
                    ssim=first["ssim"],
                    lpips=first["lpips"],
                    **{key: first.get(key) for key in optional},
                )
            )
        return records

    def _results(self) -> dict[str, Any]:
        records = [record.to_dict() for record in self._records()]
        dense, chance = ([r for r in records if r["method"] == name] for name in (DENSE, CHANCE))
        rest = [r for r in records if r["method"] not in (DENSE, CHANCE)]
        lines = summary.curves(rest, dense)
        bounds = [method.name for method in self.methods if method.diagnostic]
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
                "diffusers": __import__("diffusers").__version__,
                "python": sys.version.split()[0],
            },
            "settings": {name: options.get(name) for name in sizes}
            | {"model": self.settings.model, "mode": self.settings.mode, "fps": self.settings.fps}
            | {"runtimes": list(self.settings.runtimes), "repeats": self.settings.repeats},
            "prompts": [{"prompt": p.text, "seed": p.seed} for p in self.prompts],
            "methods": [self._account(method) for method in self.methods],
            "dense": dense,
            "chance": chance,
            "generations": rest,
            "curves": lines,
            "frontier": summary.frontier(lines, self.settings.runtimes, bounds),
        }

    def _account(self, method: Method) -> dict[str, Any]:
        refused, failed = self.refused.get(method.name), self.failed.get(method.name)
        status = "not supported" if refused else "failed" if failed else "ran"
        return {"name": method.name, "label": method.label, "dial": method.dial, "status": status,
                "reason": refused or failed, "diagnostic": method.diagnostic}  # fmt: skip


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
