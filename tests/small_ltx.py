"""Complete LTX-Video 0.9 pipelines of random weights, each small enough to generate in a second."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from small import WORDS

PIPELINES = {"text": LTXPipeline, "image": LTXImageToVideoPipeline}
TEXT_DIM = 16
LATENT_CHANNELS = 8
HEADS, HEAD_DIM = 2, 16  # 2 x 16 is no multiple of 6, so rotary embeddings are padded as in a checkpoint


def small_ltx(kind: str = "text", seed: int = 0) -> Any:
    """The pipeline of one of PIPELINES, fp32 on the CPU: three layers, 8x temporal and 16x spatial compression."""
    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    pipe = PIPELINES[kind](
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=_autoencoder(),
        text_encoder=_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=_transformer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_ltx(pipe: Any, steps: int = 8, seed: int = 0, frames: int = 17, size: int = 64, **options: Any) -> torch.Tensor:
    """A generation's latents, at guidance 3 with rescaling unless told otherwise.

    17 frames of 64 x 64 pixels are 3 x 4 x 4 tokens: [1, 48, C].
    """
    options = {
        "prompt": "a red circle moving right",
        "guidance_scale": 3.0,
        "guidance_rescale": 0.7,
        "max_sequence_length": 16,
        "output_type": "latent",
        **options,
    }
    with torch.no_grad():
        return pipe(
            height=size,
            width=size,
            num_frames=frames,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            **options,
        ).frames


def _tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, a </s> behind every prompt as T5 has it: an empty prompt is one token."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )


def _text_encoder(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()


def _autoencoder() -> AutoencoderKLLTXVideo:
    """Videos [B, 3, 8 f + 1, 16 h, 16 w] to latents [B, LATENT_CHANNELS, f + 1, h, w], normalised unevenly."""
    vae = AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 16, 16, 16),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=2,
    )
    vae.latents_mean.copy_(torch.linspace(-0.2, 0.2, LATENT_CHANNELS))
    vae.latents_std.copy_(torch.linspace(0.8, 1.2, LATENT_CHANNELS))
    return vae.eval()


def _transformer() -> LTXVideoTransformer3DModel:
    """Velocities [B, tokens, LATENT_CHANNELS]."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM,
        num_layers=3,
        caption_channels=TEXT_DIM,
    )
    # A new model's output hardly depends on its input; larger weights make its velocities vary over tokens and steps.
    # Cross-attention and the timestep's layers stay: all tokens nearly share what those add, and enlarged it would
    # drown the differences between tokens.
    own = ("proj_in", "proj_out", "attn1", "ff.net", "caption_projection")
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim >= 2 and any(part in name for part in own):
                parameter.mul_(3)
    return transformer.eval()
