"""Forecasts on the meta device: what is counted, and that it is what a call of the whole model keeps."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

from heterostep import configs
from heterostep.engine import forecast
from heterostep.engine.calls import DirectCalls
from heterostep.engine.forecast import GRAIN, LiveBytes, call_memory
from heterostep.kv.cache import STORES, KVCache
from heterostep.planning.dry_run import dry_run, dry_run_pipeline
from small_ltx2 import small_ltx2
from small_wan import small_wan

SIZES = dict(height=64, width=64, num_frames=9, num_inference_steps=4)
BUNDLED = {
    "wan2.1-t2v-1.3b": dict(height=480, width=832, num_frames=81),
    "wan2.2-ti2v-5b": dict(height=256, width=256, num_frames=33),
    "ltx-2": dict(height=256, width=256, num_frames=33),
}
SMALL = {
    "wan2.1-t2v": lambda: small_wan("wan2.1-t2v"),
    "wan2.1-i2v": lambda: small_wan("wan2.1-i2v"),
    "wan2.1-vace": lambda: small_wan("wan2.1-vace"),
    "wan2.2-ti2v-t2v": lambda: small_wan("wan2.2-ti2v-t2v"),
    "ltx2": lambda: small_ltx2(),
    "ltx2.3": lambda: small_ltx2(version="2.3"),
}
MiB = 2**20


def empty(size):
    return torch.empty(size, dtype=torch.uint8, device="meta")


def first_call(name, layers=5, **sizes):
    """A bundled configuration's transformer of fewer layers, on the meta device, and its first call's arguments."""
    found = configs.load(name)
    component = {**found.transformer, "num_layers": layers}
    if "vace_layers" in component:
        component["vace_layers"] = [layer for layer in component["vace_layers"] if layer < layers]
    seen = dry_run(found, num_inference_steps=10, guidance_scale=5.0, **{**BUNDLED.get(name, {}), **sizes})
    inputs = dict(seen.calls[0])
    if "vace_layers" in component:
        inputs["control_hidden_states_scale"] = inputs["control_hidden_states_scale"][: len(component["vace_layers"])]
    return configs.build(component), inputs


def real_like(name, value):
    """A real tensor for one of a dry run's, which have no values; anything else as it is."""
    if isinstance(value, torch.Tensor):
        if "timestep" in name or "sigma" in name:
            return torch.full(value.shape, 500, dtype=value.dtype)
        return torch.ones(value.shape, dtype=value.dtype)
    return value


def test_a_storage_counts_from_its_making_to_its_end():
    with LiveBytes([]) as live:
        first = empty(4 * MiB)
        assert live.now == live.peak == 4 * MiB
        second = empty(MiB)
        assert live.now == live.peak == 5 * MiB
        del first
        assert (live.now, live.peak) == (MiB, 5 * MiB)
        third = empty(2 * MiB)
        assert (live.now, live.peak) == (3 * MiB, 5 * MiB)
        del second, third
    assert (live.now, live.peak) == (0, 5 * MiB)


def test_the_allocators_grain_is_counted():
    with LiveBytes([]) as live:
        tensors = [empty(1), empty(GRAIN), empty(GRAIN + 1)]
        assert live.now == 4 * GRAIN and len(tensors) == 3


def test_views_and_writes_in_place_are_not_counted_twice():
    with LiveBytes([]) as live:
        whole = torch.zeros(1024, 1024, device="meta")
        assert live.now == 4 * MiB
        half = whole[:512]
        half.mul_(2).add_(1)
        whole.view(-1).copy_(torch.empty(0, device="meta").new_zeros(()).expand(1024 * 1024))
        row = whole.t().unsqueeze(0)
        assert live.now == 4 * MiB
        # As long as something sees it, it is there.
        del whole, half
        assert live.now == 4 * MiB
        del row
        assert live.now == 0


