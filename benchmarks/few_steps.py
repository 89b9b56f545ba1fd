"""Runs of few steps without guidance, heterostep beside plain sampling with fewer steps, on the bundled model.

SNR in dB of the final latents to the dense run's, without given frames: nothing is decoded, a CPU takes minutes.

    python benchmarks/few_steps.py --task image --steps 12 --shift 7 --count 12
"""

from __future__ import annotations

import argparse
import statistics
import warnings

import torch

import heterostep
from heterostep import tiny
from heterostep.compare.measure import generate
from heterostep.compare.methods import METHODS
from heterostep.compare.prompts import held_out
from heterostep.compare.regimes import Regime, in_regime
from made import Made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("text", "image"), default="text")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--shift", type=float, default=7.0)
    parser.add_argument("--count", type=int, default=12, help="captions, all in one batch")
    parser.add_argument("--first", type=int, default=2016, help="number of the first caption")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    image = args.task == "image"
    pipe = tiny.load(image_to_video=image).to(args.device)
    prompts = held_out(args.count, args.first, with_image=image)
    made = Made(pipe, latents=True, given=int(image))
    regime = Regime("few", "few steps", "euler", args.steps, args.shift, 1)
    with in_regime(pipe, regime) as options:
        options = {name: tiny.DEFAULTS[name] for name in ("height", "width", "num_frames")} | options
        generate(pipe, prompts, None, 1.0, options)
        dense = made.last()
        print(f"| share | {' | '.join(('heterostep', 'fewer steps', 'evaluated steps'))} |\n|---|---|---|---|")
        for share in args.shares:
            cells = []
            for name in ("heterostep", "steps"):
                generate(pipe, prompts, METHODS[name], share, options)
                cells.append(f"{statistics.mean(made.decibels(dense)):.1f}")
                if name == "heterostep":
                    evaluated = [step for step, part in enumerate(heterostep.report(pipe).active_share) if part == 1]
            print(f"| {share:g} | {' | '.join(cells)} | {', '.join(map(str, evaluated))} |", flush=True)


if __name__ == "__main__":
    main()
