"""The assembled pipeline as a folder to hand on, and as an archive of it: `heterostep compare --model rooms`.

The folder's `heterostep.json` has the sizes that the model was trained at and the held-out captions, whose first frames
lie beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

import world
from manifest import held_out

LICENCES = """\
The weights are trained on pictures of Freedoom (BSD 3-Clause; https://freedoom.github.io), rendered by ViZDoom (MIT and
the licences of ZDoom), and of photographs in scikit-image (public domain and CC0). The first frames in held_out/ are
such pictures. The weights and the rest are under Apache-2.0. For the full list: recipes/rooms of heterostep.
"""


def first_frame(seed: int) -> np.ndarray:
    """Of a clip, uint8 [SIZE, SIZE, 3]."""
    maker = world.World()
    try:
        return maker.clip(seed)[0][0]
    finally:
        maker.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="rooms release", description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=Path("runs/rooms/pipeline"), help="what `assemble` wrote")
    parser.add_argument("--to", type=Path, default=Path("runs/rooms/release"), help="where rooms/ and rooms.tar come")
    parser.add_argument("--count", type=int, default=96, help="held-out clips")
    parser.add_argument("--frames", type=int, default=world.FRAMES)
    parser.add_argument("--size", type=int, default=world.SIZE)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="that render first frames")
    args = parser.parse_args()
    if not args.pipeline.is_dir():
        raise SystemExit(f"there is no pipeline in {args.pipeline}: run assemble first")
    folder = args.to / "rooms"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(args.pipeline, folder)
    (folder / "held_out").mkdir()
    clips, prompts = held_out()[: args.count], []
    with multiprocessing.get_context("spawn").Pool(min(args.workers, len(clips))) as pool:
        frames = pool.map(first_frame, [clip["seed"] for clip in clips], chunksize=1)
        pool.close()
        pool.join()
    for number, (clip, frame) in enumerate(zip(clips, frames)):
        name = f"held_out/{number:03}.png"
        first = Image.fromarray(frame)
        first.resize((args.size, args.size), Image.Resampling.LANCZOS).save(folder / name)
        # A still camera leaves most tokens as they are, so such clips are looked at by themselves.
        camera = "still" if clip["labels"].get("camera", "still") == "still" else "moving"
        prompts.append({"prompt": clip["caption"], "image": name, "camera": camera})
    defaults = {"height": args.size, "width": args.size, "num_frames": args.frames, "guidance_scale": 4.0}
    content = {"defaults": defaults | {"fps": world.FPS}, "held_out": prompts}
    (folder / "heterostep.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "LICENCES.txt").write_text(LICENCES)
    with tarfile.open(args.to / "rooms.tar", "w") as archive:
        archive.add(folder, "rooms")
    size = (args.to / "rooms.tar").stat().st_size / 1e6
    print(f"{folder}, {args.to / 'rooms.tar'}: {len(prompts)} held-out clips, {size:.1f} MB")


if __name__ == "__main__":
    main()
