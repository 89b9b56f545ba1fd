"""A double of what ComfyUI's sampling does around a model, with small Wan and LTX-2 models in its interface.

Written from ComfyUI's documented behaviour: wrappers by kind and key, MODELs that are cloned, a guider that puts
conditionings into one call where they fit, samplers and their callback, blocks that may be replaced and an attention
that may be overridden. The models have diffusers' weights, so that results can be compared with its pipelines'.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NODE = Path(__file__).parents[1] / "integrations" / "comfyui"


def node_package() -> Any:
    """The custom node, loaded as ComfyUI loads it: a folder by its path."""
    name = "comfyui_heterostep"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, NODE / "__init__.py", submodule_search_locations=[str(NODE)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


# What ComfyUI calls around


class WrapperExecutor:
    """Calls the wrappers one inside the other, then the original."""

    def __init__(self, original: Callable, class_obj: Any, wrappers: list[Callable]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](WrapperExecutor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)

    __call__ = execute


def wrapped(original: Callable, owner: Any, kind: str, transformer_options: dict[str, Any]) -> WrapperExecutor:
    keyed = transformer_options.get("wrappers", {}).get(kind, {})
    return WrapperExecutor(original, owner, [each for wrappers in keyed.values() for each in wrappers])


def copied(nested: dict[str, Any]) -> dict[str, Any]:
    """Dicts and lists anew, all else as it is."""
    kinds = {dict: copied, list: list}
    return {key: kinds[type(value)](value) if type(value) in kinds else value for key, value in nested.items()}


class ModelPatcher:
    """A MODEL."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable]]] = {}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.model_options, other.wrappers = copied(self.model_options), copied(self.wrappers)
        return other

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind: str, key: str) -> list[Callable]:
        return self.wrappers.get(kind, {}).get(key, [])


class CONST:
    """Flow matching."""


class ModelSampling(CONST):
    multiplier = 1000


class EPS:
    """Not flow matching."""


class BaseModel:
    """Around the transformer: noise levels to timesteps, velocities to predictions; several latents packed in one."""

    def __init__(self, diffusion_model: torch.nn.Module) -> None:
        self.diffusion_model, self.model_sampling = diffusion_model, ModelSampling()
        self.together = 2  # conditionings that fit into one call

    def apply_model(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, options: dict, shapes: list, mask: Any = None
    ) -> torch.Tensor:
        given, times = x if len(shapes) == 1 else unpack(x, shapes), self.process_timestep(t * 1000, mask)
        output = self.diffusion_model(given, times, context=context, transformer_options=options)
        velocity = pack(output) if isinstance(output, list) else output
        return x - velocity.float() * t.view(-1, *[1] * (x.ndim - 1))

    def process_timestep(self, timestep: torch.Tensor, mask: Any) -> torch.Tensor:
        return timestep


class WAN21(BaseModel):
    pass


class WAN22(BaseModel):
    """The 5B: each frame has its own noise level, 0 where it is given."""

    def process_timestep(self, timestep: torch.Tensor, mask: Any) -> torch.Tensor:
        return timestep if mask is None else timestep[:, None] * mask[:1, 0, :, 0, 0]


class LTXAV(BaseModel):
    pass


def pack(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.reshape(each.shape[0], 1, -1) for each in tensors], -1)


def unpack(x: torch.Tensor, shapes: list) -> list[torch.Tensor]:
    sizes = [torch.Size(shape[1:]).numel() for shape in shapes]
    return [each.reshape(x.shape[0], *shape[1:]) for each, shape in zip(x.split(sizes, -1), shapes)]


