"""Heterostep's nodes in a real ComfyUI, on the CPU, with small random weights: `python comfyui_real.py CHECKOUT`.

Prints one JSON object. `test_comfyui.py` runs it where COMFYUI_PATH names a checkout.
"""

from __future__ import annotations

import asyncio
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
NODE = TESTS.parent / "integrations" / "comfyui"
STEPS = 12


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that ComfyUI imports for models which are not run here, where they are not installed."""

    def __init__(self, *names: str) -> None:
        self.names = [name for name in names if importlib.util.find_spec(name) is None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def start(checkout: str) -> None:
    """Import ComfyUI for the CPU, and load the nodes as it loads a folder of custom_nodes."""
    # diffusers looks for what stands in below, so it comes first.
    import small_wan  # noqa: F401

    sys.argv = [sys.argv[0]]
    sys.path.insert(0, checkout)
    sys.meta_path.append(Absent("torchvision", "torchaudio"))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import nodes

    assert asyncio.run(nodes.load_custom_node(str(NODE)))


def patcher(base: Any) -> Any:
    import comfy.model_patcher
    import torch

    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base.eval(), load_device=cpu, offload_device=cpu)


# From diffusers' names to those of the original checkpoints, which ComfyUI reads.
NAMES = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "proj_out": "head.head",
}


def wan(transformer: Any, dtype: Any = None) -> Any:
    """ComfyUI's Wan with a diffusers' transformer's weights."""
    import comfy.supported_models
    import torch

    config = transformer.config
    options = dict(
        image_model="wan2.1",
        model_type="t2v",
        dim=config.num_attention_heads * config.attention_head_dim,
        num_heads=config.num_attention_heads,
        num_layers=config.num_layers,
        ffn_dim=config.ffn_dim,
        freq_dim=config.freq_dim,
        text_dim=config.text_dim,
        in_dim=config.in_channels,
        out_dim=config.out_channels,
    )
    kind = comfy.supported_models.WAN21_T2V(options)
    kind.set_inference_dtype(dtype or torch.float32, torch.float32 if dtype else None)
    base = kind.get_model({})
    weights = {}
    for name, value in transformer.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if name.endswith("scale_shift_table"):
            name = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        weights[name] = value
    base.diffusion_model.load_state_dict(weights)
    return patcher(base)


def ltx2() -> Any:
    """ComfyUI's LTX-2 of random weights, video and sound."""
    import comfy.supported_models
    import torch

    options = dict(
        image_model="ltxav",
        in_channels=128,
        audio_in_channels=128,
        cross_attention_dim=32,
        audio_cross_attention_dim=16,
        attention_head_dim=16,
        audio_attention_head_dim=8,
        num_attention_heads=2,
        audio_num_attention_heads=2,
        caption_channels=24,
        num_layers=2,
        connector_attention_head_dim=8,
        connector_num_attention_heads=3,
        connector_num_layers=1,
    )
    kind = comfy.supported_models.LTXAV(options)
    kind.set_inference_dtype(torch.float32, None)
    base = kind.get_model({})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.diffusion_model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return patcher(base)


class Real:
    """ComfyUI's own nodes, called as its executor calls them."""

    def __init__(self) -> None:
        import nodes

        self.classes = nodes.NODE_CLASS_MAPPINGS
        self.calls = 0

    def heterostep(self, model: Any, share: float = 0.5, **options: Any) -> Any:
        given = dict(policy="auto", sparse_share=0.0, kv_store="auto", verbose=False) | options
        return self.classes["Heterostep"]().apply(model, share=share, **given)[0]

    def report(self, model: Any, second: Any = None) -> tuple:
        return self.classes["HeterostepReport"]().tell({}, model, second)

    def sample(
        self, model: Any, conds: Any, latent: Any, sampler: str = "euler", scheduler: str = "simple", **options: Any
    ):
        given = dict(steps=STEPS, cfg=3.0, seed=0) | options
        return self.classes["KSampler"]().sample(
            model, given["seed"], given["steps"], given["cfg"], sampler, scheduler, *conds, latent
        )[0]["samples"]


def away(a: Any, b: Any) -> float:
    """The largest difference over the largest value."""
    if getattr(a, "is_nested", False):
        return max(away(x, y) for x, y in zip(a.unbind(), b.unbind()))
    return float((a - b).abs().max() / b.abs().max())


def count_calls(real: Real, model: Any) -> None:
    model.model.diffusion_model.register_forward_hook(lambda *args: None)
    inner = model.model.diffusion_model._forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        real.calls += 1
        return inner(*args, **kwargs)

    model.model.diffusion_model._forward = counted