def test_what_was_known_before_is_not_counted_nor_kept():
    known = empty(4 * MiB)
    with LiveBytes([known]) as live:
        view = known[: MiB // 2]
        view.add_(1)
        assert live.now == live.peak == 0
        made = known + known
        assert live.now == 4 * MiB and made.shape == known.shape


def test_the_peak_counts_from_a_restart_on():
    with LiveBytes([]) as live:
        kept = empty(MiB)
        passing = empty(8 * MiB)
        del passing
        assert live.peak == 9 * MiB
        live.restart()
        assert live.peak == live.now == kept.nbytes
        more = empty(2 * MiB)
        assert live.peak == kept.nbytes + more.nbytes


@pytest.mark.parametrize("name", BUNDLED)
def test_a_few_layers_tell_what_all_hold(monkeypatch, name):
    model, inputs = first_call(name)
    few = call_memory(model, inputs)
    monkeypatch.setattr(forecast, "SHALLOW", 1000)
    monkeypatch.setattr(forecast, "_known", {})
    assert few == call_memory(first_call(name)[0], inputs)
    attentions = 2 if name == "ltx-2" else 1
    assert len(few.layers) == 5 * attentions


def test_more_layers_keep_more_and_hold_the_same():
    model, inputs = first_call("wan2.1-t2v-1.3b", layers=3)
    three = call_memory(model, inputs)
    six = call_memory(first_call("wan2.1-t2v-1.3b", layers=6)[0], inputs)
    assert six.layers == 2 * three.layers and six.static == 2 * three.static
    assert (six.plain, six.dense, six.sparse, six.held) == (three.plain, three.dense, three.sparse, three.held)


def test_vaces_layers_are_not_cut(monkeypatch):
    model, inputs = first_call("wan2.1-vace-1.3b", layers=5, height=256, width=256, num_frames=17)
    few = call_memory(model, inputs)
    assert len(few.layers) == 5 + len(model.config.vace_layers)
    monkeypatch.setattr(forecast, "SHALLOW", 1000)
    monkeypatch.setattr(forecast, "_known", {})
    again = first_call("wan2.1-vace-1.3b", layers=5, height=256, width=256, num_frames=17)[0]
    assert few == call_memory(again, inputs)


def test_calls_alike_are_forecast_once(monkeypatch):
    made, forecast_anew = [], forecast._call_memory
    monkeypatch.setattr(forecast, "_call_memory", lambda *args: (made.append(1), forecast_anew(*args))[1])
    monkeypatch.setattr(forecast, "_known", {})
    model, inputs = first_call("wan2.1-t2v-1.3b", layers=2)
    first = call_memory(model, inputs)
    assert call_memory(model, inputs) == first and len(made) == 1
    # Another model that is the same.
    assert call_memory(*first_call("wan2.1-t2v-1.3b", layers=2)) == first and len(made) == 1
    call_memory(model, inputs, share=0.1)
    assert len(made) == 2
    model.set_attention_backend("_native_math")
    call_memory(model, inputs)
    assert len(made) == 3
    # A model without a backend of its own attends by the process's.
    registry.set_active_backend(AttentionBackendName._NATIVE_MATH)
    call_memory(*first_call("wan2.1-t2v-1.3b", layers=2))
    assert len(made) == 4
    smaller = first_call("wan2.1-t2v-1.3b", layers=2, height=512, width=512, num_frames=33)[1]
    assert call_memory(model, smaller).dense < first.dense and len(made) == 5


@pytest.mark.parametrize("name", SMALL)
def test_kept_k_and_v_are_what_a_real_call_keeps(name):
    pipe = SMALL[name]()
    inputs = dry_run_pipeline(pipe, **SIZES).calls[0]
    forecast = call_memory(pipe.transformer, inputs)
    real = {key: real_like(key, value) for key, value in inputs.items()}
    calls = DirectCalls(pipe.transformer, real)
    for store in STORES:
        calls.use(store)
        with torch.no_grad():
            calls.dense()
            calls.sparse(calls.random_index(4))
        check_kept(calls, store, forecast)
    calls.restore()


def check_kept(calls, store, needed):
    caches = [kept for kept in calls.stores if isinstance(kept, KVCache)]
    assert sum(cache.nbytes + cache.host_nbytes for cache in caches) == sum(x.nbytes(store) for x in needed.layers)
    assert len(caches) == len(needed.layers)
    assert sum(kept.nbytes for kept in calls.stores if not isinstance(kept, KVCache)) == needed.static
    stores = forecast.uniform(store, needed.layers)
    on_device = sum(cache.nbytes for cache in caches) + calls.workspace.nbytes
    if "offload" not in store:
        assert on_device == stores.device_bytes
    else:
        # What is on its way is aligned, to at most 255 bytes more for each of four tensors. Where attentions of two
        # sizes take turns, one of its two places is of the smaller size.
        assert on_device - stores.device_bytes < 2 * 4 * 256
        assert on_device >= stores.device_bytes / 2
        assert on_device >= stores.device_bytes or len(set(needed.layers)) > 1
    assert stores.host_bytes == sum(cache.host_nbytes for cache in caches)
    rows = calls.held
    # Velocity, output, and a slope in float32.
    assert needed.held == rows.numel() * (rows.element_size() * 2 + 4)


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "ltx-2"])
def test_activations_grow_with_the_tokens(name):
    model, inputs = first_call(name, height=256, width=256, num_frames=33)
    small = call_memory(model, inputs)
    large = call_memory(model, first_call(name, height=512, width=512, num_frames=33)[1])
    for part in ("plain", "dense", "sparse"):
        # Text, timesteps and, in LTX-2, sound stay the same size.
        assert 2.5 < getattr(large, part) / getattr(small, part) < 4.1, part
    assert large.held == 4 * small.held
    vectors = [[shape.vectors for shape in each.layers] for each in (small, large)]
    assert sum(vectors[1]) == 4 * sum(vectors[0])


