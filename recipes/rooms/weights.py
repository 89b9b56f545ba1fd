"""The trained model's weights in eight bits, as `weights/` keeps them, and back.

Matrices and kernels are rounded to 255 levels, each output channel by a scale of its own; vectors are in half
precision.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from training import save_atomically

KEPT = Path(__file__).parent / "weights"
MODELS = ("vae", "text_encoder")
SCALE = ".scale"
SHARD = "15MB"
STATISTICS = ("latents_mean", "latents_std")


def rounded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """int8 and float16 tensors: of a weight [out, ...] its levels, and under its name and ".scale" the step [out]."""
    out = {}
    for name, weight in state.items():
        if not weight.is_floating_point() or weight.ndim < 2:
            out[name] = (weight.half() if weight.is_floating_point() else weight).contiguous()
            continue
        rows = weight.float().flatten(1)
        step = (rows.abs().amax(1) / 127).clamp_min(1e-12).half().float().clamp_min(6e-8)
        out[name] = (rows / step[:, None]).round().clamp(-127, 127).to(torch.int8).view(weight.shape).contiguous()
        out[name + SCALE] = step.half()
    return out


def restored(kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in float32."""
    out = {}
    for name, weight in kept.items():
        if name.endswith(SCALE):
            continue
        step = kept.get(name + SCALE)
        if step is not None:
            weight = weight.float() * step.float().view(-1, *[1] * (weight.ndim - 1))
        out[name] = weight.float() if weight.is_floating_point() else weight
    return out


def save(state: dict[str, torch.Tensor], folder: Path, name: str) -> None:
    """A state in files of at most SHARD."""
    pattern = name + "{suffix}.safetensors"
    save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size=SHARD)


def load(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """What `save` wrote."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{name}*.safetensors")):
        state |= load_file(path)
    return state


def keep() -> None:
    parser = argparse.ArgumentParser(prog="rooms keep", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/rooms"), help="where the stages wrote")
    parser.add_argument("--to", type=Path, default=KEPT)
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    state = torch.load(args.out / "transformer.pt", map_location="cpu", weights_only=True)
    save(rounded(state["averaged"]), args.to, "transformer")
    for name in MODELS:
        (weights,) = (args.out / name).glob("*.safetensors")
        save(rounded(load_file(weights)), args.to, name)
    settings = json.loads((args.out / "vae" / "config.json").read_text())
    about = {"step": state["step"], "latents": {name: settings[name] for name in STATISTICS}}
    (args.to / "model.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{args.to}: {sum(path.stat().st_size for path in args.to.iterdir()) / 1e6:.1f} MB")


def restore() -> None:
    parser = argparse.ArgumentParser(prog="rooms restore", description=__doc__)
    parser.add_argument("--from", dest="kept", type=Path, default=KEPT)
    parser.add_argument("--out", type=Path, default=Path("runs/rooms"), help="as the training's stages would fill it")
    args = parser.parse_args()
    if not (args.kept / "model.json").exists():
        raise SystemExit(f"there are no weights in {args.kept}: take a clone of the repository, or train (README.md)")
    from sizes import build_text_encoder, build_tokenizer, build_vae

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(args.out / "tokenizer")
    built = {"vae": build_vae(), "text_encoder": build_text_encoder(len(tokenizer))}
    about = json.loads((args.kept / "model.json").read_text())
    built["vae"].register_to_config(**about["latents"])
    for name, model in built.items():
        # The embedding is there under two names.
        lacking = model.load_state_dict(restored(load(args.kept, name)), strict=False)
        if set(lacking.missing_keys) - {"encoder.embed_tokens.weight"} or lacking.unexpected_keys:
            raise SystemExit(f"{args.kept / name} is of another model: {lacking}")
        model.save_pretrained(args.out / name)
    step = about["step"]
    averaged = restored(load(args.kept, "transformer"))
    save_atomically({"averaged": averaged, "live": {}, "optimizers": [], "step": step}, args.out / "transformer.pt")
    print(f"{args.out}: the transformer of step {step}, autoencoder, text encoder")