def beside_diffusers(real: Real, pipe: Any, model: Any, texts: list, noise: Any) -> dict[str, float]:
    """How far ComfyUI's latents are from diffusers' of the same weights, noise and noise levels."""
    import comfy.samplers
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    import heterostep

    sampler = comfy.samplers.sampler_object("euler")

    def both(**options: Any) -> float:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
        given = dict(prompt_embeds=texts[0], negative_prompt_embeds=texts[1], height=64, width=64, num_frames=9)
        heterostep.disable(pipe)
        if options:
            heterostep.enable(pipe, **options)
        theirs = pipe(
            **given, latents=noise.clone(), num_inference_steps=STEPS, guidance_scale=3.0, output_type="latent"
        ).frames
        heterostep.disable(pipe)
        made = real.heterostep(model, **options) if options else model
        conds = [[[text, {}]] for text in texts]
        ours = comfy.samplers.sample(
            made, noise.clone(), *conds, 3.0, noise.device, sampler, pipe.scheduler.sigmas.clone(),
            latent_image=torch.zeros_like(noise), disable_pbar=True,
        )  # fmt: skip
        # diffusers' are as the autoencoder takes them.
        return away(model.model.process_latent_in(ours), theirs)

    return {
        "dense": both(),
        "half": both(share=0.5),
        "quarter": both(share=0.25),
        "tokens": both(share=0.5, sparse_share=0.5),
        "hsa": both(share=0.4, policy="hsa"),
    }


def of_samplers(real: Real, model: Any, conds: Any, latent: Any, names: list[tuple[str, str]]) -> dict[str, Any]:
    """Each sampler and schedule: exact at share 1, and what half of the steps is."""

    found = {}
    for name, scheduler in names:
        plain = real.sample(model, conds, latent, name, scheduler)
        real.calls = 0
        same = real.sample(real.heterostep(model, 1.0), conds, latent, name, scheduler)
        calls, real.calls = real.calls, 0
        half = real.heterostep(model)
        made = real.sample(half, conds, latent, name, scheduler)
        found[f"{name} {scheduler}"] = {
            "exact": away(plain, same) == 0,
            "finite": all(bool(each.isfinite().all()) for each in (made.unbind() if made.is_nested else [made])),
            "calls": calls,
            "calls at half": real.calls,
            "report": real.report(half)[1],
        }
    return found


def experts(real: Real, models: list[Any], conds: Any, latent: Any, share: float | None) -> tuple[Any, list[Any]]:
    """Wan 2.2 A14B: two MODELs in two KSamplerAdvanced, each with a part of the steps."""
    made = models if share is None else [real.heterostep(model, share) for model in models]
    node = real.classes["KSamplerAdvanced"]()
    (latent,) = node.sample(
        made[0], "enable", 0, STEPS, 3.0, "euler", "simple", *conds, latent, 0, STEPS // 2, "enable"
    )
    (latent,) = node.sample(
        made[1], "disable", 0, STEPS, 3.0, "euler", "simple", *conds, latent, STEPS // 2, 10000, "disable"
    )
    return latent["samples"], made


def stopped(real: Real, model: Any, conds: Any, latent: Any) -> dict[str, Any]:
    """Cancelled in the middle: nothing is left, and the next run is as if it had not been."""
    import comfy.model_management

    made = real.heterostep(model)
    once = real.sample(made, conds, latent)
    transformer, calls = model.model.diffusion_model, []

    def cancel(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            comfy.model_management.interrupt_current_processing(True)
            comfy.model_management.throw_exception_if_processing_interrupted()

    hook = transformer.blocks[0].register_forward_hook(cancel)
    try:
        real.sample(made, conds, latent)
        cancelled = False
    except comfy.model_management.InterruptProcessingException:
        cancelled = True
    hook.remove()
    left = "heterostep" in made.model_options["transformer_options"]
    text = real.report(made)[1]
    return {"cancelled": cancelled, "left": left, "report": text, "again": away(real.sample(made, conds, latent), once)}


def with_sound(real: Real) -> dict[str, Any]:
    """LTX-2: video and sound."""
    import comfy.nested_tensor
    import torch

    model = ltx2()
    count_calls(real, model)
    generator = torch.Generator().manual_seed(1)
    conds = [[[torch.randn(1, 16, 48, generator=generator), {"frame_rate": 24.0}]] for _ in range(2)]
    latent = {"samples": comfy.nested_tensor.NestedTensor([torch.zeros(1, 128, 3, 4, 4), torch.zeros(1, 8, 18, 16)])}
    found = of_samplers(real, model, conds, latent, [("euler", "simple"), ("dpmpp_2m", "beta")])
    made = real.sample(real.heterostep(model), conds, latent)
    found["shapes"] = [list(each.shape) for each in made.unbind()]
    try:
        real.sample(real.heterostep(model, sparse_share=0.5), conds, latent)
        found["tokens"] = "ran"
    except ValueError as error:
        found["tokens"] = str(error)
    return found


def in_parts(real: Real, model: Any, conds: Any) -> dict[str, Any]:
    """Windows of the frames, at rest and moving from step to step; a prompt for a part of the frame; a given frame."""
    import comfy.context_windows as windows
    import torch
    from comfy.model_base import WAN22

    found, long = {}, {"samples": torch.zeros(1, 16, 13, 8, 8)}
    for schedule in ("standard_static", "standard_uniform"):
        own = model.clone()
        own.model_options["context_handler"] = windows.IndexListContextHandler(
            context_schedule=windows.get_matching_context_schedule(schedule),
            fuse_method=windows.get_matching_fuse_method("pyramid"),
            context_length=5,
            context_overlap=2,
            context_stride=1,
            closed_loop=False,
            dim=2,
        )
        windows.create_prepare_sampling_wrapper(own)
        found |= {schedule: of_samplers(real, own, conds, long, [("euler", "simple")])["euler simple"]}
    latent = {"samples": torch.zeros(1, 16, 3, 8, 8)}
    part = [conds[0][0][0], {"area": (2, 4, 4, 0, 0, 0), "strength": 1.0, "set_area_to_bounds": False}]
    found["area"] = of_samplers(real, model, [[part, conds[1][0]], conds[1]], latent, [("euler", "simple")])[
        "euler simple"
    ]
    mask = torch.ones(1, 1, 3, 8, 8)
    mask[:, :, 0] = 0
    given = {"samples": torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(2)), "noise_mask": mask}
    kind, model.model.__class__ = model.model.__class__, WAN22
    try:
        found["given frame"] = of_samplers(real, model, conds, given, [("euler", "simple")])["euler simple"]
    finally:
        model.model.__class__ = kind
    return found


