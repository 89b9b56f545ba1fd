# SPDX-License-Identifier: GPL-3.0-or-later
"""ComfyUI's hooks on a MODEL, and what each run needs of them.

Three wrappers of ComfyUI (`comfy/patcher_extension.py`, WrappersMP) see all that is wanted; no forward is copied:

    OUTER_SAMPLE      a sampler begins and ends: the run's state is made, and goes again whatever happens
    PREDICT_NOISE     a sampler asks for the guided prediction: a step begins, its guided velocity is known
    DIFFUSION_MODEL   the transformer is called: it is let through, or its velocities are extrapolated

They keep nothing themselves. A run is an object in the `transformer_options` that ComfyUI copies for each sampling, so
two samplers, or two MODELs that were cloned from one, never see each other's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from heterostep.config import HSAConfig
from heterostep.errors import HeterostepError

from .account import Account
from .run import Run

KEY = "heterostep"
# The values of WrappersMP.
OUTER_SAMPLE, PREDICT_NOISE, DIFFUSION_MODEL = "outer_sample", "predict_noise", "diffusion_model"
_ARGUMENTS = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback")
# Others that skip steps, by what they leave in the options of a MODEL.
OTHER_CACHES = ("easycache", "lazycache", "teacache", "magcache", "fbcache", "wavespeed", "cache_dit")

_log = logging.getLogger("heterostep")


class Hooks:
    """What one Heterostep node puts on a MODEL. Of a run that has ended it keeps the account, and nothing else.

    Args:
        config: the options.
        verbose: whether each step is logged.
        tell: called with a short line of text at each step.
    """

    def __init__(self, config: HSAConfig, verbose: bool = False, tell: Callable[[str], Any] | None = None) -> None:
        self.config, self.verbose, self._tell = config, verbose, tell
        self.account: Account | None = None

    def put_on(self, model: Any) -> Any:
        """A clone of the MODEL with these hooks; in place of another Heterostep's, if it has them."""
        model = model.clone()
        for kind, wrapper in (
            (OUTER_SAMPLE, self.outer_sample),
            (PREDICT_NOISE, predict_noise),
            (DIFFUSION_MODEL, diffusion_model),
        ):
            model.remove_wrappers_with_key(kind, KEY)
            model.add_wrapper_with_key(kind, KEY, wrapper)
        return model

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands around one sampling."""
        given = {**dict(zip(_ARGUMENTS, args)), **kwargs}
        guider, sigmas = executor.class_obj, given["sigmas"].tolist()
        if len(sigmas) < 2:
            return executor(*args, **kwargs)
        options = guider.model_options.setdefault("transformer_options", {})
        refuse_other_caches(options)
        refuse_other_models(guider.model_patcher)
        run = Run(
            self.config,
            sigmas=sigmas,
            model=guider.model_patcher.model,
            sampler=given["sampler"],
            latents=given.get("latent_shapes") or [given["noise"].shape],
            mask=given.get("denoise_mask"),
            from_frames=has_given_frames(guider, given.get("denoise_mask")),
            tell=self._say,
        )
        callback = given.get("callback")
        if callback is not None:
            place = _ARGUMENTS.index("callback")
            if len(args) > place:
                args = (*args[:place], run.shows(callback), *args[place + 1 :])
            else:
                kwargs["callback"] = run.shows(callback)
        options[KEY] = run
        try:
            output = executor(*args, **kwargs)
            run.finish()
            return output
        finally:
            options.pop(KEY, None)
            self.account = run.close()
            if self.account is not None and self.verbose:
                _log.info("%s", self.account.text)

    def _say(self, line: str) -> None:
        if self.verbose:
            _log.info("%s", line)
        if self._tell is not None:
            self._tell(line)


def of(model: Any) -> Hooks | None:
    """The hooks that a Heterostep node has put on this MODEL, or on the one that it was cloned from; or None."""
    found = model.get_wrappers(OUTER_SAMPLE, KEY)
    return getattr(found[-1], "__self__", None) if found else None


def predict_noise(executor: Any, x: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands around one guided prediction: all conditionings, and what guidance makes of them."""
    run = executor.class_obj.model_options.get("transformer_options", {}).get(KEY)
    if run is None:
        return executor(x, timestep, *args, **kwargs)
    return run.predict(lambda: executor(x, timestep, *args, **kwargs), x, timestep)


def diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands around one call of the transformer."""
    # Where it stands among the arguments, differs from model to model.
    options = next((each for each in (*kwargs.values(), *args) if isinstance(each, dict) and KEY in each), None)
    if options is None:
        return executor(*args, **kwargs)
    return options[KEY].call(executor, args, kwargs, options)


def has_given_frames(guider: Any, mask: Any) -> bool:
    """Whether the video continues frames: by a mask, or beside the noisy latents as image-to-video models read them."""
    conds = getattr(guider, "conds", {}).values()
    beside = any(cond.get("concat_latent_image") is not None for each in conds for cond in each or ())
    return beside or (mask is not None and bool((mask == 0).any()))


def refuse_other_caches(options: dict[str, Any]) -> None:
    """Two that skip steps would skip at once.

    Raises:
        HeterostepError: another one is on the same MODEL.
    """
    wrappers = [key for keyed in options.get("wrappers", {}).values() for key in keyed]
    names = [str(each).lower() for each in (*options, *wrappers)]
    found = next((cache for cache in OTHER_CACHES if any(cache in name for name in names)), None)
    if found is not None:
        raise HeterostepError(f"{found} skips steps on this MODEL too: take it or Heterostep off")


def refuse_other_models(model: Any) -> None:
    """Velocities are what is extrapolated, so the model must predict them.

    Raises:
        HeterostepError: it is no flow-matching model.
    """
    sampling = model.get_model_object("model_sampling")
    if "CONST" not in (each.__name__ for each in type(sampling).__mro__):
        kind = type(model.model).__name__
        raise HeterostepError(f"{kind} is no flow-matching model: Heterostep is for Wan, LTX-2 and their kin")
