"""Complete LTX-2 pipelines of random weights, small enough that a whole generation takes seconds."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

WORDS = ["a", "red", "green", "circle", "square", "moving", "right", "left", "over", "stripes"]
PIPELINES = {"text": LTX2Pipeline, "image": LTX2ImageToVideoPipeline, "condition": LTX2ConditionPipeline}
HEADS = 2
VIDEO_HEAD_DIM, AUDIO_HEAD_DIM = 16, 8  # 2 x 16 is no multiple of 6, so rotary embeddings are padded as in LTX-2
VIDEO_DIM, AUDIO_DIM = HEADS * VIDEO_HEAD_DIM, HEADS * AUDIO_HEAD_DIM
TEXT_DIM, TEXT_LAYERS = 16, 2
LATENT_CHANNELS = 8
AUDIO_LATENT_CHANNELS, MEL_BINS = 2, 16
AUDIO_TOKEN_DIM = AUDIO_LATENT_CHANNELS * MEL_BINS // 4  # the audio autoencoder compresses mel bins by 4


def small_ltx2(kind: str = "text", version: str = "2.0", seed: int = 0) -> DiffusionPipeline:
    """LTX-2's architecture, three layers of two heads, fp32 on the CPU; 8x temporal and 16x spatial compression.

    kind: 'text', 'image' or 'condition' for LTX2Pipeline, LTX2ImageToVideoPipeline or LTX2ConditionPipeline.
    version: '2.0' (interleaved rotary embeddings, caption projections in the transformer) or '2.3' (split rotary
    embeddings, gated attention, modulated cross-attention, perturbed attention, projections in the connectors).
    """
    if kind not in PIPELINES or version not in ("2.0", "2.3"):
        raise ValueError(f"no small LTX-2 pipeline of kind {kind!r} and version {version!r}")
    torch.manual_seed(seed)
    newer = version == "2.3"
    tokenizer = small_tokenizer()
    pipe = PIPELINES[kind](
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=small_video_vae(),
        audio_vae=small_audio_vae(),
        text_encoder=small_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        connectors=small_connectors(newer),
        transformer=small_transformer(newer),
        vocoder=small_vocoder(newer),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, a <bos> before every prompt, padding on the left."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=1024,
    )


def small_text_encoder(vocabulary_size: int) -> Gemma3ForConditionalGeneration:
    """Gemma 3 whose hidden states are TEXT_LAYERS + 1 tensors (batch, words, TEXT_DIM); images have one token."""
    text = Gemma3TextConfig(
        vocab_size=vocabulary_size + 3,
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=32,
        max_position_embeddings=1024,
        initializer_range=0.5,
    )
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=4
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=1,
        boi_token_index=vocabulary_size,
        eoi_token_index=vocabulary_size + 1,
        image_token_index=vocabulary_size + 2,
    )
    return Gemma3ForConditionalGeneration(config).eval()


def small_connectors(newer: bool) -> LTX2TextConnectors:
    """To (batch, words, VIDEO_DIM) and (batch, words, AUDIO_DIM) in 2.3, both (batch, words, TEXT_DIM) in 2.0."""
    video_head_dim, audio_head_dim = (
        (VIDEO_HEAD_DIM, AUDIO_HEAD_DIM) if newer else (TEXT_DIM // HEADS, TEXT_DIM // HEADS)
    )
    return LTX2TextConnectors(
        caption_channels=TEXT_DIM,
        text_proj_in_factor=TEXT_LAYERS + 1,
        video_connector_num_attention_heads=HEADS,
        video_connector_attention_head_dim=video_head_dim,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        video_gated_attn=newer,
        audio_connector_num_attention_heads=HEADS,
        audio_connector_attention_head_dim=audio_head_dim,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
        audio_gated_attn=newer,
        rope_type="split" if newer else "interleaved",
        per_modality_projections=newer,
        video_hidden_dim=VIDEO_DIM,
        audio_hidden_dim=AUDIO_DIM,
        proj_bias=newer,
    ).eval()


def small_transformer(newer: bool) -> LTX2VideoTransformer3DModel:
    """Velocities (batch, tokens, LATENT_CHANNELS) of video and (batch, tokens, AUDIO_TOKEN_DIM) of audio."""
    transformer = LTX2VideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=VIDEO_HEAD_DIM,
        cross_attention_dim=VIDEO_DIM,
        vae_scale_factors=(8, 16, 16),
        gated_attn=newer,
        cross_attn_mod=newer,
        audio_in_channels=AUDIO_TOKEN_DIM,
        audio_out_channels=AUDIO_TOKEN_DIM,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=AUDIO_HEAD_DIM,
        audio_cross_attention_dim=AUDIO_DIM,
        audio_gated_attn=newer,
        audio_cross_attn_mod=newer,
        num_layers=3,
        caption_channels=TEXT_DIM,
        rope_type="split" if newer else "interleaved",
        use_prompt_embeddings=not newer,
        perturbed_attn=newer,
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


def small_video_vae() -> AutoencoderKLLTX2Video:
    """Videos (batch, 3, 8 f + 1, 16 h, 16 w) to latents (batch, LATENT_CHANNELS, f + 1, h, w), normalised unevenly."""
    vae = AutoencoderKLLTX2Video(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        patch_size=2,
        decoder_causal=False,
        spatial_compression_ratio=16,
        temporal_compression_ratio=8,
    )
    vae.latents_mean.copy_(torch.linspace(-0.2, 0.2, LATENT_CHANNELS))
    vae.latents_std.copy_(torch.linspace(0.8, 1.2, LATENT_CHANNELS))
    return vae.eval()


def small_audio_vae() -> AutoencoderKLLTX2Audio:
    """Spectrograms (batch, 2, 4 t - 3, MEL_BINS) to latents (batch, AUDIO_LATENT_CHANNELS, t, MEL_BINS / 4)."""
    vae = AutoencoderKLLTX2Audio(
        base_channels=AUDIO_TOKEN_DIM,  # its normalisation is of packed latents, with as many values as base channels
        ch_mult=(1, 2, 4),
        num_res_blocks=1,
        resolution=32,
        latent_channels=AUDIO_LATENT_CHANNELS,
        mel_bins=MEL_BINS,
    )
    vae.latents_mean.copy_(torch.linspace(-0.2, 0.2, AUDIO_TOKEN_DIM))
    vae.latents_std.copy_(torch.linspace(0.8, 1.2, AUDIO_TOKEN_DIM))
    return vae.eval()


def small_vocoder(newer: bool) -> LTX2Vocoder | LTX2VocoderWithBWE:
    """Spectrograms (batch, 2, t, MEL_BINS) to waveforms (batch, 2, 240 t) at 24 kHz, in 2.3 (batch, 2, 480 t) at 48."""
    convolutions = dict(in_channels=2 * MEL_BINS, resnet_kernel_sizes=[3], resnet_dilations=[[1, 3]])
    if newer:
        vocoder = LTX2VocoderWithBWE(
            hidden_channels=64,
            bwe_hidden_channels=32,
            filter_length=160,
            window_length=160,
            num_mel_channels=MEL_BINS,
            **convolutions,
            **{f"bwe_{name}": value for name, value in convolutions.items()},
        )
        # These are zeros until weights are loaded.
        vocoder.mel_stft.stft_fn.forward_basis.normal_()
        vocoder.mel_stft.mel_basis.uniform_()
    else:
        vocoder = LTX2Vocoder(hidden_channels=32, **convolutions)
    # Waveforms that vary over time and with the spectrogram, and are clipped little.
    with torch.no_grad():
        for parameter in vocoder.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(1.3 if newer else 2)
    return vocoder.eval()


def run_ltx2(
    pipe: DiffusionPipeline, steps: int = 8, seed: int = 0, frames: int = 17, size: int = 64, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (1, channels, f, h, w) of video and (1, channels, t, bins) of audio, every guidance on unless told.

    17 frames of 64 x 64 pixels at 24 per second are 3 x 4 x 4 video tokens and 18 of audio. With output_type='np':
    frames (1, frames, size, size, 3) and a waveform (1, 2, samples) instead.
    """
    options = {
        "prompt": "a red circle moving right",
        "guidance_scale": 3.0,
        "stg_scale": 1.0,
        "modality_scale": 3.0,
        "guidance_rescale": 0.7,
        "audio_guidance_scale": 7.0,
        "audio_stg_scale": 1.0,
        "audio_modality_scale": 3.0,
        "audio_guidance_rescale": 0.7,
        "spatio_temporal_guidance_blocks": [1],
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
            return_dict=False,
            **options,
        )
