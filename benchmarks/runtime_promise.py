"""Is the promised runtime kept at real sizes? Wan 2.1 1.3B's configuration with random weights, on a GPU.

The pipeline's own loop, 480 x 832 x 81 frames unless told otherwise, bf16, cuDNN attention. Dense loops before and
after the sparse ones, so that the machine's drift shows. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

import heterostep


def build() -> WanPipeline:
    """The 1.3B transformer in full; text states are given, and nothing is decoded."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        transformer = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, ffn_dim=8960, num_layers=30
        )
    torch.set_default_dtype(torch.float32)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer.eval(), scheduler=scheduler
    ).to("cuda")
    pipe.transformer.set_attention_backend("_native_cudnn")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pipe = build()
    text = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16)

    def seconds(steps: int) -> float:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        pipe(
            prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), height=args.height, width=args.width,
            num_frames=args.frames, num_inference_steps=steps, guidance_scale=5.0, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(3)
    dense, rows = [seconds(args.steps)], []
    for target in args.targets:
        with heterostep.enabled(pipe, runtime=target):
            took = seconds(args.steps)
        report = heterostep.report(pipe)
        dense.append(seconds(args.steps))
        around = sum(dense[-2:]) / 2
        rows.append(
            {
                "target": target,
                "seconds": took,
                "runtime": took / around,
                "by_own_account": report.runtime.achieved,
                "share": report.share.achieved,
                "kv_gigabytes": report.memory.kv_cache_bytes / 1e9,
                "peak_gigabytes": report.memory.peak_bytes / 1e9,
            }
        )
        print("  ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    line = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dense_seconds": dense, "rows": rows}
    line |= {"height": args.height, "width": args.width, "frames": args.frames, "steps": args.steps}
    print(json.dumps(line))
    if args.json:
        args.json.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
