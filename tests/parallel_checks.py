"""What two ranks do in `test_parallel`, each a function that both call; see `ranks`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import context_parallel

import heterostep
from heterostep import HeterostepError, compat, parallel
from heterostep.engine import cuda_graphs, ranking
from heterostep.models import FAMILIES
from ranks import DEVICE
from rows import ROWS, transformers

STEPS = 12
GPU = torch.device("cuda")


def _build(name: str) -> Any:
    return ROWS[name].build().to(DEVICE)


@functools.cache
def _pair(name: str) -> tuple[Any, Any]:
    """The same pipeline twice: for one process, and spread over both."""
    one, two = _build(name), _build(name)
    for model, other in zip(transformers(one), transformers(two)):
        other.load_state_dict(model.state_dict())
        parallel.enable_context_parallel(other, 2, FAMILIES[type(other).__name__].adapter.cp_plan(other))
    return one, two


def _error(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> float:
    """The largest difference of two results, in standard deviations; infinite where one is not a number."""
    if not all(x.isfinite().all() for x in (*a, *b)):
        return float("inf")
    return max(float((x - y).abs().max() / x.std()) for x, y in zip(a, b, strict=True))


def _run(name: str, pipe: Any, **options: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
    with heterostep.enabled(pipe, **options):
        return ROWS[name].run(pipe, steps=STEPS), heterostep.report(pipe)


def _beside(name: str, **options: Any) -> dict[str, Any]:
    """A run of both processes beside one of each alone."""
    one, two = _pair(name)
    (alone, known), (shared, report) = (_run(name, pipe, **options) for pipe in (one, two))
    memory = [x.memory.kv_cache_bytes + x.memory.kv_host_bytes for x in (known, report)]
    return {
        "error": _error(alone, shared),
        "shares": [known.active_share, report.active_share],
        "store": report.memory.kv_store,
        "memory": memory,
    }


def whole_steps() -> Any:
    return _beside("wan2.1-t2v", share=0.5)


def two_experts() -> Any:
    return _beside("wan2.2-i2v", share=0.6)


def image_states() -> Any:
    return _beside("wan2.1-i2v", share=0.6, policy="hsa")


def single_tokens() -> Any:
    return _beside("wan2.1-t2v", share=0.6, policy="hsa")


def single_tokens_between() -> Any:
    return _beside("wan2.2-ti2v-i2v", share=0.6, sparse_share=0.3)


def drift() -> Any:
    return _beside("wan2.1-t2v", share=0.6, policy="hsa", sync="drift", kv_store="offload")


def fp8() -> Any:
    return _beside("wan2.1-t2v", share=0.6, policy="hsa", kv_store="fp8")


def fp8_offload() -> Any:
    return _beside("wan2.1-t2v", share=0.6, policy="hsa", kv_store="fp8-offload")


def oracle() -> Any:
    return _beside("wan2.1-t2v", share=0.6, policy="hsa", score="oracle")


@contextlib.contextmanager
def _recording() -> Iterator[list[int]]:
    """Recorded calls: one entry for each that is replayed.

    On a CPU a recording calls again, and what would forbid one is asked as of a GPU.
    """
    capture, why_not, made = cuda_graphs.capture, cuda_graphs.why_not, []

    def counted(call: Any, pool: Any) -> Any:
        replay = capture(call, pool) if DEVICE == "cuda" else call
        return lambda: (made.append(1), replay())[1]

    with (
        mock.patch.object(cuda_graphs, "capture", counted),
        mock.patch.object(cuda_graphs, "why_not", lambda model, ours, _, ranks: why_not(model, ours, GPU, ranks)),
    ):
        yield made


def replayed() -> Any:
    """Single tokens with recorded calls and without, and the calls that were replayed."""
    results = {}
    with _recording() as made:
        for name in ("wan2.1-t2v", "ltx2.3-t2v"):
            _, pipe = _pair(name)
            options = {"share": 0.5, "dense_start": 2, "round_robin": 4}
            called, _ = _run(name, pipe, **options, cuda_graphs=False)
            assert not made
            again, _ = _run(name, pipe, **options)
            results[name] = _error(called, again), len(made)
            made.clear()
    return results


def another_life() -> Any:
    """One rank has made runs before the other, and has a hook of its own: both go on together, by the same plan."""
    pipe = _build("wan2.1-t2v")
    options = [{"share": 0.5, "dense_start": 2, "round_robin": 4}, {"runtime": 0.6}]
    shares, calls = [], itertools.count()
    with _recording():
        if dist.get_rank() == 0:
            for each in options:
                _run("wan2.1-t2v", pipe, **each)
        parallel.enable_context_parallel(pipe.transformer, 2, None)
        slow = pipe.transformer.patch_embedding.register_forward_pre_hook(
            lambda *_: time.sleep(0.5 if next(calls) < 4 else 0.05)
        )
        shares += [_run("wan2.1-t2v", pipe, **each)[1].active_share for each in options]
        slow.remove()
        if dist.get_rank() == 0:
            pipe.transformer.blocks[0].register_forward_hook(lambda *_: None)
        shares.append(_run("wan2.1-t2v", pipe, **options[0])[1].active_share)
    return shares


def ltx2() -> Any:
    return _beside("ltx2.3-i2v", share=0.6, policy="hsa")


def ltx2_from_text() -> Any:
    return _beside("ltx2.3-t2v", share=0.6, policy="hsa")


def ltx2_whole_steps() -> Any:
    return _beside("ltx2.0-t2v", share=0.6)


def ltx2_condition() -> Any:
    return _beside("ltx2.0-condition", share=0.6, policy="hsa", sync="drift")


def hunyuan15() -> Any:
    return _beside("hunyuan1.5-t2v", share=0.6, policy="hsa")


def hunyuan15_i2v() -> Any:
    return _beside("hunyuan1.5-i2v", share=0.6, policy="hsa", kv_store="fp8")


def every_row() -> Any:
    """Single tokens in every pipeline of the families that are supported; the largest error by its name."""
    errors = {}
    for name in ROWS:
        if name.startswith(("wan", "ltx2", "hunyuan1.5")) and not name.endswith("vace"):
            errors[name] = _beside(name, share=0.6, policy="hsa")["error"]
            _pair.cache_clear()
    return errors


def dense() -> Any:
    """At share 1 a run is that of context parallelism alone; where the model has that, its and one process's."""
    errors = {}
    for name in ("wan2.1-t2v", "wan2.2-ti2v-i2v", "ltx2.3-i2v", "hunyuan1.5-t2v"):
        one, two = _pair(name)
        shared, _ = _run(name, two, share=1.0)
        errors[name] = _error(ROWS[name].run(one if name.startswith(("ltx", "hun")) else two, steps=STEPS), shared)
    return errors


