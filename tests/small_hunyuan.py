"""Complete HunyuanVideo 1.5 pipelines of random weights, each small enough to generate in a second."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from small import small_pipeline
from small_wan import FRAMES, SIZE, moving_square

KINDS = ("text", "image")
TEXT_DIM = 16
GLYPH_DIM = 24
IMAGE_DIM = 24
# The states that the image encoder makes of one image.
IMAGE_STATES = 4
LATENT_CHANNELS = 8
TEMPLATE = "{% for message in messages %}{{ message['content'] }} </s> {% endfor %}"


def small_hunyuan(kind: str = "text", seed: int = 0) -> Any:
    """The pipeline of one of KINDS, fp32 on the CPU: its latents are 3 x 4 x 4, and each of those 48 is a token."""
    if kind not in KINDS:
        raise ValueError(f"{kind} is none of {', '.join(KINDS)}")
    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    parts: dict[str, Any] = dict(
        tokenizer=tokenizer,
        text_encoder=_text_encoder(len(tokenizer)),
        tokenizer_2=ByT5Tokenizer(),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=384, d_model=GLYPH_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ).eval(),
        vae=_autoencoder(),
        transformer=_transformer(kind),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    if kind == "image":
        parts |= dict(
            image_encoder=_image_encoder(),
            feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        )
    pipe = (HunyuanVideo15ImageToVideoPipeline if kind == "image" else HunyuanVideo15Pipeline)(**parts)
    # What precedes the prompt is cut from its states. The lengths that all prompts are padded to need not be a
    # checkpoint's; with those, nearly all the time would go into states that are masked.
    prefix = tokenizer.apply_chat_template([{"role": "system", "content": pipe.system_message}], tokenize=False)
    pipe.prompt_template_encode_start_idx = len(tokenizer(prefix).input_ids)
    pipe.tokenizer_max_length = 24
    pipe.tokenizer_2_max_length = 16
    pipe.vision_num_semantic_tokens = IMAGE_STATES
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_hunyuan(pipe: Any, steps: int = 8, seed: int = 0, **options: Any) -> torch.Tensor:
    """A generation's latents, with guidance unless the pipeline's guider says otherwise."""
    # Only what stands in quotes goes to the second text encoder.
    options = {
        "prompt": 'a red circle moving right over "stop"',
        "num_frames": FRAMES,
        "output_type": "latent",
        **options,
    }
    if isinstance(pipe, HunyuanVideo15ImageToVideoPipeline):
        options.setdefault("image", moving_square()[0])
    else:
        options = {"height": SIZE, "width": SIZE, **options}
    with torch.no_grad():
        return pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **options).frames


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = small_pipeline().tokenizer
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _text_encoder(vocabulary: int) -> Qwen2_5_VLTextModel:
    # The pipeline takes the states of the last layer but two.
    config = Qwen2_5_VLTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling={"rope_type": "default", "mrope_section": [1, 1, 2]},
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2_5_VLTextModel(config).eval()


def _image_encoder() -> SiglipVisionModel:
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=IMAGE_DIM,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    ).eval()


def _autoencoder() -> AutoencoderKLHunyuanVideo15:
    """Four halvings of the size and two of the time, as a checkpoint has them."""
    return AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 16, 16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    ).eval()


def _transformer(kind: str) -> HunyuanVideo15Transformer3DModel:
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=3,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=GLYPH_DIM,
        image_embed_dim=IMAGE_DIM,
        rope_axes_dim=(8, 8, 8),
        target_size=SIZE,
        task_type="i2v" if kind == "image" else "t2v",
    )
    # A new model's output hardly depends on its input; larger weights make its velocities vary over tokens and steps.
    # What the time does to the norms is common to all tokens, so it stays, and the latents' own share grows most.
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim >= 2 and "norm" not in name:
                parameter.mul_(9 if name.startswith("x_embedder") else 3)
    return transformer.eval()
