# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes the workflows beside this file: `python make.py`. Each is a list of nodes; a pair is a link."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Inputs (those with a type are links, the others fields in the order of the node's) and outputs of each kind of node.
KINDS: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "UNETLoader": ({"unet_name": None, "weight_dtype": None}, ["MODEL"]),
    "CLIPLoader": ({"clip_name": None, "type": None, "device": None}, ["CLIP"]),
    "VAELoader": ({"vae_name": None}, ["VAE"]),
    "CheckpointLoaderSimple": ({"ckpt_name": None}, ["MODEL", "CLIP", "VAE"]),
    "LTXAVTextEncoderLoader": ({"text_encoder": None, "ckpt_name": None, "device": None}, ["CLIP"]),
    "LTXVAudioVAELoader": ({"ckpt_name": None}, ["VAE"]),
    "ModelSamplingSD3": ({"model": "MODEL", "shift": None}, ["MODEL"]),
    "Heterostep": (
        {"model": "MODEL", "share": None, "policy": None, "sparse_share": None, "kv_store": None, "verbose": None},
        ["MODEL"],
    ),
    "HeterostepReport": (
        {"latent": "LATENT", "model": "MODEL", "second_model": "MODEL"},
        ["LATENT", "STRING", "IMAGE", "IMAGE"],
    ),
    "CLIPTextEncode": ({"clip": "CLIP", "text": None}, ["CONDITIONING"]),
    "LTXVConditioning": (
        {"positive": "CONDITIONING", "negative": "CONDITIONING", "frame_rate": None},
        ["CONDITIONING", "CONDITIONING"],
    ),
    "EmptyHunyuanLatentVideo": ({"width": None, "height": None, "length": None, "batch_size": None}, ["LATENT"]),
    "EmptyLTXVLatentVideo": ({"width": None, "height": None, "length": None, "batch_size": None}, ["LATENT"]),
    "LTXVEmptyLatentAudio": (
        {"audio_vae": "VAE", "frames_number": None, "frame_rate": None, "batch_size": None},
        ["LATENT"],
    ),
    "LTXVConcatAVLatent": ({"video_latent": "LATENT", "audio_latent": "LATENT"}, ["LATENT"]),
    "LTXVSeparateAVLatent": ({"av_latent": "LATENT"}, ["LATENT", "LATENT"]),
    "LTXVScheduler": (
        {
            "latent": "LATENT",
            "steps": None,
            "max_shift": None,
            "base_shift": None,
            "stretch": None,
            "terminal": None,
        },
        ["SIGMAS"],
    ),
    "KSamplerSelect": ({"sampler_name": None}, ["SAMPLER"]),
    "RandomNoise": ({"noise_seed": None}, ["NOISE"]),
    "CFGGuider": ({"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "cfg": None}, ["GUIDER"]),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ["LATENT", "LATENT"],
    ),
    "KSampler": (
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "seed": None,
            "steps": None,
            "cfg": None,
            "sampler_name": None,
            "scheduler": None,
            "denoise": None,
        },
        ["LATENT"],
    ),
    "KSamplerAdvanced": (
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "add_noise": None,
            "noise_seed": None,
            "steps": None,
            "cfg": None,
            "sampler_name": None,
            "scheduler": None,
            "start_at_step": None,
            "end_at_step": None,
            "return_with_leftover_noise": None,
        },
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "LTXVAudioVAEDecode": ({"samples": "LATENT", "audio_vae": "VAE"}, ["AUDIO"]),
    "CreateVideo": ({"images": "IMAGE", "audio": "AUDIO", "fps": None}, ["VIDEO"]),
    "SaveVideo": ({"video": "VIDEO", "filename_prefix": None, "format": None, "codec": None}, []),
    "PreviewImage": ({"images": "IMAGE"}, []),
    "PreviewAny": ({"source": "*"}, ["STRING"]),
}
# ComfyUI's frontend puts a choice behind these fields: whether they change after each run.
SEEDS = ("seed", "noise_seed")

PROMPT = "A red fox runs through fresh snow between birches, the camera follows it from the side, morning light."
AVOID = "overexposed, static, blurred details, subtitles, worst quality, low quality, deformed, still picture"
HETEROSTEP = {"share": 0.5, "policy": "auto", "sparse_share": 0.0, "kv_store": "auto", "verbose": False}


def _texts() -> dict[str, Any]:
    return {
        "positive": ("CLIPTextEncode", {"clip": ("clip", 0), "text": PROMPT}),
        "negative": ("CLIPTextEncode", {"clip": ("clip", 0), "text": AVOID}),
    }


