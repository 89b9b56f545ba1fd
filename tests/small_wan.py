"""Complete pipelines of random weights for every kind of Wan checkpoint, each small enough to generate in a second."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.models.transformers.transformer_wan import WanAttention
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from small import small_pipeline

ROWS = (
    "wan2.1-t2v",
    "wan2.1-i2v",
    "wan2.1-flf2v",
    "wan2.1-v2v",
    "wan2.1-vace",
    "wan2.2-t2v",
    "wan2.2-i2v",
    "wan2.2-vace",
    "wan2.2-ti2v-t2v",
    "wan2.2-ti2v-i2v",
)
BOUNDARIES = {"wan2.2-t2v": 0.875, "wan2.2-i2v": 0.9, "wan2.2-vace": 0.875}
SIZE = 64
FRAMES = 9
IMAGE_DIM = 24
# The states that the image encoder makes of one image: four patches and the class.
IMAGE_STATES = 5


def small_wan(row: str, seed: int = 0) -> Any:
    """The pipeline of one of ROWS, fp32 on the CPU: its latents are 3 x 8 x 8 and their tokens 3 x 4 x 4."""
    if row not in ROWS:
        raise ValueError(f"{row} is none of {', '.join(ROWS)}")
    if row.startswith("wan2.2-ti2v"):
        return small_pipeline(image_to_video=row.endswith("i2v"), seed=seed)
    # Its text encoder, tokenizer and scheduler serve every row; its autoencoder and transformer are those of TI2V.
    base = small_pipeline(expand_timesteps=False, seed=seed)
    parts: dict[str, Any] = dict(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        scheduler=base.scheduler,
        vae=_autoencoder(),
        transformer=_transformer(row),
    )
    if row in BOUNDARIES:
        parts |= dict(transformer_2=_transformer(row), boundary_ratio=BOUNDARIES[row])
    if row in ("wan2.1-i2v", "wan2.1-flf2v"):
        parts |= dict(image_encoder=_image_encoder(), image_processor=CLIPImageProcessor(size=32, crop_size=32))
    pipelines = dict(t2v=WanPipeline, v2v=WanVideoToVideoPipeline, vace=WanVACEPipeline)
    pipe = pipelines.get(row.split("-")[1], WanImageToVideoPipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_options(row: str) -> dict[str, Any]:
    """What a call of the row's pipeline takes beside a prompt, a size, a guidance scale and a number of steps."""
    video = moving_square()
    options: dict[str, Any] = {}
    if row.endswith(("-i2v", "-flf2v")):
        options["image"] = video[0]
    if row == "wan2.1-flf2v":
        options["last_image"] = video[-1]
    if row == "wan2.1-v2v":
        options |= dict(video=video, strength=0.8)
    if row.endswith("-vace"):
        # The first frame is given, the others are to be made.
        given, made = Image.new("L", (SIZE, SIZE), 0), Image.new("L", (SIZE, SIZE), 255)
        options |= dict(video=video, mask=[given] + [made] * (FRAMES - 1))
    if row == "wan2.1-vace":
        # A reference image takes a latent frame of its own, before the others.
        options["reference_images"] = [video[-1]]
    if row in BOUNDARIES:
        options["guidance_scale_2"] = 2.0
    return options


def run_wan(row: str, pipe: Any, steps: int = 12, seed: int = 0, **options: Any) -> Any:
    """A generation's latents, at guidance 3 unless told otherwise."""
    options = {
        "prompt": "a red circle moving right",
        "guidance_scale": 3.0,
        "output_type": "latent",
        "height": SIZE,
        "width": SIZE,
        **wan_options(row),
        **options,
    }
    # Elsewhere the video says how many frames there are.
    if row != "wan2.1-v2v":
        options.setdefault("num_frames", FRAMES)
    with torch.no_grad():
        return pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **options).frames


def moving_square() -> list[Image.Image]:
    """A square that moves to the right over stripes."""
    frames = []
    for i in range(FRAMES):
        frame = Image.new("RGB", (SIZE, SIZE), (40, 60, 90))
        draw = ImageDraw.Draw(frame)
        for y in range(0, SIZE, 16):
            draw.rectangle((0, y, SIZE, y + 7), fill=(200, 180, 120))
        draw.rectangle((4 * i, 20, 4 * i + 23, 43), fill=(220, 30, 30))
        frames.append(frame)
    return frames


def _autoencoder() -> AutoencoderKLWan:
    """Wan 2.1's kind, which Wan 2.2's larger models share: no patches, three halvings of the size, two of the time."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        # Its weights being random, what it encodes varies little; this makes it vary about as much as noise.
        latents_std=[0.15] * 16,
    ).eval()


def _image_encoder() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=IMAGE_DIM,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    ).eval()


def _transformer(row: str) -> WanTransformer3DModel | WanVACETransformer3DModel:
    config: dict[str, Any] = dict(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=36 if row.endswith(("-i2v", "-flf2v")) else 16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=64,
    )
    if row in ("wan2.1-i2v", "wan2.1-flf2v"):
        config |= dict(image_dim=IMAGE_DIM, added_kv_proj_dim=48)
    if row == "wan2.1-flf2v":
        config["pos_embed_seq_len"] = 2 * IMAGE_STATES
    if row.endswith("-vace"):
        transformer = WanVACETransformer3DModel(vace_layers=[0, 2], vace_in_channels=96, **config)
    else:
        transformer = WanTransformer3DModel(**config)
    # A new model's output hardly depends on its input; larger weights make its velocities vary over tokens and steps.
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
        # The prompt is a few of 512 states; sharper attention keeps it from drowning among the empty ones.
        for module in transformer.modules():
            if isinstance(module, WanAttention) and module.is_cross_attention:
                module.norm_q.weight.mul_(3)
    return transformer.eval()
