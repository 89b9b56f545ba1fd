"""The stages' results as one pipeline folder in half precision, which diffusers loads."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from sizes import FLOW_SHIFT, build_transformer


def main() -> None:
    parser = argparse.ArgumentParser(prog="rooms assemble", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/rooms"), help="where the stages wrote")
    parser.add_argument("--to", type=Path, default=Path("runs/rooms/pipeline"))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    transformer = build_transformer(args.toy)
    state = torch.load(args.out / "transformer.pt", map_location="cpu", weights_only=True)
    transformer.load_state_dict(state["averaged"])
    pipe = WanPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(args.out / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(args.out / "text_encoder", dtype=torch.float16),
        vae=AutoencoderKLWan.from_pretrained(args.out / "vae", dtype=torch.float16),
        transformer=transformer.half(),
        transformer_2=None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ),
        expand_timesteps=True,
    )
    shutil.rmtree(args.to, ignore_errors=True)
    pipe.save_pretrained(args.to, safe_serialization=True)
    size = sum(f.stat().st_size for f in args.to.rglob("*") if f.is_file())
    print(f"{args.to}: step {state['step']}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
