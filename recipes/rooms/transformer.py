"""Train the transformer by flow matching: caption dropout, and a clean first frame on a part of the batches.

`--phases 1:0.15:256,9:0.85:40`: single latent frames for 15 % of the run, 256 a GPU; then whole clips, 40 a GPU.
Most of what there is to learn about textures and words costs little at one frame.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from sizes import FLOW_SHIFT, TEXT_LENGTH, build_transformer, encode_text, load_text
from training import add_arguments, join_others, leave_others, train

CAPTION_DROPOUT = 0.1
FIRST_FRAME_SHARE = 0.3
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


def phase_at(phases: list[tuple[int, float, int]], progress: float) -> tuple[int, int]:
    """Latent frames and batch of the phase that a run's `progress` lies in."""
    for frames, share, batch in phases:
        if progress < share:
            return frames, batch
        progress -= share
    return phases[-1][0], phases[-1][2]


def load_latents(args: argparse.Namespace, rank: int, count: int, device: torch.device):
    """This process's share of all latents, normalised, in bf16 on the device, and the captions' states."""
    vae = AutoencoderKLWan.from_pretrained(args.out / "vae")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    tokenizer, encoder = load_text(args.out, device)
    latents, captions = [], []
    for path in sorted(args.out.glob("latents-*.pt")):
        saved = torch.load(path, weights_only=True, mmap=True)
        for part in saved["latents"][rank::count].split(256):
            latents.append(((part.to(device).float() - mean.to(device)) / std.to(device)).bfloat16())
        captions += saved["captions"][rank::count]
    states = encode_text(tokenizer, encoder, captions, device).bfloat16()
    nothing = encode_text(tokenizer, encoder, [""], device)[0].bfloat16()
    return torch.cat(latents), states, nothing


def main() -> None:
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(prog="rooms train", description=__doc__)
    add_arguments(parser, steps=200000)
    parser.add_argument(
        "--phases", default="1:0.12:256,9:0.88:40", help="latent frames:share of the run:clips a GPU, ..."
    )
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=1.5e-3)
    parser.add_argument("--averaging", type=float, default=0.998)
    parser.add_argument("--decay-from", type=float, default=0.6, help="share of the run after which the rate falls")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--toy", action="store_true", help="one thin layer, for tests")
    args = parser.parse_args()
    rank, count, device = join_others(args.device)
    torch.manual_seed(0)
    phases = [(int(f), float(s), int(b)) for f, s, b in (phase.split(":") for phase in args.phases.split(","))]
    latents, states, nothing = load_latents(args, rank, count, device)
    model = build_transformer(args.toy).to(device)
    if rank == 0:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{size:.1f} M parameters, {len(latents)} clips a GPU, {time.perf_counter() - begun:.0f} s", flush=True)
    for block in model.blocks:
        block.attn2.set_processor(PaddedText())
    if device.type == "cuda" and not args.no_compile:
        # A block compiles in seconds where the whole model takes minutes, and there are several shapes.
        torch._dynamo.config.recompile_limit = 64
        model.compile_repeated_blocks(dynamic=False)
    forward: torch.nn.Module = model
    if count > 1:
        ids = [device] if device.type == "cuda" else None
        forward = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def loss_at(step: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        frames, batch = phase_at(phases, progress)
        shared = torch.Generator().manual_seed(step)
        first = int(frames > 1 and float(torch.rand((), generator=shared)) < FIRST_FRAME_SHARE)
        own = torch.Generator().manual_seed(step * count + rank + 1)
        pick = torch.randint(len(latents), (batch,), generator=own).to(device)
        x0 = latents[pick, :, :frames].float()
        text = states[pick]
        text[(torch.rand(batch, generator=own) < CAPTION_DROPOUT).to(device)] = nothing
        # One level from each of `batch` equal slices of 0..1: a batch covers all levels. Then the sampler's own shift.
        u = (torch.randperm(batch, generator=own) + torch.rand(batch, generator=own)) / batch
        sigma = (FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)).to(device)
        noise = torch.randn(x0.shape, device=device, generator=torch.Generator(device).manual_seed(step * count + rank))
        noisy = x0 + (noise - x0) * sigma.view(-1, 1, 1, 1, 1)
        timestep = 1000 * sigma
        if first:
            noisy[:, :, 0] = x0[:, :, 0]
            tokens = x0.shape[3] * x0.shape[4] // 4
            timestep = timestep[:, None].repeat(1, frames * tokens)
            timestep[:, :tokens] = 0
        with torch.autocast(device.type, torch.bfloat16):
            velocity = forward(noisy, timestep, text, return_dict=False)[0]
        loss = (velocity.float() - (noise - x0))[:, :, first:].square().mean()
        return loss, {"loss": loss}

    train(
        model,
        loss_at,
        args,
        rank=rank,
        muon_rate=args.rate,
        adam_rate=args.adam_rate,
        edges=("patch_embedding", "condition_embedder", "proj_out", "scale_shift_table"),
        checkpoint=args.out / "transformer.pt",
        averaging=args.averaging,
        decay_from=args.decay_from,
        begun=begun,
    )
    leave_others()


if __name__ == "__main__":
    main()
