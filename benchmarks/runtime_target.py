"""Is the target runtime met at real sizes? A checkpoint's configuration with random weights, on a GPU.

The pipeline's own loop with guidance, 81 frames of 480 x 832 (Wan) or 121 of 512 x 768 (LTX-2) unless told otherwise,
bf16, cuDNN attention. A dense loop before the first sparse one and after each (--dense 1: after the first alone);
ratios are to the median of all. Prints JSON.

python benchmarks/runtime_target.py --model ltx-2 --frames 61
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline

import heterostep
from capped import build
from heterostep import configs


def wan(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and its call's options but for sizes and steps."""
    text = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16)
    return build(name), {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text), "guidance_scale": 5.0}


def ltx2(name: str) -> tuple[Any, dict[str, Any]]:
    """As `wan`; guidance by the prompt alone, so a call has two samples."""
    torch.manual_seed(0)
    found = configs.load(name)
    scheduler = FlowMatchEulerDiscreteScheduler(**{k: v for k, v in found.scheduler.items() if k != "class"})
    parts = {"transformer": found.transformer, "vae": found.vae, **found.others}
    models = {part: configs.build(component, torch.bfloat16, "cuda") for part, component in parts.items()}
    pipe = LTX2Pipeline(tokenizer=None, text_encoder=None, scheduler=scheduler, **models)
    pipe.transformer.set_attention_backend("_native_cudnn")
    pipe.set_progress_bar_config(disable=True)
    connectors = found.others["connectors"]
    width = connectors["caption_channels"] * connectors["text_proj_in_factor"]
    text = torch.randn(1, 1024, width, device="cuda", dtype=torch.bfloat16)
    read = torch.ones(1, 1024, device="cuda")
    options = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text), "guidance_scale": 4.0}
    options |= {"prompt_attention_mask": read, "negative_prompt_attention_mask": read}
    return pipe, options | {"stg_scale": 0, "modality_scale": 1, "audio_stg_scale": 0, "audio_modality_scale": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan2.1-t2v-1.3b", help="a Wan or LTX-2 text-to-video configuration")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--dense", type=int, help="dense loops; by default one more than there are targets")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    defaults = configs.load(args.model).defaults
    height, width = args.height or defaults["height"], args.width or defaults["width"]
    frames = args.frames or defaults["num_frames"]
    pipe, options = (ltx2 if args.model.startswith("ltx") else wan)(args.model)

    def seconds(steps: int) -> float:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        pipe(
            height=height, width=width, num_frames=frames, num_inference_steps=steps, output_type="latent",
            generator=torch.Generator().manual_seed(0), **options,
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(3)
    dense, rows = [], []
    if args.dense is None:
        dense.append(seconds(args.steps))
    for target in args.targets:
        steps: list[heterostep.StepInfo] = []
        with heterostep.enabled(pipe, runtime=target, on_step=steps.append):
            took = seconds(args.steps)
        report = heterostep.report(pipe)
        rows.append(
            {
                "target": target,
                "seconds": took,
                "by_own_account": report.runtime.achieved,
                "share": report.share.achieved,
                "kv_store": report.memory.kv_store,
                "kv_gigabytes": report.memory.kv_cache_bytes / 1e9,
                "peak_gigabytes": report.memory.peak_bytes / 1e9,
                "warmup_seconds": report.runtime.warmup_seconds,
                "active_share": [round(share, 4) for share in report.active_share],
                "elapsed_seconds": [round(info.elapsed_seconds, 3) for info in steps],
            }
        )
        if args.dense is None or len(dense) < args.dense:
            dense.append(seconds(args.steps))
        print(rows[-1], flush=True)
    for row in rows:
        row["runtime"] = row["seconds"] / statistics.median(dense)
        print(f"promised {row['target']:g}, took {row['runtime']:.4f} of the dense loop")
    line = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dense_seconds": dense, "rows": rows}
    line |= {"model": args.model, "height": height, "width": width, "frames": frames, "steps": args.steps}
    print(json.dumps(line))
    if args.json:
        args.json.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
