"""Stage 4: the transformer, by flow matching: caption dropout, and a clean first frame on part of the batches.

Clips grow during training (single frames, then short clips, then whole ones), as they do for large video models: most
of what there is to learn about textures, shapes and words costs little at one frame.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from transformers import AutoTokenizer, UMT5EncoderModel

from common import TEXT_LENGTH, Budget, build_transformer, parse_phases, phase_at, train

CAPTION_DROPOUT = 0.1
FIRST_FRAME_SHARE = 0.3
FLOW_SHIFT = 3.0
# The pipelines pad text states with zeros to this length.
PIPELINE_TEXT_LENGTH = 512


class PaddedText(WanAttnProcessor):
    """Cross-attention over short text that counts its last (padding) state as often as the pipeline's padding stands.

    Every padding state is the same zero vector, so one of them with log(count) added to its logit gives exactly the
    attention over 512 states, at a twelfth of the cost.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        bias = hidden_states.new_zeros(1, 1, 1, encoder_hidden_states.shape[1])
        bias[..., -1] = math.log(PIPELINE_TEXT_LENGTH - TEXT_LENGTH + 1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias, rotary_emb)


def encode_text(tokenizer, encoder, captions: list[str], device: str) -> torch.Tensor:
    """States [len(captions), TEXT_LENGTH, text_dim], zero after each caption's end, as WanPipeline makes them."""
    out = []
    for start in range(0, len(captions), 256):
        tokens = tokenizer(
            captions[start : start + 256], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
        ).to(device)
        with torch.no_grad():
            states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        out.append(states * tokens.attention_mask[..., None])
    return torch.cat(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--phases", default="9:64:6000", help="latent frames:batch:steps, ...")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    parser.add_argument("--averaging", type=float, default=0.999)
    parser.add_argument("--init", type=Path, help="start from these weights (a state dict)")
    parser.add_argument("--compile", action="store_true", help="worth its minute on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    Budget.add_arguments(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    phases = parse_phases(args.phases)
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae")
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    tokenizer = AutoTokenizer.from_pretrained(args.out / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(args.out / "text_encoder").to(args.device).eval()
    sets = []
    for path in sorted(args.out.glob("latents-*.pt")):
        saved = torch.load(path, weights_only=True)
        latents = ((saved["latents"].float() - mean) / std).to(torch.bfloat16).to(args.device)
        sets.append((latents, encode_text(tokenizer, encoder, saved["captions"], args.device)))
        print(f"{path.name}: {len(latents)} clips of {latents.shape[2]} latent frames", flush=True)
    no_caption = encode_text(tokenizer, encoder, [""], args.device)[0]
    model = build_transformer().to(args.device)
    if args.init:
        model.load_state_dict(torch.load(args.init, weights_only=True))
    for block in model.blocks:
        block.attn2.set_processor(PaddedText())
    forward = torch.compile(model) if args.compile else model

    def draw_clips(frames: int, batch: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [batch, C, frames, h, w] and text states of clips that are long enough, each equally likely."""
        fitting = [(latents, text) for latents, text in sets if latents.shape[2] >= frames]
        pick = torch.randint(sum(len(latents) for latents, _ in fitting), (batch,), generator=rng)
        clean, text = [], []
        for latents, states in fitting:
            here = pick[(pick >= 0) & (pick < len(latents))].to(args.device)
            clean.append(latents[here, :, :frames].float())
            text.append(states[here])
            pick = pick - len(latents)
        return torch.cat(clean), torch.cat(text)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        frames, batch = phase_at(phases, step)
        rng = torch.Generator().manual_seed(step)
        x0, states = draw_clips(frames, batch, rng)
        dropped = torch.rand(batch, generator=rng) < CAPTION_DROPOUT
        states[dropped.to(args.device)] = no_caption
        # One level from each of `batch` equal slices of 0..1: a batch covers all levels. Then the sampler's own shift.
        u = (torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)) / batch
        sigma = (FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)).to(args.device)
        noise = torch.randn(x0.shape, generator=torch.Generator(args.device).manual_seed(step), device=args.device)
        noisy = x0 + (noise - x0) * sigma.view(-1, 1, 1, 1, 1)
        timestep, first = 1000 * sigma, 0
        if frames > 1 and torch.rand((), generator=rng) < FIRST_FRAME_SHARE:
            first = 1
            noisy[:, :, 0] = x0[:, :, 0]
            tokens = x0.shape[3] * x0.shape[4] // 4
            timestep = timestep[:, None].repeat(1, frames * tokens)
            timestep[:, :tokens] = 0
        with torch.autocast(args.device, torch.bfloat16):
            velocity = forward(noisy, timestep, states, return_dict=False)[0]
        loss = (velocity.float() - (noise - x0))[:, :, first:].square().mean()
        return loss, {"frames": torch.tensor(frames), "loss": loss.detach()}

    averaged = train(
        {"model": model},
        loss_at,
        budget=Budget(sum(steps for _, _, steps in phases), args.seconds, args.pause),
        muon_rate=args.rate,
        adam_rate=args.adam_rate,
        edges=("patch_embedding", "condition_embedder", "proj_out", "scale_shift_table"),
        checkpoint=args.out / "transformer.pt",
        averaging=args.averaging,
        save_every=1000,
        log_every=50,
    )
    if averaged is None:
        return
    model.load_state_dict(averaged["model"])
    for block in model.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    model.save_pretrained(args.out / "transformer")


if __name__ == "__main__":
    main()