def test_fewer_tokens_hold_less():
    model, inputs = first_call("wan2.1-t2v-1.3b")
    whole, half, few = (call_memory(model, inputs, share) for share in (1.0, 0.5, 0.1))
    assert few.sparse < half.sparse < half.dense
    assert half.sparse < whole.sparse
    assert (few.static, few.held, few.layers) == (half.static, half.held, half.layers)
    # Of these only the active tokens' numbers depend on the share.
    assert few.plain == pytest.approx(half.plain, rel=1e-3) and few.dense == pytest.approx(half.dense, rel=1e-3)


@pytest.mark.parametrize("name", ["wan2.1-t2v", "ltx2"])
def test_the_model_is_left_as_it_was(name):
    pipe = SMALL[name]()
    model = pipe.transformer
    inputs = dry_run_pipeline(pipe, **SIZES).calls[0]
    processors = {path: module.processor for path, module in model.named_modules() if hasattr(module, "processor")}
    weights = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    arguments = dict(inputs)
    first = call_memory(model, inputs)
    assert {path: m.processor for path, m in model.named_modules() if hasattr(m, "processor")} == processors
    assert all("forward" not in vars(module) for module in model.modules())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for key, value in model.state_dict().items():
        assert value.data_ptr() == weights[key][0] and torch.equal(value, weights[key][1])
    assert model.config.num_layers == 3 and not model.training
    assert inputs.keys() == arguments.keys() and all(inputs[key] is value for key, value in arguments.items())
    assert call_memory(model, inputs) == first


def test_nothing_is_allocated():
    # 14B at 720p: were a single layer's K made, it would be 774 MB.
    found = configs.load("wan2.1-t2v-14b")
    seen = dry_run(found, height=720, width=1280, num_frames=81, num_inference_steps=10)
    made = []

    class Watched(LiveBytes):
        def _note(self, storage):
            made.append(storage.device.type)
            super()._note(storage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "LiveBytes", Watched)
        needed = call_memory(seen.model, seen.calls[0])
    assert made and made.count("meta") > 50
    assert needed.layers[0].nbytes("device") == 2 * 75600 * 5120 * 2


def test_a_model_in_float32_holds_more():
    model, inputs = first_call("wan2.1-t2v-1.3b", layers=2, height=256, width=256, num_frames=17)
    half = call_memory(model, inputs)
    for name in ("hidden_states", "encoder_hidden_states"):
        inputs[name] = inputs[name].float()
    single = call_memory(torch.nn.Module.to(model, torch.float32), inputs)
    assert single.layers[0].dtype.itemsize == 4 and half.layers[0].dtype.itemsize == 2
    assert 1.3 < single.plain / half.plain < 2.1


def test_room_is_known_on_cuda_alone():
    assert forecast.room_on(torch.device("cpu")) is None and forecast.room_on(torch.device("meta"), 80) is None


@pytest.fixture
def card(monkeypatch):
    """Let there be a CUDA device in this state."""

    def of(free, total=10**11, reserved=0, allocated=0, fraction=1.0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)

    return of


@pytest.mark.parametrize(
    ("state", "vram", "most"),
    [
        (dict(free=10**11), None, 10**11),
        # Others have 20 GB; of the process's 30 GB, 10 GB are in use and the rest is the allocator's to give again.
        (dict(free=5 * 10**10, reserved=3 * 10**10, allocated=10**10), None, 8 * 10**10),
        (dict(free=10**11, fraction=0.25), None, 25 * 10**9),
        (dict(free=10**11), 16, 16 * 10**9),
        (dict(free=10**10), 16, 10**10),
    ],
)
def test_room_on_a_card(card, state, vram, most):
    card(**state)
    room = forecast.room_on(torch.device("cuda"), vram)
    assert room == most - int(most * forecast.MARGIN) - state.get("allocated", 0)
    # Beside a call that holds much, more of it may lie in fragments.
    held = most // 4
    less = forecast.room_on(torch.device("cuda"), vram, held)
    assert less == most - int(held * forecast.FRAGMENTS) - state.get("allocated", 0) < room


def test_host_room_is_less_than_half_of_what_is_available(monkeypatch):
    monkeypatch.setattr(forecast.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert forecast.host_room() == 450
