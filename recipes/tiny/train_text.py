"""Stage 2: tokenizer and text encoder. The encoder learns to say, per caption, what every shape and the ground are.

A linear reader must recover each shape's kind, size, direction and speed from the token that names its colour, and the
ground's colour, pattern and pan from the caption's last token: so words end up bound to the shape they describe, as
they are in a text encoder trained on real text. The reader is thrown away.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from common import TEXT_LENGTH, TRANSFORMER, Budget, scene_and_caption, train
from heterostep.tiny import world
from heterostep.tiny.world.scene import BACKGROUND_COLOURS, DIRECTIONS, KINDS, PATTERNS, SHAPE_COLOURS, SIZES, SPEEDS

FACTS = {
    "colour": list(SHAPE_COLOURS),
    "kind": list(KINDS),
    "size": list(SIZES),
    "direction": list(DIRECTIONS),
    "speed": list(SPEEDS),
}
GROUND_FACTS = {"background_colour": list(BACKGROUND_COLOURS), "pattern": list(PATTERNS), "pan": ["", *DIRECTIONS]}


def build_tokenizer(captions: int = 4000) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of every word that captions use; T5's special tokens, `</s>` at the end."""
    words = {word for seed in range(captions) for word in _split(scene_and_caption(seed)[1])}
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _split(caption: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(caption.lower())]


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TRANSFORMER["text_dim"],
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=32,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


class Reader(torch.nn.Module):
    """Linear heads: what a colour word's state says of its shape, what the last state says of the ground."""

    def __init__(self, width: int):
        super().__init__()
        self.shape = torch.nn.ModuleDict({k: torch.nn.Linear(width, len(v)) for k, v in FACTS.items()})
        self.ground = torch.nn.ModuleDict({k: torch.nn.Linear(width, len(v)) for k, v in GROUND_FACTS.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(args.out / "tokenizer")
    encoder = build_text_encoder(len(tokenizer)).to(args.device)
    reader = Reader(TRANSFORMER["text_dim"]).to(args.device)
    ids_of_colour = tokenizer.convert_tokens_to_ids(list(SHAPE_COLOURS))

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        captions = [scene_and_caption(step * args.batch + i)[1] for i in range(args.batch)]
        words = [world.parse(text) for text in captions]
        tokens = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
        ids, mask = tokens.input_ids.to(args.device), tokens.attention_mask.to(args.device)
        states = encoder(ids, mask).last_hidden_state
        rows, columns, shapes = [], [], []
        for row, said in enumerate(words):
            ground_starts = captions[row].rfind(f"{said.background_colour} {said.pattern}")
            ground_token = tokens.char_to_token(row, ground_starts)
            at = [c for c in range(ids.shape[1]) if ids[row, c] in ids_of_colour and c != ground_token]
            for column, shape in zip(at, said.shapes, strict=True):
                rows.append(row), columns.append(column), shapes.append(shape)
        named = states[rows, columns]
        last = states[torch.arange(len(captions)), mask.sum(1) - 1]
        losses, right = [], []
        for heads, features, facts, said in (
            (reader.shape, named, FACTS, shapes),
            (reader.ground, last, GROUND_FACTS, words),
        ):
            for fact, values in facts.items():
                target = torch.tensor([values.index(getattr(item, fact)) for item in said], device=args.device)
                logits = heads[fact](features)
                losses.append(torch.nn.functional.cross_entropy(logits, target))
                right.append(float((logits.argmax(-1) == target).float().mean()))
        loss = torch.stack(losses).sum()
        right_now = torch.tensor(right)
        return loss, {"loss": loss.detach(), "right": right_now.mean(), "worst": right_now.min()}

    averaged = train(
        {"encoder": encoder, "reader": reader},
        loss_at,
        budget=Budget(args.steps),
        muon_rate=args.rate,
        adam_rate=2e-3,
        # T5 attention has no scale of its own: its logits run away when an optimizer ignores the size of a gradient.
        edges=(".q.", ".k.", "shared", "embed_tokens", "relative_attention_bias", "shape.", "ground."),
        checkpoint=args.out / "text.pt",
        averaging=0.99,
    )
    encoder.load_state_dict(averaged["encoder"])
    encoder.save_pretrained(args.out / "text_encoder")


if __name__ == "__main__":
    main()
