"""Contact sheets of generated videos: from a caption alone, and from a clip's first frame and caption."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import world
from look import row, sheet
from manifest import held_out


def load(folder: Path, image_to_video: bool, device: str):
    """A pipeline of the assembled folder, in bf16 on a GPU, in float32 elsewhere."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = WanPipeline.from_pretrained(folder, dtype=dtype).to(device)
    if image_to_video:
        parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")}
        pipe = WanImageToVideoPipeline(
            **parts, image_encoder=None, image_processor=None, transformer_2=None, expand_timesteps=True
        )
    return pipe


def generate(
    pipe,
    captions: list[str],
    seeds: list[int],
    images: list[np.ndarray] | None = None,
    *,
    steps: int = 40,
    guidance: float = 4.0,
    batch: int = 16,
    frames: int = world.FRAMES,
    size: int = world.SIZE,
) -> np.ndarray:
    """Videos uint8 [N, F, H, W, 3]; noise is drawn on the CPU, by seed."""
    out = []
    options = dict(
        height=size, width=size, num_frames=frames, num_inference_steps=steps, guidance_scale=guidance, output_type="np"
    )
    batch = batch if images is None else 1  # that pipeline takes one image a call
    for start in range(0, len(captions), batch):
        here = slice(start, start + batch)
        noise = [torch.Generator().manual_seed(seed) for seed in seeds[here]]
        extra = {} if images is None else {"image": Image.fromarray(images[start]).resize((size, size))}
        video = pipe(prompt=captions[here], generator=noise, **options, **extra).frames
        out.append((np.asarray(video) * 255).round().astype(np.uint8))
    return np.concatenate(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="rooms sheet", description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=Path("runs/rooms/pipeline"))
    parser.add_argument("--to", type=Path, required=True, help="a folder: text.png and image.png are written")
    parser.add_argument("--captions", nargs="*", help="instead of the first held-out ones; text-to-video alone")
    parser.add_argument("--split", default="held-out", choices=("tuning", "held-out"))
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--images", type=int, default=10, help="image-to-video rows, each below the real clip's")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--frames", type=int, default=world.FRAMES)
    parser.add_argument("--size", type=int, default=world.SIZE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    clips = held_out(args.split)
    texts = args.captions or [clip["caption"] for clip in clips[: args.count]]
    options = {"steps": args.steps, "guidance": args.guidance, "frames": args.frames, "size": args.size}
    videos = generate(load(args.pipeline, False, args.device), texts, list(range(len(texts))), **options)
    sheet([row(video, text) for video, text in zip(videos, texts)]).save(args.to / "text.png")
    if args.images and not args.captions:
        maker = world.World()
        real = [maker.clip(clip["seed"])[0] for clip in clips[: args.images]]
        maker.close()
        pipe = load(args.pipeline, True, args.device)
        texts = texts[: args.images]
        videos = generate(pipe, texts, list(range(len(texts))), [clip[0] for clip in real], **options)
        rows = []
        for text, clip, video in zip(texts, real, videos):
            rows += [row(clip, f"real: {text}"), row(video, f"made: {text}")]
        sheet(rows).save(args.to / "image.png")


if __name__ == "__main__":
    main()
