"""First and last frame to video with Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers: 5 s, in half the denoising time."""

import sys

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils import load_image
from PIL import ImageOps

import heterostep
from heterostep.video import write_video


def main(
    first=None,
    last=None,
    prompt="One smooth movement of the camera from the first picture to the last",
    model="Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
    out="wan21_flf2v.mp4",
    runtime=0.5,
    # Trained at 720 x 1280.
    height=480,
    width=832,
    num_frames=81,
    num_inference_steps=50,
):
    if last is None:
        sys.exit("give a first and a last frame, files or URLs: python wan21_flf2v.py FIRST LAST [PROMPT]")
    first, last = (ImageOps.fit(load_image(image), (width, height)) for image in (first, last))
    # Half precision in the VAE shows in the pixels.
    pipe = WanImageToVideoPipeline.from_pretrained(
        model, dtype={"default": torch.bfloat16, "vae": torch.float32, "image_encoder": torch.float32}
    )
    pipe.enable_model_cpu_offload()
    # As whole steps are skipped, no keys and values are kept: memory is about what it is without.
    heterostep.enable(pipe, runtime=runtime)
    frames = pipe(
        image=first,
        last_image=last,
        prompt=prompt,
        negative_prompt="blurry, overexposed, still, deformed, low quality",
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=num_inference_steps,
        guidance_scale=5.5,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    write_video(out, (frames * 255).round().astype("uint8"), fps=16)
    print(heterostep.report(pipe).runtime)


if __name__ == "__main__":
    main(*sys.argv[1:4])
