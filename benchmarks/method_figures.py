"""The figures and tables of docs/background/method.md, from dense runs of the bundled model.

What each token's velocity, K and V do from one step to later ones; how wrong a velocity is that is evaluated alone,
among K/V that are held or drift; and what the schedules make of a budget. Prints the tables, writes them and the
figures. A few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt
from PIL import Image

from heterostep import tiny
from heterostep.compare.prompts import held_out
from heterostep.config import HSAConfig
from heterostep.engine.calls import DirectCalls
from heterostep.engine.velocity import velocity_change
from heterostep.policy import Run, Tokens, make
from heterostep.policy.auto import EXPONENT, Auto
from heterostep.sigmas import log_alpha, nominal_sigmas

FIRST_CAPTION = 1000
STEPS = 40
# Steps after which tokens are skipped, and for how many steps.
STARTS = (8, 16, 24)
AHEAD = (1, 2, 4, 8)
# How far a change is followed, sigma at three steps: the two evaluations', and the one to be predicted.
RULES: dict[str, Callable[[float, float, float], float]] = {
    "over sigma": lambda before, last, now: (now - last) / (last - before),
    "half of it": lambda before, last, now: 0.5 * (now - last) / (last - before),
    "over log(1 - sigma)": lambda before, last, now: (_time(now) - _time(last)) / (_time(last) - _time(before)),
}


def _time(sigma: float) -> float:
    return float(log_alpha(torch.tensor(sigma, dtype=torch.float64)))


class DenseRun:
    """One dense generation: the inputs of its conditional calls, and what they make of the tokens."""

    def __init__(self, pipe: Any, prompt: Any) -> None:
        inputs: list[dict[str, Any]] = []
        handle = pipe.transformer.register_forward_pre_hook(
            lambda model, args, kwargs: inputs.append(dict(kwargs)), with_kwargs=True
        )
        options = {name: tiny.DEFAULTS[name] for name in ("height", "width", "num_frames", "guidance_scale")}
        if prompt.image is not None:
            options["image"] = Image.fromarray(prompt.image)
        self.frames = pipe(
            prompt=prompt.text, num_inference_steps=STEPS, output_type="np",
            generator=torch.Generator().manual_seed(prompt.seed), **options,
        ).frames[0]  # fmt: skip
        handle.remove()
        # The unconditional call is every second.
        self.inputs = inputs[::2]
        self.sigmas: list[float] = pipe.scheduler.sigmas.tolist()
        self.kv: dict[int, list[torch.Tensor]] = {}
        self.velocity: dict[int, torch.Tensor] = {}
        for attn in (block.attn1 for block in pipe.transformer.blocks):
            attn.norm_k.register_forward_hook(lambda module, args, out: self._seen.append(out[0]))
            attn.to_v.register_forward_hook(lambda module, args, out: self._seen.append(out[0]))
        self.calls = DirectCalls(pipe.transformer, self.inputs[0])
        for step in sorted({start + k for start in STARTS for k in (-1, 0, *AHEAD)}):
            self._seen: list[torch.Tensor] = []
            self.at(step)
            self.calls.plain()
            assert self.calls.rows is not None
            self.kv[step], self.velocity[step] = self._seen, self.calls.rows

    def at(self, step: int) -> None:
        """Let calls have the inputs of a step."""
        self.calls.inputs = {**self.inputs[step], "return_dict": False}

    def alone(self, start: int, step: int, index: torch.Tensor, drift: bool) -> float:
        """Relative error of the velocities of the tokens of `index`, evaluated alone; others are held since `start`."""
        calls, sigmas = self.calls, self.sigmas
        calls.use("device")
        calls.workspace.extrapolation = torch.zeros(1, calls.num_tokens) if drift else None
        for each in (start - 1, start):
            self.at(each)
            calls.dense()
        if drift:
            far = RULES["over log(1 - sigma)"](sigmas[start - 1], sigmas[start], sigmas[step])
            calls.workspace.extrapolation = torch.full((1, calls.num_tokens), far).scatter(1, index, 0.0)
        self.at(step)
        calls.sparse(index)
        assert calls.rows is not None
        return _error(calls.rows, self.velocity[step].gather(1, index[..., None].expand_as(calls.rows)))


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def unexplained(parts: Callable[[int], list[torch.Tensor]], run: DenseRun, start: int, k: int) -> dict[str, float]:
    """What each rule leaves of the squared change from `start` to k steps later; held leaves all of it."""
    before, last, now = parts(start - 1), parts(start), parts(start + k)
    whole = sum(float((b - a).square().sum()) for a, b in zip(last, now))
    left = {}
    for name, rule in RULES.items():
        far = rule(run.sigmas[start - 1], run.sigmas[start], run.sigmas[start + k])
        pairs = zip(before, last, now)
        left[name] = sum(float((c - b - far * (b - a)).square().sum()) for a, b, c in pairs) / whole
    return left


def of_its_place(run: DenseRun, start: int, k: int, share: float = 0.2) -> float:
    """The same for K and V, by the mean change over these very steps of a place's tokens that are evaluated now.

    Weighed as fits best. A place is one (row, column) of all frames; a random `share` of the tokens is evaluated.
    """
    frames = run.inputs[0]["hidden_states"].shape[2]
    some = torch.rand(run.calls.num_tokens, generator=torch.Generator().manual_seed(0)) < share
    known = some.view(frames, -1, 1).float()
    whole = met = size = 0.0
    for a, b in zip(run.kv[start], run.kv[start + k]):
        change = b - a
        by_place = change.view(frames, -1, change.shape[-1])
        mean = (by_place * known).sum(0) / known.sum(0).clamp_min(1)
        mean = mean.expand_as(by_place).reshape(change.shape)[~some]
        whole += float(change[~some].square().sum())
        met += float((mean * change[~some]).sum())
        size += float(mean.square().sum())
    return 1 - met * met / size / whole


@torch.no_grad()
def measured(runs: list[DenseRun]) -> dict[str, Any]:
    """Means over the runs, by step and steps ahead."""
    rows = []
    for start in STARTS:
        for k in AHEAD:
            each: list[dict[str, float]] = []
            for run in runs:
                index = torch.randperm(run.calls.num_tokens, generator=torch.Generator().manual_seed(start))
                index = index[: run.calls.num_tokens // 5].sort().values[None]
                old, now = run.velocity[start], run.velocity[start + k]
                row = {"not evaluated": _error(old[0, index[0]], now[0, index[0]])}
                row["alone, K/V held"] = run.alone(start, start + k, index, drift=False)
                row["alone, K/V drift"] = run.alone(start, start + k, index, drift=True)
                row |= {f"K/V {n}": v for n, v in unexplained(lambda s, r=run: r.kv[s], run, start, k).items()}
                row["K/V of its place"] = of_its_place(run, start, k)
                row |= {f"v {n}": v for n, v in unexplained(lambda s, r=run: [r.velocity[s]], run, start, k).items()}
                each.append(row)
            mean = {name: sum(row[name] for row in each) / len(each) for name in each[0]}
            rows.append({"step": start, "ahead": k, "sigma": runs[0].sigmas[start], **mean})
    return {"steps": rows}


def draw_score(runs: dict[str, list[DenseRun]], path: Path) -> None:
    figure, axes = plt.subplots(2, 6, figsize=(11, 3.8))
    for row, (task, some) in zip(axes, runs.items()):
        run = some[0]
        start = STARTS[1]
        elapsed = torch.full((1, run.calls.num_tokens), run.sigmas[start - 1] - run.sigmas[start])
        frames, height, width = (size for size in run.inputs[0]["hidden_states"].shape[2:])
        scores = velocity_change(run.velocity[start], run.velocity[start - 1], elapsed)
        scores = scores.view(frames, height // 2, width // 2)
        for column, frame in enumerate((0, frames // 2, frames - 1)):
            row[2 * column].imshow(run.frames[frame * (len(run.frames) - 1) // (frames - 1)])
            row[2 * column + 1].imshow(scores[frame], cmap="magma", vmin=0, vmax=float(scores.quantile(0.99)))
        row[0].set_ylabel(f"{task}-to-video")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(f"First, middle and last frame, and the score of their tokens at step {STARTS[1]} of {STEPS}")
    figure.savefig(path, dpi=110, bbox_inches="tight")


# What a search over measured errors found for the real Wan 2.1 1.3B, 50 steps of shift 5 (LeMiCa's repository).
SEARCHED = {
    25: [*range(13), 14, 16, 18, 21, 24, 29, 35, 40, 44, 47, 48, 49],
    14: [*range(6), 7, 10, 16, 23, 30, 37, 44, 49],
}


def draw_plans(path: Path) -> None:
    """Which of 50 steps are dense: by the default before anything is measured, for both tasks, and by a search."""
    figure, panel = plt.subplots(figsize=(9, 3), layout="constrained")
    rows = []
    for number, searched in SEARCHED.items():
        run = Run(nominal_sigmas(50, 5.0), Tokens(1000))
        policy = make(HSAConfig(share=number / 50), run)
        assert isinstance(policy, Auto)
        rows.append((f"{number} of 50: searched for Wan 2.1 1.3B", searched, "C1"))
        rows.append(
            (f"{number} of 50: before anything is measured", policy.dense_steps(number, 0, EXPONENT, {0}), "C0")
        )
        for task, exponent in (("text-to-video", 1.6), ("image-to-video", 1.2)):
            label = f"{number} of 50: exponent {exponent:g}, as in {task}"
            rows.append((label, policy.dense_steps(number, 0, exponent, {0}), "C0"))
    for at, (_, steps, colour) in enumerate(rows):
        panel.plot(steps, [at] * len(steps), "|", color=colour, markersize=11, markeredgewidth=2)
    panel.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    panel.invert_yaxis()
    panel.set(xlabel="step", xlim=(-1, 50))
    panel.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_lines(tables: dict[str, Any], lines: dict[str, tuple[str, str]], label: str, path: Path) -> None:
    """`lines`: by the name of a column of the tables, its style and its title."""
    figure, axes = plt.subplots(1, 2 * len(STARTS), figsize=(14, 3), sharey=True)
    places = [(task, start) for task in tables for start in STARTS]
    for axis, (task, start) in zip(axes, places):
        rows = [row for row in tables[task]["steps"] if row["step"] == start]
        for name, (style, title) in lines.items():
            axis.plot([row["ahead"] for row in rows], [row[name] for row in rows], style, label=title)
        axis.set_title(f"{task}, step {start}, sigma {rows[0]['sigma']:.2f}", fontsize=9)
        axis.set_xlabel("steps since then")
        axis.set_xticks(AHEAD)
        axis.set_ylim(0, None)
    axes[0].set_ylabel(label)
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1, help="captions of each task")
    parser.add_argument("--out", type=Path, default=Path("docs/background/method"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tables, runs = {}, {}
    for task in ("text", "image"):
        prompts = held_out(args.count, FIRST_CAPTION, with_image=task == "image")
        runs[task] = []
        for number, prompt in enumerate(prompts):
            print(f"{task}-to-video, caption {number + 1} of {args.count}: {prompt.text}", flush=True)
            with torch.no_grad():
                runs[task].append(DenseRun(tiny.load(image_to_video=task == "image"), prompt))
        tables[task] = measured(runs[task])
        for row in tables[task]["steps"]:
            print(task, json.dumps({name: round(value, 4) for name, value in row.items()}), flush=True)
    assert all(math.isfinite(v) for task in tables.values() for row in task["steps"] for v in row.values())
    result = {"captions": args.count, "torch": torch.__version__, **tables}
    (args.out / "figures.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_score(runs, args.out / "score.png")
    draw_plans(args.out / "plans.png")
    lines = {
        "not evaluated": ("k:", "not evaluated again"),
        "alone, K/V held": ("C1o-", "alone, others' K/V held"),
        "alone, K/V drift": ("C0o-", "alone, others' K/V in drift"),
    }
    draw_lines(tables, lines, "error of the velocity", args.out / "sync.png")
    lines = {
        "K/V of its place": ("C3o-", "mean change of its row and column"),
        "K/V over sigma": ("C1o-", "own change, over sigma"),
        "K/V half of it": ("C2o-", "half of that"),
        "K/V over log(1 - sigma)": ("C0o-", "own change, over log(1 - sigma) (used)"),
    }
    draw_lines(tables, lines, "left of K/V's squared change", args.out / "drift.png")


if __name__ == "__main__":
    main()
