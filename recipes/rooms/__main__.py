"""`python recipes/rooms STAGE ...`: the recipe's stages, in order of use."""

from __future__ import annotations

import importlib
import sys

STAGES = (
    *("data", "text", "vae", "encode", "train", "assemble", "release"),
    *("sheet", "check", "keep", "restore", "pack", "unpack", "look", "manifest"),
)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python recipes/rooms {{{','.join(STAGES)}}} ...")
    stage = sys.argv.pop(1)
    modules = {"train": "transformer", "pack": "parts", "unpack": "parts", "keep": "weights", "restore": "weights"}
    try:
        module = importlib.import_module(modules.get(stage, stage))
    except ModuleNotFoundError as error:
        if error.name not in ("vizdoom", "skimage"):
            raise
        sys.exit(f"{error.name} is not installed: pip install '.[rooms]'")
    if stage in ("pack", "unpack", "keep", "restore"):
        getattr(module, stage)()
    else:
        module.main()


if __name__ == "__main__":
    main()
