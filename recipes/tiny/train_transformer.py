"""Stage 4: the transformer, by flow matching: caption dropout, and a clean first frame on part of the batches.

Clips grow during training (single frames, then short clips, then whole ones), as they do for large video models: most of
what there is to learn about textures, shapes and words costs little at one frame.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from common import TEXT_LENGTH, build_transformer, train
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from transformers import AutoTokenizer, UMT5EncoderModel

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


def parse_phases(text: str) -> list[tuple[int, int, int]]:
    """"1:48:300,9:8:200" -> [(latent frames, batch, steps), ...]."""
    return [tuple(int(n) for n in phase.split(":")) for phase in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--phases", default="1:64:500,3:64:1000,9:64:2500", help="latent frames:batch:steps, ...")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    parser.add_argument("--averaging", type=float, default=0.995)
    parser.add_argument("--compile", action="store_true", help="worth its minute on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
        latents = ((saved["latents"].float() - mean) / std).to(torch.bfloat16)
        sets.append((latents, encode_text(tokenizer, encoder, saved["captions"], args.device)))
        print(f"{path.name}: {len(latents)} clips of {latents.shape[2]} latent frames", flush=True)
    no_caption = encode_text(tokenizer, encoder, [""], args.device)[0]
    model = build_transformer().to(args.device)
    for block in model.blocks:
        block.attn2.set_processor(PaddedText())
    forward = torch.compile(model) if args.compile else model
    ends = [sum(p[2] for p in phases[: i + 1]) for i in range(len(phases))]

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        frames, batch, _ = phases[next(i for i, end in enumerate(ends) if step < end)]
        rng = torch.Generator().manual_seed(step)
        fitting = [(latents, text) for latents, text in sets if latents.shape[2] >= frames]
        pick = torch.randint(sum(len(latents) for latents, _ in fitting), (batch,), generator=rng).tolist()
        clean, text = [], []
        for index in pick:
            for latents, states in fitting:
                if index < len(latents):
                    clean.append(latents[index, :, :frames])
                    text.append(states[index])
                    break
                index -= len(latents)
        x0 = torch.stack(clean).float()
        states = torch.stack(text)
        dropped = torch.rand(batch, generator=rng) < CAPTION_DROPOUT
        states[dropped.to(states.device)] = no_caption
        noise = torch.randn(x0.shape, generator=rng)
        # One level from each of `batch` equal slices of 0..1: a batch covers all levels. Then the sampler's own shift.
        u = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
        sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
        weight = torch.ones(1, 1, frames, 1, 1)
        noisy = x0 + (noise - x0) * sigma.view(-1, 1, 1, 1, 1)
        timestep = 1000 * sigma
        if frames > 1 and torch.rand((), generator=rng) < FIRST_FRAME_SHARE:
            noisy[:, :, 0] = x0[:, :, 0]
            weight[:, :, 0] = 0
            tokens = x0.shape[3] * x0.shape[4] // 4
            timestep = timestep[:, None].repeat(1, frames * tokens)
            timestep[:, :tokens] = 0
        target = (noise - x0).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            velocity = forward(noisy.to(args.device), timestep.to(args.device), states, return_dict=False)[0]
        error = (velocity.float() - target).square() * weight.to(args.device)
        loss = error.mean() / weight.mean()
        return loss, {"frames": float(frames), "loss": float(loss.detach())}

    averaged = train(
        {"model": model}, loss_at, steps=ends[-1], muon_rate=args.rate, adam_rate=args.adam_rate,
        edges=("patch_embedding", "condition_embedder", "proj_out", "scale_shift_table"),
        checkpoint=args.out / "transformer.pt", averaging=args.averaging, save_every=100, log_every=25,
    )  # fmt: skip
    model.load_state_dict(averaged["model"])
    for block in model.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    model.save_pretrained(args.out / "transformer")


if __name__ == "__main__":
    main()
