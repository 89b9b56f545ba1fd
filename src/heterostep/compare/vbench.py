"""VBench's scores of a comparison's videos, from the user's own `vbench` command (github.com/Vchitect/VBench)."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterostep.compare import summary
from heterostep.errors import HeterostepError
from heterostep.files import replacing, writing

# Those that VBench has for any video (mode custom_input): none of them reads the prompt.
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
# VBench gives imaging quality as 0..100 for a video, and as 0..1 for the mean alone.
_SCALE = {"imaging_quality": 0.01}
# What torch's launcher says of a process that failed, after the process has said why.
_LAUNCHER = ("ChildFailedError", "CalledProcessError")
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$")

Results = dict[str, Any]
Scores = dict[str, dict[str, float]]


def command() -> str:
    """The path of the `vbench` command.

    Raises:
        HeterostepError: it is not on the PATH; says how to install it.
    """
    found = shutil.which("vbench")
    if found is None:
        # It pins numpy 1 and a transformers that no pipeline here runs with.
        how = "pip install vbench, in an environment of its own"
        raise HeterostepError(f"vbench needs the vbench command, which is not on the PATH: {how}", "vbench")
    return found


@dataclass(frozen=True)
class Evaluation:
    """One call of VBench: the videos of a method at one setting of its dial, one or more for each prompt."""

    method: str
    value: float
    records: list[dict[str, Any]]

    @property
    def name(self) -> str:
        plain = "".join(c if c.isalnum() else "-" for c in self.method)
        return f"{plain}-{self.value:g}"

    @property
    def videos(self) -> list[str]:
        return [record["video"] for record in self.records]


def evaluations(results: Results) -> list[Evaluation]:
    """What is to be evaluated: dense, dense of another seed, then every method at every value."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in [*results["dense"], *results["chance"], *results["generations"]]:
        if record["video"] is not None:
            cells.setdefault((record["method"], record["value"]), []).append(record)
    return [Evaluation(method, value, records) for (method, value), records in cells.items()]


def score(folder: Path, shown: int, tell: Callable[[str], None] = lambda line: None) -> Results:
    """Have VBench evaluate all videos of a finished comparison, and write its scores into `results.json`.

    What VBench has written is kept in `work/vbench`, and not done again. A call that fails costs its own scores alone.

    Args:
        folder: of the comparison; every prompt's videos are kept.
        shown: prompts whose videos the page shows.
        tell: called with one line after each evaluation.

    Returns:
        the content of `results.json`: with a `vbench` of its own, and in every record and point.
    """
    program = command()
    results = json.loads((folder / "results.json").read_text())
    complete = results["complete"]
    results["settings"]["shown"] = shown
    prompts = [prompt["prompt"] for prompt in results["prompts"]]
    failed: list[dict[str, Any]] = []
    results["vbench"] = {"dimensions": list(DIMENSIONS), "failed": failed}
    _write(folder, results, complete=False)
    todo = evaluations(results)
    for position, evaluation in enumerate(todo, 1):
        scores, said = _known(folder, evaluation), None
        if scores is None:
            try:
                scores = _evaluate(program, folder, evaluation, prompts)
                said = f"{statistics.mean(statistics.mean(parts.values()) for parts in scores.values()):.3f}"
            except (HeterostepError, OSError) as error:
                said = str(error)
                failed.append({"method": evaluation.method, "value": evaluation.value, "reason": said})
        for record in evaluation.records:
            record["vbench"] = scores and scores[Path(record["video"]).name]
        _write(folder, results, complete=False)
        if said is not None:
            tell(f"{position}/{len(todo)} VBench {evaluation.method} {evaluation.value:g}: {said}")
    _write(folder, results, complete)
    return results


