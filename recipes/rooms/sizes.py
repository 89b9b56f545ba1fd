"""The model's sizes, its parts, and text as it sees it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import captions

VAE = dict(
    base_dim=24,
    decoder_base_dim=32,
    z_dim=32,
    dim_mult=[1, 2, 4],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=8,
    scale_factor_temporal=4,
)
# 2,304 tokens a video of 256 x 256 x 33.
TRANSFORMER = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=6,
    attention_head_dim=64,
    in_channels=32,
    out_channels=32,
    text_dim=128,
    freq_dim=128,
    ffn_dim=1536,
    num_layers=10,
    rope_max_seq_len=64,
)
# For tests: the same stages in seconds on a CPU.
TOY_TRANSFORMER = TRANSFORMER | dict(num_attention_heads=1, ffn_dim=64, num_layers=1)
TEXT_LENGTH = 40
FLOW_SHIFT = 3.0


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(**VAE, latents_mean=[0.0] * VAE["z_dim"], latents_std=[1.0] * VAE["z_dim"])


def build_transformer(toy: bool = False) -> WanTransformer3DModel:
    return WanTransformer3DModel(**(TOY_TRANSFORMER if toy else TRANSFORMER))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the captions' grammar, and the end; what it does not know is <unk>."""
    words = ["<pad>", "</s>", "<unk>", *captions.vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(words: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=words,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            use_cache=False,
        )
    )


@torch.no_grad()
def encode_text(tokenizer, encoder, texts: list[str], device: str | torch.device) -> torch.Tensor:
    """States [len(texts), TEXT_LENGTH, text_dim], zero after each caption's end, as WanPipeline makes them."""
    out = []
    for start in range(0, len(texts), 512):
        tokens = tokenizer(
            texts[start : start + 512],
            padding="max_length",
            max_length=TEXT_LENGTH,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        out.append(states * tokens.attention_mask[..., None])
    return torch.cat(out)


def to_tensor(clip: torch.Tensor) -> torch.Tensor:
    """uint8 [..., F, H, W, 3] -> float32 [..., 3, F, H, W] in -1..1."""
    return clip.movedim(-1, -4).float() / 127.5 - 1


def load_text(folder: Path, device: str | torch.device):
    """The tokenizer and the text encoder of a run's folder."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return tokenizer, UMT5EncoderModel.from_pretrained(folder / "text_encoder").to(device).eval()
