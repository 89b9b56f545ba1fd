"""Regimes drawn at random: where does the default stand in settings that nobody has looked at?

Prints names for `heterostep compare --regime`, comma-separated: the solver, 6 to 60 steps, a shift from 1 to 16 (its
logarithm is uniform), guidance from 1.5 to 8 or, one time in five, none, and one time in five two experts.

    heterostep compare --regime $(python benchmarks/drawn_regimes.py)
"""

from __future__ import annotations

import argparse

import numpy as np

from heterostep.compare.regimes import SOLVERS, named


def draw(random: np.random.Generator) -> str:
    solver, steps = random.choice(list(SOLVERS)), random.integers(6, 61)
    shift, guidance = 16 ** random.random(), 1.0 if random.random() < 0.2 else random.uniform(1.5, 8)
    name = f"{solver}-{steps}-shift-{shift:.1f}-guidance-{guidance:.1f}"
    if random.random() < 0.2:
        name += f"-experts-{random.uniform(0.8, 0.95):.2f}"
    return named(name).name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    print(",".join(draw(random) for _ in range(args.count)))


if __name__ == "__main__":
    main()
