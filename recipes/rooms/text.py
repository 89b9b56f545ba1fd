"""Train the small text encoder: from every state of a caption, linear heads read all of its labels.

So each of the states that the transformer attends to knows the whole caption. The heads are thrown away.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

import captions
from sizes import TEXT_LENGTH, TRANSFORMER, build_text_encoder, build_tokenizer
from training import add_arguments, train


def random_labels(rng: np.random.Generator) -> dict[str, str]:
    """Labels that a caption can say, more evenly spread than the world's, so that rare words are learnt too."""

    def one(values) -> str:
        values = list(values)
        return values[int(rng.integers(len(values)))]

    if rng.random() < 0.2:
        moving = ("pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out", "slide left", "slide right")
        labels = {"photograph": one(captions.PHOTOGRAPHS[1:]), "camera": one((*moving, "still", "still"))}
        if labels["camera"] == "still":
            labels |= {"mover": "picture", "motion": one(("left", "right"))}
        elif labels["camera"].startswith("pan"):
            labels["speed"] = one(("none", "slowly"))
        return labels
    cameras = [key for key in captions.CAMERA if not key.startswith(("pan", "zoom", "slide"))]
    labels = {
        "camera": one([*cameras, "still", "still", "still"]),
        "colour": one(captions.COLOURS),
        "material": one(("none", *captions.MATERIALS)),
        "space": one(captions.SPACES),
        "light": one(captions.LIGHTS),
        "gun": one(("none", "none", "none", "gun")),
        "mover": one(captions.MOVERS[:-1]),
    }
    if labels["camera"] != "still":
        labels["speed"] = one(("none", "slowly"))
    if labels["mover"] == "door":
        labels["motion"] = one(("opens", "closes"))
    elif labels["mover"] != "none":
        labels["motion"] = one(("left", "right", "toward", "away", "stands"))
    return labels


def main() -> None:
    parser = argparse.ArgumentParser(prog="rooms text", description=__doc__)
    add_arguments(parser, steps=900)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(args.out / "tokenizer")
    heads = {key: torch.nn.Linear(TRANSFORMER["text_dim"], len(values)) for key, values in captions.LABELS.items()}
    both = torch.nn.ModuleDict({"encoder": build_text_encoder(len(tokenizer)), "heads": torch.nn.ModuleDict(heads)})
    both.to(args.device)

    def loss_at(step: int, progress: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rng = np.random.default_rng([step, 3])
        labels = [random_labels(rng) for _ in range(args.batch)]
        texts = [captions.caption(entry) for entry in labels]
        tokens = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").to(args.device)
        states = both["encoder"](tokens.input_ids, tokens.attention_mask).last_hidden_state
        real = tokens.attention_mask.bool()
        losses, right = [], []
        for key, values in captions.LABELS.items():
            said = torch.tensor([values.index(entry.get(key, "none")) for entry in labels], device=args.device)
            wanted = said[:, None].expand(real.shape)[real]
            logits = both["heads"][key](states[real])
            losses.append(torch.nn.functional.cross_entropy(logits, wanted))
            right.append((logits.argmax(-1) == wanted).float().mean())
        rights = torch.stack(right)
        loss = torch.stack(losses).sum()
        return loss, {"loss": loss, "right": rights.mean(), "worst": rights.min()}

    averaged = train(
        both,
        loss_at,
        args,
        rank=0,
        muon_rate=0.02,
        adam_rate=2e-3,
        # T5 attention has no scale of its own: its logits run away when an optimizer ignores the size of a gradient.
        edges=(".q.", ".k.", "shared", "embed_tokens", "relative_attention_bias", "heads."),
        checkpoint=args.out / "text.pt",
        averaging=0.99,
    )
    both.load_state_dict(averaged)
    both["encoder"].save_pretrained(args.out / "text_encoder")


if __name__ == "__main__":
    main()
