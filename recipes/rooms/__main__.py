"""`python recipes/rooms STAGE ...`: the recipe's stages, in order of use."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

STAGES = (
    *("data", "text", "vae", "encode", "train", "assemble", "release"),
    *("sheet", "check", "keep", "restore", "pack", "unpack", "look", "manifest"),
)
RENDERING = ("data", "release", "look", "manifest")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python recipes/rooms {{{','.join(STAGES)}}} ...")
    stage = sys.argv.pop(1)
    modules = {"train": "transformer", "pack": "parts", "unpack": "parts", "keep": "weights", "restore": "weights"}
    needed = ("vizdoom",) if "ROOMS_PHOTOGRAPHS" in os.environ else ("vizdoom", "skimage")
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    if stage in RENDERING and lacking:
        sys.exit(f"{stage} renders clips, and {' and '.join(lacking)} are lacking: pip install '.[rooms]'")
    module = importlib.import_module(modules.get(stage, stage))
    if stage in ("pack", "unpack", "keep", "restore"):
        getattr(module, stage)()
    else:
        module.main()


if __name__ == "__main__":
    main()
