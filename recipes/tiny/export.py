"""Stage 5: the stages' results as one pipeline folder, in half precision."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from heterostep import tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="where the stages wrote")
    parser.add_argument("--to", type=Path, default=tiny.WEIGHTS)
    args = parser.parse_args()
    half = {"torch_dtype": torch.float16}
    pipe = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(args.out / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(args.out / "text_encoder", dtype=torch.float16),
        vae=AutoencoderKLWan.from_pretrained(args.out / "vae", **half),
        transformer=WanTransformer3DModel.from_pretrained(args.out / "transformer", **half),
        transformer_2=None,
        # What Wan ships, with the shift of its smaller models.
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        expand_timesteps=True,
    )
    shutil.rmtree(args.to, ignore_errors=True)
    pipe.save_pretrained(args.to, safe_serialization=True)
    size = sum(f.stat().st_size for f in args.to.rglob("*") if f.is_file())
    print(f"{args.to}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
