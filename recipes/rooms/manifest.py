"""The captions of the tuning and the held-out clips, kept beside the recipe so that they are known without the game."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import world

PATH = Path(__file__).parent / "manifest.json"


def held_out(split: str = "held-out") -> list[dict]:
    """Entries with `seed`, `caption` and `labels`."""
    return json.loads(PATH.read_text())["splits"][split]["clips"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="rooms manifest", description=__doc__)
    parser.add_argument("--counts", type=int, nargs=2, default=[32, 96], help="of tuning and of held-out clips")
    args = parser.parse_args()
    maker = world.World()
    splits: dict[str, dict] = {"training": {"first seed": 0, "levels": world.LEVELS}}
    for name, first, levels, count in (
        ("tuning", world.TUNING_SEED, world.TUNING_LEVELS, args.counts[0]),
        ("held-out", world.HELD_OUT_SEED, world.HELD_OUT_LEVELS, args.counts[1]),
    ):
        clips = []
        for seed in range(first, first + count):
            _, labels, caption = maker.clip(seed)
            clips.append({"seed": seed, "caption": caption, "labels": {k: v for k, v in labels.items() if v != "none"}})
        splits[name] = {"first seed": first, "levels": levels, "clips": clips}
    maker.close()
    head = {"frames": world.FRAMES, "size": world.SIZE, "fps": world.FPS, "splits": splits}
    PATH.write_text(json.dumps(head, indent=1) + "\n")


if __name__ == "__main__":
    main()
