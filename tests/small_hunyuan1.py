"""Complete HunyuanVideo 1.0 pipelines of random weights, each small enough to generate in a second."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from small import small_pipeline
from small_wan import FRAMES, SIZE, moving_square

# By what an image is to the transformer: nothing, the first frame itself (HunyuanVideo-I2V), more channels (its 33ch).
KINDS = {"text": None, "image": "token_replace", "channels": "latent_concat"}
TEXT_DIM = 16
LATENT_CHANNELS = 4
HEADER_END, IMAGE = "<|end_header_id|>", "<image>"
# The states that the image encoder makes of one image, in the place of one token.
IMAGE_STATES = 4
# As short as it may be: nearly all of a checkpoint's 256 states would be padding. The last header is four tokens.
TEMPLATES = {
    False: {"template": "over {}", "crop_start": 1},
    True: {
        "template": f"{HEADER_END} {IMAGE} {HEADER_END} {{}} over over over {HEADER_END}",
        "crop_start": 3,
        "image_emb_start": 1,
        "image_emb_end": 1 + IMAGE_STATES,
        "image_emb_len": IMAGE_STATES,
    },
}
TEXT_STATES = 16


def small_hunyuan1(kind: str = "text", seed: int = 0, blocks: int = 1) -> Any:
    """The pipeline of one of KINDS, fp32 on the CPU: its latents are 3 x 8 x 8 and their tokens 3 x 4 x 4.

    Its transformer has `blocks` of each kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind} is none of {', '.join(KINDS)}")
    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    parts: dict[str, Any] = dict(
        tokenizer=tokenizer,
        text_encoder=_text_encoder(tokenizer, kind != "text"),
        tokenizer_2=tokenizer,
        text_encoder_2=_pooled_text_encoder(len(tokenizer)),
        vae=_autoencoder(),
        transformer=_transformer(kind, blocks),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    if kind == "text":
        pipe = HunyuanVideoPipeline(**parts)
    else:
        pipe = HunyuanVideoImageToVideoPipeline(**parts, image_processor=CLIPImageProcessor(size=32, crop_size=32))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_hunyuan1(pipe: Any, steps: int = 8, seed: int = 0, **options: Any) -> torch.Tensor:
    """A generation's latents, with embedded guidance and a negative prompt's beside it."""
    options = {
        "prompt": "a red circle moving right",
        "negative_prompt": "green stripes",
        "true_cfg_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "num_frames": FRAMES,
        "max_sequence_length": TEXT_STATES,
        "output_type": "latent",
        **options,
    }
    from_image = isinstance(pipe, HunyuanVideoImageToVideoPipeline)
    options.setdefault("prompt_template", TEMPLATES[from_image])
    if from_image:
        options.setdefault("image", moving_square()[0])
    with torch.no_grad():
        return pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **options).frames


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = small_pipeline().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [HEADER_END, IMAGE]})
    return tokenizer


def _text_encoder(tokenizer: PreTrainedTokenizerFast, sees: bool) -> LlamaModel | LlavaForConditionalGeneration:
    # The pipeline takes the states of the last layer but two.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    if not sees:
        return LlamaModel(config).eval()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    llava = LlavaConfig(
        vision_config=vision,
        text_config=config,
        image_token_index=image,
        image_seq_length=IMAGE_STATES,
        pad_token_id=0,
    )
    return LlavaForConditionalGeneration(llava).eval()


def _pooled_text_encoder(vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_DIM,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).eval()


def _autoencoder() -> AutoencoderKLHunyuanVideo:
    """Three halvings of the size and two of the time, as a checkpoint has them."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ).eval()


def _transformer(kind: str, blocks: int) -> HunyuanVideoTransformer3DModel:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1 if kind == "channels" else LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=blocks,
        num_single_layers=blocks,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        rope_axes_dim=(8, 8, 8),
        guidance_embeds=kind != "channels",
        image_condition_type=KINDS[kind],
    )
    # A new model's output hardly depends on its input; larger weights make its velocities vary over tokens and steps.
    # What the time does to the norms is common to all tokens, so it stays, and the latents' own share grows most.
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim >= 2 and "norm" not in name:
                parameter.mul_(9 if name.startswith("x_embedder") else 3)
    return transformer.eval()
