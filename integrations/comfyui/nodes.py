# SPDX-License-Identifier: GPL-3.0-or-later
"""The two nodes: Heterostep is put between a model and its sampler, Heterostep Report behind the sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from heterostep import policy as policies
from heterostep.config import KV_STORES, HSAConfig
from heterostep.errors import HeterostepError

from . import hooks

CATEGORY = "model/acceleration"


class Heterostep:
    """MODEL to MODEL: its sampler evaluates a share of the steps and extrapolates the others."""

    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The MODEL, for the sampler. The one that came in is left as it is.",)
    DESCRIPTION = (
        "Evaluates the transformer at a share of the sampler's steps, placed where the video changes, and extrapolates "
        "the others. For Wan 2.1 and 2.2, LTX-2 and other flow-matching video models."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        # A policy that wants an argument of its own is not one for a list.
        known = [name for name in policies.POLICIES if name != "round-robin"]
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A flow-matching video model, with its LoRA and shift already on."}),
                "share": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        "min": 0.05,
                        "max": 1.0,
                        "step": 0.05,
                        "round": 0.001,
                        "tooltip": "Share of this sampler's evaluations that are made. 1 is the model as it is.",
                    },
                ),
                "policy": (
                    known,
                    {"tooltip": "auto: whole steps, at equal change. hsa: single tokens as in the paper, Wan only."},
                ),
                "sparse_share": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.05,
                        "round": 0.001,
                        "tooltip": "For auto, Wan only: part of the evaluations that goes to single tokens. 0, as is "
                        "advised: whole steps alone. Above 0 the K and V of all tokens are kept: much memory.",
                    },
                ),
                "kv_store": (
                    list(KV_STORES),
                    {"tooltip": "Where single tokens' K and V are kept; auto takes the fastest that fits."},
                ),
                "verbose": ("BOOLEAN", {"default": False, "tooltip": "Log each step, and the report at the end."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def apply(
        self,
        model: Any,
        share: float,
        policy: str,
        sparse_share: float,
        kv_store: str,
        verbose: bool,
        unique_id: str | None = None,
    ) -> tuple[Any]:
        """The MODEL with the hooks of its runs.

        Raises:
            HeterostepError: options do not go together, or the model is no flow-matching one.
        """
        config = HSAConfig(share=share, policy=policy, sparse_share=sparse_share, kv_store=kv_store)
        policies.find(config.policy)
        hooks.refuse_other_models(model)
        return (hooks.Hooks(config, verbose, _teller(unique_id)).put_on(model),)


class HeterostepReport:
    """What a sampler behind a Heterostep node did. Takes the sampler's latents, so that it comes after it."""

    CATEGORY = CATEGORY
    FUNCTION = "tell"
    RETURN_TYPES = ("LATENT", "STRING", "IMAGE", "IMAGE")
    RETURN_NAMES = ("latent", "report", "plan", "steps_map")
    OUTPUT_TOOLTIPS = (
        "The latents as they came in.",
        "What was asked for and done; with a second model of both, one after the other.",
        "Which steps were evaluated, over the noise levels.",
        "How often each token was evaluated, an image for each frame of tokens; one colour with whole steps.",
    )
    DESCRIPTION = "Tells what Heterostep did in the sampler that these latents come from."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "latent": ("LATENT", {"tooltip": "What the sampler gave."}),
                "model": ("MODEL", {"tooltip": "The MODEL that the sampler was given, from Heterostep."}),
            },
            "optional": {
                "second_model": ("MODEL", {"tooltip": "Wan 2.2 A14B: the low-noise expert's, from its Heterostep."})
            },
        }

    def tell(self, latent: Any, model: Any, second_model: Any = None) -> tuple[Any, str, torch.Tensor, torch.Tensor]:
        """The latents and what is told.

        Raises:
            HeterostepError: a MODEL has no Heterostep, or has not been sampled.
        """
        accounts = [_account(each) for each in (model, second_model) if each is not None]
        text = "\n\n".join(each.text for each in accounts)
        plans = [each.plan() for each in accounts]
        return latent, text, _image(np.concatenate(plans)[None]), _image(accounts[-1].steps_map())


def _account(model: Any) -> Any:
    found = hooks.of(model)
    if found is None:
        raise HeterostepError("Heterostep Report wants the MODEL that comes out of Heterostep")
    if found.account is None:
        raise HeterostepError("nothing to report: connect the latents of the sampler that has this MODEL")
    return found.account


def _image(pixels: np.ndarray) -> torch.Tensor:
    """ComfyUI's IMAGE: float 0..1, [images, height, width, 3]."""
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def _teller(node: str | None) -> Any:
    """Shows a line of text on the node while the sampler runs; None where there is no such thing."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    server = getattr(PromptServer, "instance", None)
    if node is None or not hasattr(server, "send_progress_text"):
        return None
    return lambda line: server.send_progress_text(line, node)