def _write(folder: Path, results: Results, complete: bool) -> None:
    """Curves and frontier anew, now that the records have scores, and all of it into `results.json`."""
    settings, generations = results["settings"], results["generations"]
    results["curves"] = summary.curves(generations, results["dense"], settings["cost"])
    for line in results["curves"]:
        for point in line["points"]:
            if point["vbench"] is not None:
                at = (line["method"], point["value"])
                known = [r["vbench"] for r in generations if (r["method"], r["value"]) == at and r["vbench"]]
                means = {name: statistics.mean(scores[name] for scores in known) for name in DIMENSIONS}
                point["vbench"]["dimensions"] = means
    bounds = [method["name"] for method in results["methods"] if method["diagnostic"]]
    results["frontier"] = summary.frontier(results["curves"], settings["runtimes"], bounds, settings["cost"])
    results["complete"] = complete
    path = folder / "results.json"
    with writing(path), replacing(path) as part:
        part.write_text(json.dumps(results, indent=1) + "\n")


def _kept(folder: Path, evaluation: Evaluation, suffix: str) -> Path:
    return folder / "work" / "vbench" / f"{evaluation.name}{suffix}"


def _known(folder: Path, evaluation: Evaluation) -> Scores | None:
    """The scores of an evaluation that is on disk and has all the videos."""
    try:
        return read(_kept(folder, evaluation, ".json"), evaluation.videos)
    except (HeterostepError, OSError):
        return None


def _evaluate(program: str, folder: Path, evaluation: Evaluation, prompts: list[str]) -> Scores:
    """Call VBench; what it says goes to a log, what it writes is kept.

    Raises:
        HeterostepError: it failed, or wrote something else; one line.
    """
    kept, log, here = (_kept(folder, evaluation, suffix) for suffix in (".json", ".log", ".part"))
    # Of an evaluation that was killed.
    shutil.rmtree(here, ignore_errors=True)
    (here / "videos").mkdir(parents=True)
    try:
        texts = {}
        for record in evaluation.records:
            name = Path(record["video"]).name
            shutil.copyfile(folder / record["video"], here / "videos" / name)
            texts[name] = prompts[record["prompt"]]
        (here / "prompts.json").write_text(json.dumps(texts))
        _call(program, here, log)
        written = list((here / "results").glob("*_eval_results.json"))
        if len(written) != 1:
            raise HeterostepError(f"{_reason(log)} ({log.relative_to(folder)})")
        scores = read(written[0], evaluation.videos)
        os.replace(written[0], kept)
    finally:
        shutil.rmtree(here, ignore_errors=True)
    return scores


def _call(program: str, here: Path, log: Path) -> None:
    """`vbench evaluate` in a folder with `videos` and `prompts.json`; it writes to `results` there.

    It hands its arguments to a shell, the dimensions unquoted: so these are one argument here, and every path is a
    plain name. Its exit status is 0 whatever happens.
    """
    arguments = ["evaluate", "--mode", "custom_input", "--dimension", " ".join(DIMENSIONS), "--videos_path", "videos"]
    arguments += ["--prompt_file", "prompts.json", "--output_path", "results"]
    # What evaluates is a second process, of whatever `python` is on the PATH.
    path = f"{Path(program).resolve().parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("w") as said:
        subprocess.run(
            [program, *arguments],
            cwd=here,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def read(path: Path, videos: list[str]) -> Scores:
    """Scores from VBench's file of results, `{dimension: [mean, [{"video_path", "video_results"}]]}`.

    Args:
        path: the file.
        videos: the videos that must be in it; only their names count.

    Returns:
        by the video's name, by dimension: 0..1, high is good.

    Raises:
        HeterostepError: the file does not have them.
    """
    names = [Path(video).name for video in videos]
    try:
        content = json.loads(path.read_text())
        scores: Scores = {name: {} for name in names}
        for dimension in DIMENSIONS:
            _, each = content[dimension]
            found = {Path(entry["video_path"]).name: float(entry["video_results"]) for entry in each}
            for name in names:
                scores[name][dimension] = found[name] * _SCALE.get(dimension, 1.0)
                if not math.isfinite(found[name]):
                    raise ValueError(f"{dimension} of {name} is {found[name]}")
    except (ValueError, KeyError, TypeError) as error:
        raise HeterostepError(f"VBench's results are not of the known form: {type(error).__name__} {error}") from error
    return scores


def _reason(log: Path) -> str:
    """Why VBench wrote no results: the last error that is not its launcher's, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [match[1] for line in lines if (match := _ERROR.match(line))]
    own = [error for error in errors if not any(name in error for name in _LAUNCHER)]
    return (own or lines or ["vbench wrote no results"])[-1]