def seconds() -> Any:
    """A target in seconds: the plan and the report are the same on both."""
    out = []
    _, two = _pair("wan2.1-t2v")
    for policy in ("auto", "hsa"):
        _, report = _run("wan2.1-t2v", two, runtime=0.6, policy=policy)
        out.append((report.active_share, report.runtime.seconds, report.runtime.achieved, report.steps_map.tolist()))
    return out


def rankings() -> Any:
    """Which tokens ran is the same on both, though one of them would rank them the other way round."""
    _, two = _pair("wan2.1-t2v")
    scores_of = ranking.scores_of
    if dist.get_rank():
        ranking.scores_of = lambda generation: -scores_of(generation)
    try:
        _, report = _run("wan2.1-t2v", two, share=0.6, policy="hsa")
    finally:
        ranking.scores_of = scores_of
    return report.steps_map.tolist()


def enabled_first() -> Any:
    """`enable_parallelism` after `heterostep.enable`."""
    one, _ = _pair("wan2.1-t2v")
    two = _build("wan2.1-t2v")
    two.transformer.load_state_dict(one.transformer.state_dict())
    heterostep.enable(two, share=0.6, policy="hsa")
    parallel.enable_context_parallel(two.transformer, 2, None)
    alone, _ = _run("wan2.1-t2v", one, share=0.6, policy="hsa")
    error = _error(alone, ROWS["wan2.1-t2v"].run(two, steps=STEPS))
    heterostep.disable(two)
    return error


