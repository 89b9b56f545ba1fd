"""`python recipes/rooms STAGE ...`: the recipe's stages, in order of use."""

from __future__ import annotations

import importlib
import sys

STAGES = (
    *("data", "text", "vae", "encode", "train", "assemble", "release"),
    *("sheet", "check", "pack", "unpack", "look", "manifest"),
)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python recipes/rooms {{{','.join(STAGES)}}} ...")
    stage = sys.argv.pop(1)
    module = importlib.import_module({"train": "transformer", "pack": "parts", "unpack": "parts"}.get(stage, stage))
    if stage in ("pack", "unpack"):
        getattr(module, stage)()
    else:
        module.main()


if __name__ == "__main__":
    main()
