"""A run's results in parts that are small enough to be carried, and joined again.

What is kept of a checkpoint are its averaged weights, in half precision; a resumed run begins with new optimizers.
"""

from __future__ import annotations

import argparse
import io
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from training import save_atomically

PART_BYTES = 15 << 20


def _halved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()}


def gather(out: Path, what: str) -> dict[str, bytes]:
    """Relative paths and contents of "transformer", or of "rest": autoencoder, text encoder, tokenizer."""
    if what == "transformer":
        state = torch.load(out / "transformer.pt", map_location="cpu", weights_only=True)
        kept = {"averaged": _halved(state["averaged"]), "live": {}, "optimizers": [], "step": state["step"]}
        buffer = io.BytesIO()
        torch.save(kept, buffer)
        return {"transformer.pt": buffer.getvalue()}
    contents = {}
    for folder in ("vae", "text_encoder", "tokenizer"):
        for path in sorted((out / folder).glob("*")):
            halve = path.suffix == ".safetensors"
            # Loaders ask which framework a file was written by.
            data = save(_halved(load_file(path)), metadata={"format": "pt"}) if halve else path.read_bytes()
            contents[f"{folder}/{path.name}"] = data
    return contents


def pack() -> None:
    parser = argparse.ArgumentParser(prog="rooms pack", description=__doc__)
    parser.add_argument("what", choices=("transformer", "rest"))
    parser.add_argument("--out", type=Path, default=Path("runs/rooms"))
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    buffer = io.BytesIO()
    torch.save(gather(args.out, args.what), buffer)
    data = zlib.compress(buffer.getvalue(), 3)
    args.to.mkdir(parents=True, exist_ok=True)
    pieces = [data[i : i + PART_BYTES] for i in range(0, len(data), PART_BYTES)]
    for index, piece in enumerate(pieces):
        (args.to / f"{args.what}-{index:02}-of-{len(pieces):02}.part").write_bytes(piece)
    print(f"{args.what}: {len(data) / 1e6:.1f} MB in {len(pieces)} parts")


def unpack() -> None:
    parser = argparse.ArgumentParser(prog="rooms unpack", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="where the parts lie; they may lie in several")
    parser.add_argument("--out", type=Path, default=Path("runs/rooms"))
    args = parser.parse_args()
    found = {path.name: path for folder in args.folders for path in folder.glob("*.part")}
    for what in ("transformer", "rest"):
        names = sorted(name for name in found if name.startswith(f"{what}-"))
        if not names:
            continue
        wanted = int(names[0].removesuffix(".part").rsplit("-", 1)[1])
        if len(names) != wanted:
            raise SystemExit(f"{what}: {len(names)} of {wanted} parts")
        data = zlib.decompress(b"".join(found[name].read_bytes() for name in names))
        for relative, content in torch.load(io.BytesIO(data), weights_only=True).items():
            path = args.out / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            if relative == "transformer.pt":
                state = torch.load(io.BytesIO(content), weights_only=True)
                state["averaged"] = {k: v.float() for k, v in state["averaged"].items()}
                save_atomically(state, path)
            else:
                path.write_bytes(content)
        print(f"{what}: {len(names)} parts into {args.out}")
