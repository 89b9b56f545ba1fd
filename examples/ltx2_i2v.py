"""Image to video and sound with Lightricks/LTX-2: 5 s of 512 x 768, in half the denoising time."""

import sys

import torch
from diffusers import LTX2ImageToVideoPipeline
from diffusers.utils import encode_video, load_image
from PIL import ImageOps

import heterostep


def main(
    image=None,
    prompt="The camera slowly moves closer while the wind blows",
    model="Lightricks/LTX-2",
    out="ltx2_i2v.mp4",
    runtime=0.5,
    height=512,
    width=768,
    num_frames=121,
    num_inference_steps=40,
):
    if image in (None, "--help"):
        sys.exit("give a first frame, a file or a URL: python ltx2_i2v.py IMAGE [PROMPT]")
    image = ImageOps.fit(load_image(image), (width, height))
    pipe = LTX2ImageToVideoPipeline.from_pretrained(model, dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    # The sound attends to the video's keys and values, so these are kept: 16 GB with
    # these settings (two evaluations a step), in proportion to frames and pixels.
    heterostep.enable(pipe, runtime=runtime)
    video, audio = pipe(
        image=image,
        prompt=prompt,
        negative_prompt="blurry, overexposed, still, deformed, low quality",
        height=height,
        width=width,
        num_frames=num_frames,
        frame_rate=24.0,
        num_inference_steps=num_inference_steps,
        guidance_scale=4.0,
        # Two evaluations a step; the pipeline's defaults are those of later checkpoints, with four.
        stg_scale=0.0,
        modality_scale=1.0,
        guidance_rescale=0.0,
        audio_guidance_scale=None,
        audio_stg_scale=None,
        audio_modality_scale=None,
        audio_guidance_rescale=None,
        use_cross_timestep=False,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        return_dict=False,
    )
    rate = pipe.vocoder.config.output_sampling_rate
    encode_video(video[0], fps=24, audio=audio[0].float().cpu(), audio_sample_rate=rate, output_path=out)
    print(heterostep.report(pipe).runtime)


if __name__ == "__main__":
    main(*sys.argv[1:3])
