"""What one gap costs: PSNR to the dense videos when one step, or three in a row, are skipped and all others evaluated.

A plan is right when each of its gaps costs alike. So this tells whether gaps of equal predicted change do, and where
the prediction is off (docs/background/method.md). The bundled model; a batch of captions for tuning; on an H200 a row
of 50 steps, 16 captions and 96 gaps takes about five minutes. benchmarks/skips.json has those gaps that there was time
for, made with a script of the same steps.

    python benchmarks/skips.py --regime wan2.1-flf2v --task text --json skips.json    # adds a row, or replaces it
    python benchmarks/skips.py --draw skips.png --json benchmarks/skips.json          # draws all rows
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heterostep import HSAConfig, enabled, tiny
from heterostep.compare.measure import generate
from heterostep.compare.prompts import held_out
from heterostep.compare.regimes import REGIMES, in_regime
from heterostep.engine.trajectory import relative_change
from heterostep.policy import Change, Run
from heterostep.policy.auto import Auto


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """One row: the dense run's sigmas and changes, and each gap with the captions' mean PSNR."""
    image = args.task == "image"
    pipe = tiny.load(image_to_video=image).to(args.device)
    videos: list[torch.Tensor] = []
    decode = pipe.vae.decode

    def keep(latents: torch.Tensor, return_dict: bool = True) -> Any:
        # One by one, for want of memory.
        videos.append(torch.cat([decode(each[None], return_dict=False)[0] for each in latents]).float().clamp(-1, 1))
        return (videos[-1],)

    pipe.vae.decode = keep
    with in_regime(pipe, REGIMES[args.regime]) as options:
        options = {"height": 192, "width": 192, "num_frames": args.frames} | options
        prompts = held_out(args.count, args.first, with_image=image)
        velocities: list[torch.Tensor] = []
        step = pipe.scheduler.step

        def watched(velocity: torch.Tensor, *rest: Any, **named: Any) -> Any:
            # The latents of a given frame have no part in it.
            velocities.append(velocity[:, :, int(image) :])
            return step(velocity, *rest, **named)

        pipe.scheduler.step = watched
        generate(pipe, prompts, None, 1.0, options)
        del pipe.scheduler.step
        dense, steps = videos.pop(), len(velocities)
        pairs = zip(velocities, velocities[1:])
        changes = [round(float(relative_change(new, old).mean()), 4) for old, new in pairs]
        gaps = []
        todo = [(start, start + skipped + 1) for skipped in args.skipped for start in range(steps - skipped)]
        for number, (start, stop) in enumerate(todo, 1):
            shares = tuple(float(not start < at < stop) for at in range(steps))
            with enabled(pipe, share=shares):
                generate(pipe, prompts, None, 1.0, options)
            error = ((videos.pop() - dense) ** 2).flatten(1).mean(1) / 4
            gaps.append([start, stop, round(float(-10 * error.clamp_min(1e-9).log10().mean()), 2)])
            print(f"\r{number}/{len(todo)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        sigmas = [round(float(sigma), 6) for sigma in pipe.scheduler.sigmas]
    return {
        "regime": args.regime, "task": args.task, "first": args.first, "captions": args.count, "frames": args.frames,
        "sigmas": sigmas, "changes": changes, "gaps": gaps,
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR over the predicted change of the gap, and over what of it counts where dense steps are placed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for row, marker in zip(rows, "osD^vP*X"):
        sigmas, gaps = np.array(row["sigmas"]), row["gaps"]
        policy = Auto(HSAConfig(share=0.5), Run(tuple(sigmas), from_frames=row["task"] == "image"))
        changes = [Change(at, at + 1, value) for at, value in enumerate(row["changes"]) if value is not None]
        exponent = policy.exponent(changes)
        rates = policy.rates(exponent)
        level = np.exp(np.mean([np.log(change.value / rates[change.start]) for change in changes]))
        signal = [1 - (sigmas[start] + sigmas[stop]) / 2 for start, stop, _ in gaps]
        for panel, counted in zip(panels, (rates, policy.counted(exponent, 0))):
            passed = level * np.concatenate([[0.0], np.cumsum(counted)])
            points = panel.scatter(
                [passed[stop] - passed[start] for start, stop, _ in gaps], [psnr for *_, psnr in gaps],
                c=np.log10(signal), cmap="viridis", vmin=-3, vmax=0, marker=marker, s=22,
                label=f"{row['regime']}, {row['task']}",
            )  # fmt: skip
    for panel, label in zip(panels, ("predicted change over the gap", "what of it counts")):
        panel.set(xscale="log", xlabel=label)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("PSNR to the dense video, dB")
    for handle in panels[0].legend(fontsize=8).legend_handles:
        handle.set_color("0.4")
    figure.colorbar(points, ax=panels, label="log10(1 - sigma) in the middle of the gap")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", choices=REGIMES, help="measure it; needs --json")
    parser.add_argument("--task", choices=("text", "image"), default="text")
    parser.add_argument("--first", type=int, default=2300, help="number of the first caption")
    parser.add_argument("--count", type=int, default=16, help="captions")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--skipped", type=int, nargs="+", default=[1, 3], help="steps in a gap")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, required=True, help="the rows")
    parser.add_argument("--draw", type=Path, help="draw the rows there")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    if args.regime:
        row = measured(args)
        rows = [*(each for each in rows if (each["regime"], each["task"]) != (row["regime"], row["task"])), row]
        args.json.write_text("[\n" + ",\n".join(json.dumps(each) for each in rows) + "\n]\n")
    if args.draw:
        draw(rows, args.draw)


if __name__ == "__main__":
    main()
