"""Do real sizes run within a given memory, and does the plan know it? Random weights, the pipeline's own loop, a GPU.

The allocator is capped (`torch.cuda.set_per_process_memory_fraction`), so that a run that wants more fails. Text states
are given and nothing is decoded: the text encoder is where `enable_model_cpu_offload` leaves it, in host memory.

python benchmarks/capped.py wan2.1-t2v-14b --height 720 --width 1280 --vram 80
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

import heterostep
from heterostep import configs


def build(name: str) -> WanPipeline:
    """The checkpoint's transformer with random weights, beside a small autoencoder that is not used."""
    torch.manual_seed(0)
    found = configs.load(name)
    scheduler = UniPCMultistepScheduler.from_config({k: v for k, v in found.scheduler.items() if k != "class"})
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1),
        transformer=configs.build(found.transformer, torch.bfloat16, "cuda"),
        scheduler=scheduler,
    ).to("cuda")
    pipe.transformer.set_attention_backend("_native_cudnn")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a Wan text-to-video configuration")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--vram", type=float, required=True, help="gigabytes (1e9)")
    parser.add_argument("--kv-store", default="auto")
    parser.add_argument("--shares", type=float, nargs="+", default=[1, 1, 0.25, 0.25], help="active share of each step")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipe = build(args.name)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(args.vram * 1e9 / total, 1.0))
    sizes = {"height": args.height, "width": args.width, "num_frames": args.frames, "guidance_scale": 5.0}
    sizes["num_inference_steps"] = len(args.shares)
    options = {"share": args.shares, "kv_store": args.kv_store}
    planned = heterostep.plan(pipe, attention_backend="_native_cudnn", vram=args.vram, **sizes, **options)
    text = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    marks = []

    def mark(*_):
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return {}

    with heterostep.enabled(pipe, **options):
        mark()
        pipe(
            prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), output_type="latent",
            generator=torch.Generator().manual_seed(0), callback_on_step_end=mark, **sizes,
        )  # fmt: skip
    memory = heterostep.report(pipe).memory
    line = {
        "name": args.name, "device": torch.cuda.get_device_name(), "torch": torch.__version__, **sizes,
        "vram": args.vram, "shares": args.shares, "tokens": planned.tokens,
        "planned_store": planned.chosen and planned.chosen.store, "kv_store": memory.kv_store,
        "fell_back": memory.fell_back, "planned_peak": planned.peak_bytes, "peak": memory.peak_bytes,
        "reserved": torch.cuda.max_memory_reserved(), "kv_bytes": memory.kv_cache_bytes,
        "kv_host_bytes": memory.kv_host_bytes, "step_seconds": [b - a for a, b in zip(marks, marks[1:])],
    }  # fmt: skip
    print(json.dumps(line))
    if args.json:
        args.json.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
