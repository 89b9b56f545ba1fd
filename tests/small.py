"""A complete Wan pipeline of random weights, small enough that a whole generation takes a second."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ["a", "red", "green", "circle", "square", "moving", "right", "left", "over", "stripes"]


def small_pipeline(image_to_video: bool = False, expand_timesteps: bool = True, seed: int = 0):
    """Wan's architecture with 8x spatial and 4x temporal compression, two layers of two heads, fp32 on the CPU."""
    torch.manual_seed(seed)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    )
    # A new model's output hardly depends on its input; larger weights make its velocities vary over tokens and steps.
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = dict(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        transformer_2=None,
        scheduler=scheduler,
        expand_timesteps=expand_timesteps,
    )
    if image_to_video:
        pipe = WanImageToVideoPipeline(image_encoder=None, image_processor=None, **parts)
    else:
        pipe = WanPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps: int = 12, seed: int = 0, frames: int = 9, size: int = 64, **options):
    """A generation's latents, at guidance 3 unless told otherwise."""
    options = {"prompt": "a red circle moving right", "guidance_scale": 3.0, "output_type": "latent", **options}
    with torch.no_grad():
        return pipe(
            height=size,
            width=size,
            num_frames=frames,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            **options,
        ).frames