def run(checkout: str, samplers: list[tuple[str, str]]) -> dict[str, Any]:
    start(checkout)
    import comfyui_version
    import torch

    from small_wan import small_wan

    found: dict[str, Any] = {"comfyui": comfyui_version.__version__}
    real = Real()
    pipe = small_wan("wan2.1-t2v")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(1, 512, 32, generator=generator) for _ in range(2)]
    noise = torch.randn(1, 16, 3, 8, 8, generator=generator)
    conds, latent = [[[text, {}]] for text in texts], {"samples": torch.zeros(1, 16, 3, 8, 8)}
    with torch.inference_mode():
        model = wan(pipe.transformer)
        count_calls(real, model)
        found["diffusers"] = beside_diffusers(real, pipe, model, texts, noise)
        found["samplers"] = of_samplers(real, model, conds, latent, samplers)
        found["stopped"] = stopped(real, model, conds, latent)
        found["parts"] = in_parts(real, model, conds)

        # A LoRA is a patch of weights.
        key = "diffusion_model.blocks.0.ffn.0.weight"
        patch = {key: ("diff", (torch.randn(64, 48, generator=generator),))}
        for name, order in (("lora before", 0), ("lora behind", 1)):
            own, other = model.clone(), real.heterostep(model, 1.0)
            patched = real.heterostep(own, 1.0) if order == 0 else other.clone()
            own.add_patches(patch)
            if order == 0:
                patched = real.heterostep(own, 1.0)
            else:
                patched.add_patches(patch)
            plain = real.sample(own, conds, latent)
            found[name] = {
                "exact": away(real.sample(patched, conds, latent), plain) == 0,
                "changes": away(plain, real.sample(model, conds, latent)) > 0,
            }
        # Weights in fp8, cast as they are used.
        small = wan(pipe.transformer, torch.float8_e4m3fn)
        count_calls(real, small)
        found["fp8"] = of_samplers(real, small, conds, latent, [("euler", "simple")])

        from comfy_extras.nodes_model_advanced import ModelSamplingSD3

        pair = [
            ModelSamplingSD3().patch(each, 8.0)[0] for each in (model, wan(small_wan("wan2.1-t2v", seed=1).transformer))
        ]
        count_calls(real, pair[1])
        plain, _ = experts(real, pair, conds, latent, None)
        same, _ = experts(real, pair, conds, latent, 1.0)
        real.calls = 0
        _, made = experts(real, pair, conds, latent, 0.5)
        found["experts"] = {
            "exact": away(same, plain) == 0, "calls at half": real.calls, "report": real.report(*made)[1]
        }  # fmt: skip
        try:
            import comfy.ldm.lightricks.av_model  # noqa: F401
        except ImportError:
            found["ltx2"] = None
        else:
            found["ltx2"] = with_sound(real)
    return found


FEW = [("euler", "simple"), ("euler", "beta"), ("uni_pc", "simple"), ("dpmpp_sde", "simple"), ("heunpp2", "simple")]
ALL = [
    "euler", "uni_pc", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "heun", "res_multistep", "er_sde", "lcm", "ddim",
    "deis", "euler_ancestral", "euler_cfg_pp", "dpmpp_2s_ancestral", "ipndm", "dpm_2", "sa_solver", "seeds_2",
    "gradient_estimation", "heunpp2", "dpm_fast",
]  # fmt: skip

if __name__ == "__main__":
    chosen = [(name, schedule) for name in ALL for schedule in ("simple", "beta")] if "--all" in sys.argv else FEW
    print(json.dumps(run(sys.argv[1], chosen), indent=1))