def _wan_parts() -> dict[str, Any]:
    umt5 = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    return {
        "clip": ("CLIPLoader", {"clip_name": umt5, "type": "wan", "device": "default"}),
        "vae": ("VAELoader", {"vae_name": "wan_2.1_vae.safetensors"}),
        **_texts(),
        "latent": ("EmptyHunyuanLatentVideo", {"width": 832, "height": 480, "length": 81, "batch_size": 1}),
    }


def _seen(model: dict[str, Any], fps: float, latent: tuple[str, int]) -> dict[str, Any]:
    saved = {"filename_prefix": "video/heterostep", "format": "auto", "codec": "auto"}
    return {
        "report": ("HeterostepReport", {"latent": latent, **model}),
        "plan": ("PreviewImage", {"images": ("report", 2)}),
        "text": ("PreviewAny", {"source": ("report", 1)}),
        "video": ("CreateVideo", {"images": ("decoded", 0), "fps": fps}),
        "save": ("SaveVideo", {"video": ("video", 0), **saved}),
    }


def wan21() -> dict[str, Any]:
    """Wan 2.1 T2V 1.3B, 50 steps."""
    return {
        "unet": ("UNETLoader", {"unet_name": "wan2.1_t2v_1.3B_fp16.safetensors", "weight_dtype": "default"}),
        **_wan_parts(),
        "shift": ("ModelSamplingSD3", {"model": ("unet", 0), "shift": 8.0}),
        "heterostep": ("Heterostep", {"model": ("shift", 0), **HETEROSTEP}),
        "sampler": (
            "KSampler",
            {
                "model": ("heterostep", 0),
                "positive": ("positive", 0),
                "negative": ("negative", 0),
                "latent_image": ("latent", 0),
                "seed": 1,
                "steps": 50,
                "cfg": 6.0,
                "sampler_name": "uni_pc",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        ),
        "decoded": ("VAEDecode", {"samples": ("report", 0), "vae": ("vae", 0)}),
        **_seen({"model": ("heterostep", 0)}, 16.0, ("sampler", 0)),
    }


def wan22() -> dict[str, Any]:
    """Wan 2.2 T2V A14B: the high-noise expert's steps, then the low-noise expert's, each with a Heterostep."""
    both: dict[str, Any] = {}
    for which in ("high", "low"):
        name = f"wan2.2_t2v_{which}_noise_14B_fp8_scaled.safetensors"
        both[f"unet_{which}"] = ("UNETLoader", {"unet_name": name, "weight_dtype": "default"})
        both[f"shift_{which}"] = ("ModelSamplingSD3", {"model": (f"unet_{which}", 0), "shift": 8.0})
        both[f"heterostep_{which}"] = ("Heterostep", {"model": (f"shift_{which}", 0), **HETEROSTEP})
    common = {"noise_seed": 1, "steps": 40, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple"}
    texts = {"positive": ("positive", 0), "negative": ("negative", 0)}
    high = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 20, "return_with_leftover_noise": "enable"}
    low = {"add_noise": "disable", "start_at_step": 20, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
    return {
        **both,
        **_wan_parts(),
        "first": (
            "KSamplerAdvanced",
            {"model": ("heterostep_high", 0), **texts, "latent_image": ("latent", 0), **common, **high},
        ),
        "second": (
            "KSamplerAdvanced",
            {"model": ("heterostep_low", 0), **texts, "latent_image": ("first", 0), **common, **low},
        ),
        "decoded": ("VAEDecode", {"samples": ("report", 0), "vae": ("vae", 0)}),
        **_seen({"model": ("heterostep_high", 0), "second_model": ("heterostep_low", 0)}, 16.0, ("second", 0)),
    }


def ltx2() -> dict[str, Any]:
    """LTX-2, 40 steps, with sound."""
    checkpoint = "ltx-2-19b-dev-fp8.safetensors"
    gemma = "gemma_3_12B_it.safetensors"
    return {
        "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "clip": ("LTXAVTextEncoderLoader", {"text_encoder": gemma, "ckpt_name": checkpoint, "device": "default"}),
        "audio_vae": ("LTXVAudioVAELoader", {"ckpt_name": checkpoint}),
        **_texts(),
        "conditioning": (
            "LTXVConditioning",
            {"positive": ("positive", 0), "negative": ("negative", 0), "frame_rate": 24.0},
        ),
        "frames": ("EmptyLTXVLatentVideo", {"width": 768, "height": 512, "length": 121, "batch_size": 1}),
        "sound": (
            "LTXVEmptyLatentAudio",
            {"audio_vae": ("audio_vae", 0), "frames_number": 121, "frame_rate": 24, "batch_size": 1},
        ),
        "latent": ("LTXVConcatAVLatent", {"video_latent": ("frames", 0), "audio_latent": ("sound", 0)}),
        "heterostep": ("Heterostep", {"model": ("checkpoint", 0), **HETEROSTEP}),
        "guider": (
            "CFGGuider",
            {
                "model": ("heterostep", 0),
                "positive": ("conditioning", 0),
                "negative": ("conditioning", 1),
                "cfg": 4.0,
            },
        ),
        "noise": ("RandomNoise", {"noise_seed": 1}),
        "solver": ("KSamplerSelect", {"sampler_name": "euler"}),
        "sigmas": (
            "LTXVScheduler",
            {
                "latent": ("frames", 0),
                "steps": 40,
                "max_shift": 2.05,
                "base_shift": 0.95,
                "stretch": True,
                "terminal": 0.1,
            },
        ),
        "sampler": (
            "SamplerCustomAdvanced",
            {
                "noise": ("noise", 0),
                "guider": ("guider", 0),
                "sampler": ("solver", 0),
                "sigmas": ("sigmas", 0),
                "latent_image": ("latent", 0),
            },
        ),
        **_seen({"model": ("heterostep", 0)}, 24.0, ("sampler", 0)),
        "parts": ("LTXVSeparateAVLatent", {"av_latent": ("report", 0)}),
        "decoded": ("VAEDecode", {"samples": ("parts", 0), "vae": ("checkpoint", 2)}),
        "heard": ("LTXVAudioVAEDecode", {"samples": ("parts", 1), "audio_vae": ("audio_vae", 0)}),
        "video": ("CreateVideo", {"images": ("decoded", 0), "audio": ("heard", 0), "fps": 24.0}),
    }


WORKFLOWS = {"wan2.1_t2v.json": wan21, "wan2.2_a14b_t2v.json": wan22, "ltx2_t2v.json": ltx2}


def prompt(nodes: dict[str, Any]) -> dict[str, Any]:
    """A workflow as ComfyUI's server takes it."""
    ids = {name: str(number + 1) for number, name in enumerate(nodes)}
    return {
        ids[name]: {
            "class_type": kind,
            "inputs": {key: [ids[v[0]], v[1]] if isinstance(v, tuple) else v for key, v in inputs.items()},
        }
        for name, (kind, inputs) in nodes.items()
    }


def graph(nodes: dict[str, Any]) -> dict[str, Any]:
    """A workflow as ComfyUI's page opens it, laid out from left to right by what comes before what."""
    ids = {name: number + 1 for number, name in enumerate(nodes)}
    column: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in column:
            before = [value[0] for value in nodes[name][1].values() if isinstance(value, tuple)]
            column[name] = 1 + max(map(depth, before), default=-1)
        return column[name]

    links: list[list[Any]] = []
    drawn: dict[str, dict[str, Any]] = {}
    bottom: dict[int, int] = {}
    for order, name in enumerate(sorted(nodes, key=depth)):
        kind, inputs = nodes[name]
        slots, outputs = KINDS[kind]
        fields = [key for key, type_ in slots.items() if type_ is None]
        values: list[Any] = []
        for key in fields:
            values.append(inputs[key])
            if key in SEEDS:
                values.append("fixed")
        height = (
            70
            + 26 * max(len(values) + len(slots) - len(fields), len(outputs))
            + (120 if kind == "CLIPTextEncode" else 0)
        )
        height += 260 if kind.startswith("Preview") else 0
        top = bottom.get(depth(name), 0)
        bottom[depth(name)] = top + height + 60
        drawn[name] = {
            "id": ids[name],
            "type": kind,
            "pos": [depth(name) * 420, top],
            "size": [360, height],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": [{"name": key, "type": type_, "link": None} for key, type_ in slots.items() if type_ is not None],
            "outputs": [{"name": type_, "type": type_, "links": []} for type_ in outputs],
            "properties": {"Node name for S&R": kind},
            "widgets_values": values,
        }
    for name, (_, inputs) in nodes.items():
        for place, slot in enumerate(drawn[name]["inputs"]):
            if slot["name"] not in inputs:
                continue
            source, output = inputs[slot["name"]]
            slot["link"] = len(links) + 1
            drawn[source]["outputs"][output]["links"].append(slot["link"])
            links.append([slot["link"], ids[source], output, ids[name], place, slot["type"]])
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": list(drawn.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


if __name__ == "__main__":
    for file, workflow in WORKFLOWS.items():
        text = json.dumps(graph(workflow()), indent=2) + "\n"
        Path(__file__).with_name(file).write_text(text, encoding="utf-8")