class CFGGuider:
    """Positive and negative conditioning, each a list of (text states, options)."""

    def __init__(self, model: ModelPatcher, positive: list, negative: list, cfg: float) -> None:
        self.model_patcher, self.model_options, self.cfg = model, model.model_options, cfg
        self.conds = {
            name: [{"context": c, "uuid": uuid.uuid4(), **o} for c, o in conds]
            for name, conds in (("positive", positive), ("negative", negative))
        }

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options: dict, seed: int | None = None) -> Any:
        executor = wrapped(self.predict_noise, self, "predict_noise", self.model_options["transformer_options"])
        return executor.execute(x, sigma, model_options, seed)

    def predict_noise(self, x: torch.Tensor, sigma: torch.Tensor, model_options: dict, seed: int | None = None) -> Any:
        conds = [self.conds["positive"], self.conds["negative"] if self.cfg != 1 else []]
        positive, negative = self.calc_cond_batch(conds, x, sigma, model_options)
        return positive if self.cfg == 1 else negative + (positive - negative) * self.cfg

    def calc_cond_batch(self, conds: list, x: torch.Tensor, sigma: torch.Tensor, model_options: dict) -> list:
        level, model = float(sigma[0]), self.model_patcher.model
        run = [
            (c, i) for i, each in enumerate(conds) for c in each if c.get("end", 0.0) <= level <= c.get("start", 9.0)
        ]
        sums, counts = [torch.zeros_like(x), torch.zeros_like(x)], [0, 0]
        together = model.together() if callable(model.together) else model.together
        for first in range(0, len(run), together):
            # As ComfyUI does, the last comes first.
            batch = run[first : first + together][::-1]
            options = copied(model_options["transformer_options"])
            options["cond_or_uncond"] = [i for _, i in batch]
            options["uuids"] = [c["uuid"] for c, _ in batch]
            options["sigmas"] = sigma
            context = torch.cat([c["context"].expand(x.shape[0], -1, -1) for c, _ in batch])
            copies = [x] * len(batch), [sigma] * len(batch)
            xs, sigmas = (torch.cat(each) for each in copies)
            output = model.apply_model(xs, sigmas, context, options, self.shapes, self.mask)
            for (_, i), each in zip(batch, output.chunk(len(batch))):
                sums[i] = sums[i] + each
                counts[i] += 1
        return [total / max(count, 1) for total, count in zip(sums, counts)]

    def outer_sample(
        self, noise, latent, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None, **more
    ):
        options = copied(self.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas
        return sampler.sample(
            self, sigmas, {"model_options": options, "seed": seed}, callback, noise, latent, denoise_mask
        )

    def sample(self, noise: Any, sampler: Sampler, sigmas: torch.Tensor, mask: Any = None, callback: Any = None) -> Any:
        """Latents from noise, a tensor or a list of several."""
        self.shapes = [each.shape for each in (noise if isinstance(noise, list) else [noise])]
        packed = pack(noise) if isinstance(noise, list) else noise
        mask = pack(mask) if isinstance(mask, list) else mask
        before, self.mask = self.model_options, mask
        self.model_options = copied(before)
        self.model_options["transformer_options"]["wrappers"] = copied(self.model_patcher.wrappers)
        try:
            executor = wrapped(self.outer_sample, self, "outer_sample", self.model_options["transformer_options"])
            output = executor.execute(
                packed, torch.zeros_like(packed), sampler, sigmas, mask, callback, True, 0, latent_shapes=self.shapes
            )
        finally:
            self.model_options = before
        return unpack(output, self.shapes) if isinstance(noise, list) else output


class Sampler:
    """ComfyUI's KSAMPLER: noise to latents by a function, with given latents where the mask is 0."""

    def __init__(self, sampler_function: Callable, **extra_options: Any) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options

    def sample(self, guider, sigmas, extra_args, callback, noise, latent, mask=None):
        def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            if mask is not None:
                x = x * mask + latent * (1 - mask)
            level = sigma * x.new_ones(x.shape[0])
            denoised = guider(x, level, extra_args["model_options"], seed=extra_args["seed"])
            return denoised if mask is None else denoised * mask + latent * (1 - mask)

        x = sigmas[0] * noise + (1 - sigmas[0]) * latent
        total = len(sigmas) - 1

        def told(step: int, denoised: torch.Tensor, x: torch.Tensor) -> None:
            if callback is not None:
                callback(step, denoised, x, total)

        return self.sampler_function(model, x, sigmas, told, **self.extra_options) / (1 - sigmas[-1])


def sample_euler(model, x, sigmas, told, s_churn=0.0):
    for step in range(len(sigmas) - 1):
        sigma = sigmas[step] * (1 + s_churn)
        denoised = model(x, sigma)
        told(step, denoised, x)
        x = x + (x - denoised) / sigma * (sigmas[step + 1] - sigma)
    return x


def sample_heun(model, x, sigmas, told):
    for step in range(len(sigmas) - 1):
        denoised = model(x, sigmas[step])
        told(step, denoised, x)
        slope, width = (x - denoised) / sigmas[step], sigmas[step + 1] - sigmas[step]
        if sigmas[step + 1] > 0:
            ahead = x + slope * width
            slope = (slope + (ahead - model(ahead, sigmas[step + 1])) / sigmas[step + 1]) / 2
        x = x + slope * width
    return x


def sample_res_2s(model, x, sigmas, told):
    """Two predictions a step, the second between two noise levels."""
    for step in range(len(sigmas) - 1):
        denoised = model(x, sigmas[step])
        told(step, denoised, x)
        middle, width = (sigmas[step] + sigmas[step + 1]) / 2, sigmas[step + 1] - sigmas[step]
        half = x + (x - denoised) / sigmas[step] * (middle - sigmas[step])
        x = x + (half - model(half, middle)) / middle * width
    return x


def sample_dpmpp_2m(model, x, sigmas, told):
    """A multistep solver: it remembers its last prediction."""
    before = None
    for step in range(len(sigmas) - 1):
        denoised = model(x, sigmas[step])
        told(step, denoised, x)
        better = denoised if before is None or sigmas[step + 1] == 0 else 1.5 * denoised - 0.5 * before
        x = x + (x - better) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
        before = denoised
    return x


def sample_restart(model, x, sigmas, told):
    """Goes back to more noise half-way, as the schedule does not say."""
    for step in range(len(sigmas) - 1):
        for level in (sigmas[step], sigmas[step] * 1.5) if step == len(sigmas) // 2 else (sigmas[step],):
            denoised = model(x, level)
        told(step, denoised, x)
        x = x + (x - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
    return x


SAMPLERS = {each.__name__[7:]: each for each in (sample_euler, sample_heun, sample_res_2s, sample_dpmpp_2m)}


def shifted_sigmas(steps: int, shift: float = 5.0) -> torch.Tensor:
    """ComfyUI's schedule "simple" of a flow with a shift."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


# Models


def attention(q, k, v, heads, mask=None, skip_reshape=False, **named):
    """ComfyUI's optimized attention, [b, n, H * D], or [b, H, n, D] with `skip_reshape`; returns [b, n, H * D]."""
    if not skip_reshape:
        q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def optimized_attention(*args: Any, **named: Any) -> torch.Tensor:
    override = named["transformer_options"].get("optimized_attention_override")
    if override is None or "_inside_attn_wrapper" in named:
        return attention(*args, **named)
    return override(attention, *args, **named, _inside_attn_wrapper=True)


class Attention:
    """diffusers' attention of Wan, through ComfyUI's."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(states))
        if rotary_emb is not None:
            query, key = (_rotated(each, rotary_emb, attn.heads) for each in (query, key))
        out = optimized_attention(query, key, attn.to_v(states), heads=attn.heads, transformer_options=self.options)
        return attn.to_out[1](attn.to_out[0](out))


def _rotated(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], heads: int) -> torch.Tensor:
    x = x.unflatten(2, (heads, -1))
    cos, sin = tables[0][..., 0::2], tables[1][..., 1::2]
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(3).flatten(2)


class WanModel(torch.nn.Module):
    """Wan in ComfyUI's interface, of a diffusers' transformer's weights."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.inner = copy.deepcopy(transformer)
        self.patch_size, self.num_heads = transformer.config.patch_size, transformer.config.num_attention_heads
        self.dim = self.num_heads * transformer.config.attention_head_dim
        self.blocks = self.inner.blocks
        self.attention = Attention()
        for block in self.blocks:
            block.attn1.set_processor(self.attention)
            block.attn2.set_processor(self.attention)
        self.calls = 0
        self.rows: list[int] = []  # tokens that each block was given

    def forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, **kwargs):
        executor = wrapped(self._forward, self, "diffusion_model", transformer_options)
        return executor.execute(x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs)

    def _forward(self, x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs):
        self.calls += 1
        self.attention.options = transformer_options
        frames, height, width = x.shape[2:]
        x = torch.nn.functional.pad(x, (0, -width % 2, 0, -height % 2, 0, 0), mode="replicate")
        pe = torch.stack(self.inner.rope(x), -1)
        img = self.inner.patch_embedding(x)
        grid = img.shape[2:]
        img = img.flatten(2).transpose(1, 2)
        per_frame = timestep.ndim == 2
        temb, vec, txt, _ = self.inner.condition_embedder(timestep.flatten(), context, None)
        temb, vec = (each.view(x.shape[0], -1, each.shape[-1]) for each in (temb, vec))
        vec = vec.unflatten(2, (6, -1))
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.blocks):

            def original(args: dict, block: Any = block) -> dict:
                self.rows.append(args["img"].shape[1])
                own = args["vec"]
                if own.shape[1] > 1:
                    own = own.repeat_interleave(args["img"].shape[1] // own.shape[1], 1)
                own = own[:, 0] if own.shape[1] == 1 else own
                return {"img": block(args["img"], args["txt"], own, args["pe"].unbind(-1))}

            args = {"img": img, "txt": txt, "vec": vec, "pe": pe, "transformer_options": transformer_options}
            if ("double_block", i) in replaced:
                img = replaced["double_block", i](args, {"original_block": original})["img"]
            else:
                img = original(args)["img"]
        each = img.shape[1] // temb.shape[1] if per_frame else 1
        shift, scale = (self.inner.scale_shift_table[None] + temb.repeat_interleave(each, 1)[:, :, None]).unbind(2)
        img = self.inner.proj_out(self.inner.norm_out(img.float()) * (1 + scale) + shift)
        patches = img.unflatten(2, (*self.patch_size, -1)).unflatten(1, grid)
        video = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return video[:, :, :frames, :height, :width]


class LTXAVModel(torch.nn.Module):
    """LTX-2 in ComfyUI's interface: a list of video and sound in, the same out."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.inner = copy.deepcopy(transformer)
        self.calls = 0

    def forward(
        self,
        x,
        timestep,
        context,
        attention_mask=None,
        frame_rate=24,
        transformer_options=None,
        keyframe_idxs=None,
        **kwargs,
    ):
        executor = wrapped(self._forward, self, "diffusion_model", transformer_options)
        return executor.execute(
            x, timestep, context, attention_mask, frame_rate, transformer_options, keyframe_idxs, **kwargs
        )

    def _forward(self, x, timestep, context, attention_mask, frame_rate, transformer_options, keyframe_idxs, **kwargs):
        self.calls += 1
        video, sound = x
        texts = context.chunk(2, -1)
        out = self.inner(
            video.flatten(2).transpose(1, 2),
            sound.transpose(1, 2).flatten(2),
            *texts,
            timestep=timestep[:, None],
            sigma=timestep,
            num_frames=video.shape[2],
            height=video.shape[3],
            width=video.shape[4],
            fps=frame_rate,
            audio_num_frames=sound.shape[2],
            return_dict=False,
        )
        heard = out[1].unflatten(2, (sound.shape[1], sound.shape[3])).transpose(1, 2)
        return [out[0].transpose(1, 2).unflatten(2, video.shape[2:]), heard]