def group_offload() -> Any:
    """Weights that come and go, by hooks that were there before the tokens were split."""
    return _changed(
        lambda model: model.enable_group_offload(
            onload_device=torch.device(DEVICE), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
    )


def compiled_blocks() -> Any:
    return _changed(lambda model: model.compile_repeated_blocks(backend="aot_eager", dynamic=False))


def layerwise_casting() -> Any:
    def cast(model: Any) -> None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    return _changed(cast, both=True)


def _changed(change: Callable[[Any], Any], both: bool = False) -> float:
    """A model that is changed, spread over both processes, beside one process, where it is changed too or not."""
    one, two = _build("wan2.1-t2v"), _build("wan2.1-t2v")
    two.transformer.load_state_dict(one.transformer.state_dict())
    for pipe in (one, two) if both else (two,):
        change(pipe.transformer)
    parallel.enable_context_parallel(two.transformer, 2, None)
    runs = [_run("wan2.1-t2v", pipe, share=0.6, policy="hsa")[0] for pipe in (one, two)]
    return _error(*runs)


def uneven() -> Any:
    """Tokens that two ranks cannot have as many of: refused, and with `ulysses_anything` as one process."""
    row, options = ROWS["wan2.1-t2v"], dict(height=80, width=80)  # 3 x 5 x 5 tokens
    one, two = _pair("wan2.1-t2v")
    with heterostep.enabled(two, share=0.6):
        try:
            refusal = str(row.run(two, steps=STEPS, **options))
        except HeterostepError as error:
            refusal = str(error)
    if DEVICE == "cpu":
        # gloo cannot gather parts of different sizes, as NCCL does for diffusers.
        context_parallel._all_gather_anything = lambda x, dim, group: parallel.Ulysses(group, True).all_gather(x, dim)
    pipe, errors = _build("wan2.1-t2v"), []
    pipe.transformer.load_state_dict(one.transformer.state_dict())
    with compat.cpu_as_accelerator():
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))
    for how in ({"share": 1.0}, {"share": 0.6, "policy": "hsa"}):
        runs = []
        for each in (one, pipe):
            with heterostep.enabled(each, **how):
                runs.append((row.run(each, steps=STEPS, **options)[0],))
        errors.append(_error(*runs))
    return refusal, errors


def other_noise() -> Any:
    """Each rank with a seed of its own."""
    _, two = _pair("wan2.1-t2v")
    with heterostep.enabled(two, share=0.6):
        try:
            return str(ROWS["wan2.1-t2v"].run(two, steps=STEPS, seed=dist.get_rank()))
        except HeterostepError as error:
            return str(error)


def restored() -> Any:
    """After `disable`, context parallelism is as it was."""
    one, two = _pair("wan2.1-t2v")
    _run("wan2.1-t2v", two, share=0.6, policy="hsa")
    return _error(ROWS["wan2.1-t2v"].run(one, steps=STEPS), ROWS["wan2.1-t2v"].run(two, steps=STEPS))


def other_plan() -> Any:
    """What `enable` says where LTX-2's tokens are split by diffusers' plan."""
    pipe = _build("ltx2.0-t2v")
    parallel.enable_context_parallel(pipe.transformer, 2, None)
    try:
        heterostep.enable(pipe, share=0.6)
    except HeterostepError as error:
        return str(error)


def one_expert_of_two() -> Any:
    pipe = _build("wan2.2-i2v")
    parallel.enable_context_parallel(pipe.transformer, 2, None)
    try:
        heterostep.enable(pipe, share=0.6)
    except HeterostepError as error:
        return str(error)


def upstream_ltx2() -> Any:
    """diffusers' own plan for LTX-2, beside one process: the error, or what it raises."""
    name = "ltx2.0-t2v"
    one, _ = _pair(name)
    two = _build(name)
    two.transformer.load_state_dict(one.transformer.state_dict())
    parallel.enable_context_parallel(two.transformer, 2, None)
    try:
        return _error(ROWS[name].run(one, steps=2), ROWS[name].run(two, steps=2))
    except Exception as error:
        return str(error)
