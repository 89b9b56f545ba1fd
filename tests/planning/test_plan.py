"""Plans against plain arithmetic, peaks measured on a GPU, and what a pipeline itself says."""

import dataclasses
import functools
import json
import math

import pytest
import torch
import torch.nn.functional as functional
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Backends

import heterostep
from heterostep import HSAConfig, configs
from heterostep.engine import forecast
from heterostep.engine.schedule import Schedule
from heterostep.errors import HeterostepError
from heterostep.kv.cache import STORES
from heterostep.planning import plan as planning
from heterostep.planning import timings
from heterostep.planning.plan import plan
from rows import ROWS, quickly
from small_wan import small_wan

SMALL = dict(height=64, width=64, num_frames=9, num_inference_steps=12)
# Tokens (frames, height, width), calls, layers, heads, head dim, at the checkpoint's own size.
WAN = {
    "wan2.1-t2v-1.3b": ((21, 30, 52), 2, 30, 12, 128),
    "wan2.1-t2v-14b": ((21, 45, 80), 2, 40, 40, 128),
    "wan2.2-ti2v-5b": ((31, 22, 40), 2, 30, 24, 128),
    "wan2.2-t2v-a14b": ((21, 45, 80), 2, 40, 40, 128),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No timings but a test's own, no GPU, and diffusers' attention backend as it was afterwards."""
    monkeypatch.setenv("HETEROSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Backends, "_active_backend", Backends._active_backend)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small pipeline, saved."""
    path = tmp_path_factory.mktemp("model")
    small_wan("wan2.1-t2v").save_pretrained(path)
    return str(path)


def by_name(made):
    return {store.store: store for store in made.stores}


def check_stores(made, vectors, dims):
    """Every store of a plan in bfloat16 against arithmetic. `vectors`: K's (and V's) by their dim, all layers' and
    calls' together; `dims`: those of each attention of one layer and call.
    """
    kept = sum(2 * count * dim * 2 for dim, count in vectors.items())
    # A byte for each value, and a scale in 16 bits for each vector.
    coded = sum(2 * count * (dim + 2) for dim, count in vectors.items())
    decoded = sum(2 * count * dim * 2 for dim, count in dims)
    largest = max(2 * count * dim * 2 for dim, count in dims)
    largest_coded = max(2 * count * (dim + 2) for dim, count in dims)
    stores = by_name(made)
    assert tuple(stores) == STORES
    assert {name: (store.device_bytes, store.host_bytes) for name, store in stores.items()} == {
        "device": (kept, 0),
        "fp8": (coded + decoded, 0),
        "offload": (2 * largest, kept),
        "fp8-offload": (decoded + 2 * largest_coded, coded),
    }
    peaks = {name: store.peak_bytes for name, store in stores.items()}
    assert peaks["device"] > peaks["fp8"] > max(peaks["offload"], peaks["fp8-offload"])
    assert min(peaks.values()) > made.dense_peak_bytes > sum(made.weights.values())
    assert all(store.fits is None for store in made.stores)
    assert made.chosen == stores["device"] and made.peak_bytes == peaks["device"]


@pytest.mark.parametrize("name", quickly(WAN, ["wan2.1-t2v-1.3b", "wan2.2-t2v-a14b"]))
def test_wan_by_arithmetic(name):
    made = plan(name, runtime=0.5, sparse_share=0.2)
    grid, calls, layers, heads, dim = WAN[name]
    tokens = math.prod(grid)
    assert (made.grid, made.tokens, made.calls) == (grid, tokens, calls)
    check_stores(made, {dim: calls * layers * heads * tokens}, [(dim, heads * tokens)])
    assert by_name(made)["device"].device_bytes == 2 * calls * layers * tokens * heads * dim * 2
    defaults = configs.load(name).defaults
    assert {key: getattr(made, key) for key in defaults} == defaults
    assert made.share == pytest.approx(0.5, abs=0.001) and made.limit_bytes is None
    assert (made.model, made.pipeline) == (name, "WanPipeline")


def test_ltx2_by_arithmetic():
    made = plan("ltx-2", runtime=0.5)
    tokens, layers, heads = 16 * 16 * 24, 48, 32
    assert (made.grid, made.tokens, made.calls) == ((16, 16, 24), tokens, 3)
    # Two attentions in a block keep the video's: its own, of 128 values, and the sound's, of 64. The first call is of
    # two guidance branches, the others of one; the last one isolates the modalities, and has no attention between them.
    vectors = {128: layers * heads * tokens * (2 + 1 + 1), 64: layers * heads * tokens * (2 + 1)}
    both, one = 2 * heads * tokens, heads * tokens
    check_stores(made, vectors, [(128, both), (64, both), (128, one), (64, one)])


def test_weights_are_the_parameters_in_16_bits():
    weights = plan("wan2.1-t2v-14b", runtime=0.5, height=64, width=64, num_frames=5).weights
    assert weights["transformer"] == pytest.approx(2 * 14.29e9, rel=0.01)
    # umT5's encoder, and the VAE in float32.
    assert weights["text_encoder"] == pytest.approx(2 * 5.68e9, rel=0.01)
    assert weights["vae"] == pytest.approx(4 * 0.127e9, rel=0.01)


def test_models_on_the_device_one_at_a_time():
    pipe = small_wan("wan2.2-t2v")
    whole, one = (plan(pipe, runtime=0.7, offload=offload, **SMALL) for offload in ("none", "model"))
    assert set(whole.weights) == {"transformer", "transformer_2", "text_encoder", "vae"}
    assert len(one.weights) == 1 and one.weights.items() <= whole.weights.items()
    saved = sum(whole.weights.values()) - sum(one.weights.values())
    assert whole.peak_bytes - one.peak_bytes == whole.dense_peak_bytes - one.dense_peak_bytes == saved


def test_weights_of_another_dtype():
    small = dict(runtime=0.5, height=128, width=128, num_frames=9)
    half, single = (plan("wan2.1-t2v-1.3b", dtype=dtype, **small) for dtype in (torch.bfloat16, torch.float32))
    assert single.weights["transformer"] == 2 * half.weights["transformer"]
    assert single.weights["vae"] == half.weights["vae"]
    assert by_name(single)["offload"].host_bytes == 2 * by_name(half)["offload"].host_bytes
    assert by_name(single)["fp8-offload"].host_bytes == by_name(half)["fp8-offload"].host_bytes


def test_tf32_needs_what_float32_does(monkeypatch):
    options = dict(share=0.5, height=128, width=128, num_frames=9, dtype=torch.float32)
    plain, attend = plan("wan2.1-t2v-1.3b", **options), functional.scaled_dot_product_attention
    # As `use_tf32` leaves it.
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", functools.wraps(attend)(lambda *a, **k: attend(*a, **k))
    )
    assert plan("wan2.1-t2v-1.3b", **options) == plain


def test_peaks_grow_with_the_video(folder):
    sizes = [(128, 128, 9), (128, 128, 17), (256, 128, 17), (256, 256, 17), (256, 256, 33)]
    plans = [plan(folder, runtime=0.5, height=h, width=w, num_frames=f) for h, w, f in sizes]
    for less, more in zip(plans, plans[1:]):
        assert less.tokens < more.tokens and less.dense_peak_bytes < more.dense_peak_bytes
        assert less.activation_bytes < more.activation_bytes
        assert all(a.peak_bytes < b.peak_bytes for a, b in zip(less.stores, more.stores))


def test_without_guidance_there_is_one_call(folder):
    two, one = (plan(folder, runtime=0.5, guidance_scale=scale, **SMALL) for scale in (5.0, 1.0))
    assert (two.calls, one.calls) == (2, 1)
    assert by_name(two)["device"].device_bytes == 2 * by_name(one)["device"].device_bytes


def test_measured_peak_of_1_3b_at_480p():
    # Measured on an H200.
    made = plan(
        "wan2.1-t2v-1.3b",
        runtime=0.5,
        sparse_share=0.2,
        offload="model",
        attention_backend="_native_cudnn",
        num_inference_steps=40,
        kv_store="device",
    )
    assert made.chosen.store == "device"
    assert made.peak_bytes == pytest.approx(16_895_046_144, rel=0.05)


def test_measured_peak_of_14b_at_720p_with_two_stores(monkeypatch):
    # Measured on an H200, where these stores were chosen.
    monkeypatch.setattr(forecast, "choose", lambda layers, *rooms: forecast._mixed(layers, "fp8", "fp8-offload", 36))
    made = plan("wan2.1-t2v-14b", runtime=0.5, sparse_share=0.2, offload="model", attention_backend="_native_cudnn")
    assert made.chosen.store == "fp8 for 44 of 80 layers, fp8-offload for 36 of 80 layers"
    assert made.peak_bytes == pytest.approx(72_872_485_376, rel=0.05)


@pytest.mark.parametrize(
    ("name", "vram", "store"),
    [
        ("wan2.1-t2v-1.3b", 80, "device"),
        ("wan2.1-t2v-1.3b", 16, "device for "),
        ("wan2.1-t2v-1.3b", 6, "fp8 for "),
        ("wan2.1-t2v-14b", 80, "fp8 for "),
        ("wan2.2-ti2v-5b", 80, "device"),
    ],
)
def test_the_store_that_fits(name, vram, store):
    made = plan(name, runtime=0.5, sparse_share=0.2, offload="model", vram=vram)
    assert made.limit_bytes == forecast.less_margin(int(vram * 1e9), made.activation_bytes)
    assert made.chosen.store == store if not store.endswith(" ") else made.chosen.store.startswith(store)
    assert made.peak_bytes == made.chosen.peak_bytes <= made.limit_bytes and made.chosen.fits is True
    for each in made.stores:
        assert each.fits is (each.peak_bytes <= made.limit_bytes)
    if not store.endswith(" "):
        assert made.chosen == by_name(made)[store]
    else:
        # All layers in the faster store would not fit.
        assert by_name(made)[store.split()[0]].fits is False


@pytest.mark.parametrize(("name", "vram"), [("wan2.1-t2v-1.3b", 0.1), ("wan2.1-t2v-14b", 16)])
def test_nothing_fits(name, vram):
    made = plan(name, runtime=0.5, sparse_share=0.2, offload="model", vram=vram)
    assert made.chosen is None and made.peak_bytes is None
    assert [store.fits for store in made.stores] == [False] * 4
    assert made.limit_bytes == forecast.less_margin(int(vram * 1e9), made.activation_bytes) < made.dense_peak_bytes


@pytest.mark.parametrize(
    ("store", "vram", "fits"),
    [*((store, 1e-4, False) for store in STORES), ("fp8", None, None), ("offload", 1, True)],
)
def test_a_store_that_was_asked_for_stays(folder, store, vram, fits):
    made = plan(folder, runtime=0.5, sparse_share=0.2, kv_store=store, vram=vram, **SMALL)
    assert made.chosen == by_name(made)[store] and made.chosen.fits is fits
    assert made.peak_bytes == made.chosen.peak_bytes


def test_memory_that_is_present_is_the_limit(monkeypatch):
    asked = []

    def room_on(device, vram, activations):
        assert 10**9 < activations < 2 * 10**9
        asked.append((device.type, vram))
        return 9 * 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10**9)
    monkeypatch.setattr(timings, "device_name", lambda device: "card")
    monkeypatch.setattr(forecast, "room_on", room_on)
    monkeypatch.setattr(forecast, "host_room", lambda: 10**6)
    made = plan("wan2.1-t2v-1.3b", runtime=0.5, sparse_share=0.2, vram=12, offload="model")
    assert asked == [("cuda", 12)] and made.limit_bytes == 10**10
    # Neither does K and V's size fit into the host.
    assert {name: store.fits for name, store in by_name(made).items()} == {
        "device": False, "fp8": False, "offload": False, "fp8-offload": False,
    }  # fmt: skip
    assert made.chosen is None
    monkeypatch.setattr(forecast, "host_room", lambda: 10**11)
    made = plan("wan2.1-t2v-1.3b", runtime=0.5, sparse_share=0.2, vram=12, offload="model")
    assert by_name(made)["offload"].fits is True and made.chosen.fits is True and made.peak_bytes <= 10**10


def test_no_k_and_v_without_single_tokens_between(folder):
    sizes = {**SMALL, "num_inference_steps": 50}
    whole = plan(folder, runtime=0.49, **sizes)
    assert whole.chosen == planning.StorePlan("none", 0, 0, whole.peak_bytes, None)
    # Velocities and the output in 16 bits, slopes in 32, of both calls: 48 tokens of 1 x 2 x 2 x 16 values.
    assert whole.peak_bytes - whole.dense_peak_bytes == 2 * 48 * 64 * (2 + 2 + 4)
    assert whole.share == 24 / 50
    for vram, fits in ((1, True), (1e-4, False)):
        made = plan(folder, runtime=0.49, vram=vram, **sizes)
        assert made.chosen.store == "none" and made.chosen.fits is fits


@pytest.mark.parametrize(
    ("options", "store", "roomy"),
    [
        # Of 12 steps 6.6 and 6.24: what whole steps leave is much, little, and not to be spent.
        (dict(share=0.55, vram=8), "device", None),
        (dict(share=0.52, vram=8), "none", None),
        (dict(share=0.55, vram=8, sparse_share=0), "none", None),
        # Nobody asked for single tokens: not without the room for K and V on the device.
        (dict(share=0.55, vram=1e-4), "none", 0.55),
        (dict(share=0.55), "none", 0.55),
        (dict(runtime=0.5), "none", None),
        (dict(share=0.55, sparse_share=0.2), "device", None),
        (dict(runtime=0.5, sparse_share=0.2), "device", None),
        (dict(share=0.55, policy="hsa"), "device", None),
        (dict(share=1), "none", None),
        (dict(share=0.55, sparse_share=0.2, sync="fresh"), "none", None),
    ],
)
def test_k_and_v_are_kept_for_single_tokens_alone(folder, options, store, roomy):
    made = plan(folder, **SMALL, **options)
    assert made.chosen.store == store
    assert made.roomy_share == (roomy and pytest.approx(roomy, abs=0.002)) and (roomy is None or made.share == 0.5)
    assert made.share == pytest.approx(options.get("share", 0.5), abs=0.051)


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"])
@pytest.mark.parametrize("options", [dict(runtime=0.5), dict(share=0.33)])
def test_by_default_a_run_needs_hardly_more_than_a_dense_one(name, options):
    """Held velocities, slopes and outputs of both branches: no K and V."""
    made = plan(name, offload="model", **options)
    assert made.chosen.store == "none"
    assert made.peak_bytes < 1.03 * made.dense_peak_bytes


def test_replays(folder):
    replay = [1.0] * 4 + [0.25, 0.5, 0.25, 1.0] * 2
    made = plan(folder, share=replay, **SMALL)
    assert made.share == pytest.approx(sum(replay) / 12) and made.chosen.store == "device"
    # The largest step of some tokens is what a sparse call may hold.
    less = plan(folder, share=[1.0] * 4 + [0.25] * 8, **SMALL)
    assert all(a.peak_bytes <= b.peak_bytes for a, b in zip(less.stores, made.stores))
    assert less.share == pytest.approx(0.5)
    whole = plan(folder, share=[1.0, 1.0, 0.0, 1.0], **{**SMALL, "num_inference_steps": 4})
    assert (whole.share, whole.chosen.store) == (0.75, "none")


@pytest.mark.parametrize("row", ["wan2.1-i2v", "wan2.2-i2v", "wan2.1-vace", "wan2.2-ti2v-t2v"])
def test_a_pipeline_and_its_folder_agree(row, tmp_path):
    pipe = small_wan(row)
    pipe.save_pretrained(tmp_path / "model")
    loaded = plan(pipe, **SMALL, share=0.55, sparse_share=0.2, kv_store="fp8", vram=1)
    saved = plan(tmp_path / "model", **SMALL, share=0.55, sparse_share=0.2, kv_store="fp8", vram=1, dtype=torch.float32)
    assert loaded.model == type(pipe).__name__ == saved.pipeline and saved.model == str(tmp_path / "model")
    assert dataclasses.replace(saved, model=loaded.model) == loaded
    assert loaded.tokens == 48 and loaded.chosen.store == "fp8"
    weights = {name: sum(p.nbytes for p in part.parameters()) for name, part in pipe.components.items()
               if isinstance(part, torch.nn.Module)}  # fmt: skip
    assert loaded.weights == weights


def test_what_is_planned_is_what_is_kept():
    from small_wan import run_wan

    pipe = small_wan("wan2.1-t2v")
    for store in STORES:
        made = plan(pipe, **SMALL, share=0.55, sparse_share=0.2, guidance_scale=3.0, kv_store=store)
        with heterostep.enabled(pipe, share=0.55, sparse_share=0.2, kv_store=store):
            run_wan("wan2.1-t2v", pipe)
        told = heterostep.report(pipe).memory
        assert told.kv_store == made.chosen.store
        assert told.kv_host_bytes == made.chosen.host_bytes
        assert heterostep.report(pipe).share.achieved == pytest.approx(made.share, abs=0.02)


def test_a_pipeline_is_left_as_it_was():
    pipe = small_wan("wan2.2-t2v")
    parts = dict(pipe.components)
    weights = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    timesteps = pipe.scheduler.timesteps.clone()
    plan(pipe, **SMALL, runtime=0.7, attention_backend="_native_math")
    assert dict(pipe.components) == parts and torch.equal(pipe.scheduler.timesteps, timesteps)
    assert all(torch.equal(value, weights[key]) for key, value in pipe.transformer.state_dict().items())
    assert all(m.processor._attention_backend is None for m in pipe.transformer.modules() if hasattr(m, "processor"))


def test_an_enabled_pipeline_can_be_planned():
    pipe = small_wan("wan2.1-t2v")
    plain = plan(pipe, share=0.5, **SMALL)
    with heterostep.enabled(pipe, share=0.3):
        assert plan(pipe, share=0.5, **SMALL) == plain


def test_other_models_keep_their_attention_backend():
    # diffusers also makes a model's backend that of all models without one.
    before = Backends.get_active_backend()
    plan("wan2.1-t2v-1.3b", runtime=0.5, height=64, width=64, num_frames=5, attention_backend="_native_cudnn")
    assert Backends.get_active_backend() == before


def test_image_to_video():
    options = dict(share=0.5, height=128, width=128, num_frames=9, num_inference_steps=8)
    text, image = plan("wan2.2-ti2v-5b", **options), plan("wan2.2-ti2v-5b", image_to_video=True, **options)
    assert (text.pipeline, text.from_frames) == ("WanPipeline", False)
    assert (image.pipeline, image.from_frames) == ("WanImageToVideoPipeline", True)
    # From a frame less changes at the beginning, and given tokens are evaluated like the others.
    assert text.share == image.share == 0.5 and text.tokens == image.tokens
    assert text.evaluated == "all tokens at steps 1-3, 6" and image.evaluated == "all tokens at steps 1-2, 4, 7"
    assert text.advice is None and "4 steps may give" in image.advice
    # A checkpoint that wants a frame is planned with one.
    assert plan("wan2.1-i2v-14b-480p", **options).active_share == image.active_share


def test_a_pipeline_says_whether_it_takes_a_frame():
    assert plan(small_wan("wan2.1-i2v"), **SMALL, share=0.5) == plan(
        small_wan("wan2.1-i2v"), **SMALL, share=0.5, image_to_video=True
    )
    with pytest.raises(HeterostepError, match="WanPipeline does not take a first frame: give the image-to-video"):
        plan(small_wan("wan2.1-t2v"), **SMALL, share=0.5, image_to_video=True)


@pytest.mark.parametrize(
    ("name", "frames"),
    [("wan2.1-t2v", 9), ("wan2.1-v2v", 9), ("wan2.2-i2v", 9), ("wan2.2-ti2v-i2v", 9), ("ltx2.3-i2v", 17)],
)
def test_the_steps_are_those_that_a_run_begins_with(name, frames, monkeypatch):
    row, begun, first = ROWS[name], [], Schedule.plan

    def noted(schedule):
        counts = first(schedule)
        begun.append([count / schedule.run.tokens.total for count in counts])
        return counts

    pipe = row.build()
    made = plan(pipe, height=64, width=64, num_frames=frames, num_inference_steps=12, share=0.45)
    monkeypatch.setattr(Schedule, "plan", noted)
    with heterostep.enabled(pipe, share=0.45):
        row.run(pipe, steps=12)
    # A run plans when it is checked and when it begins.
    assert begun == [list(made.active_share)] * 2
    # The rest begins with a video that has less than all of the noise.
    assert len(made.active_share) == (9 if name == "wan2.1-v2v" else 12)


def test_steps_with_some_of_the_tokens_are_told_apart(folder):
    shares = [1.0, 1.0, 0.25, 0.5, 1.0, 0.0, 1.0, 0.25, *[0.0] * 4]
    assert plan(folder, share=shares, **SMALL).evaluated == "all tokens at steps 1-2, 5, 7; some at 3-4, 8"


def test_options_as_a_config_or_as_keywords(folder):
    options = dict(share=0.55, sparse_share=0.2, kv_store="fp8")
    assert plan(folder, **SMALL, config=HSAConfig(**options)) == plan(folder, **SMALL, **options)


def test_sizes_that_are_left_out_are_the_models_own(folder):
    made = plan(folder, share=0.55, height=64, width=64, num_frames=9)
    # Those of WanPipeline's call.
    assert (made.num_inference_steps, made.guidance_scale) == (50, 5.0)


@pytest.mark.parametrize(("model", "asked", "made"), [("wan2.1-t2v-1.3b", 84, 85), ("ltx-2", 86, 81)])
def test_a_number_of_frames_that_the_model_does_not_make_is_diffusers_own(model, asked, made):
    assert plan(model, runtime=0.5, height=64, width=64, num_frames=asked).num_frames == made


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("magic", dict(runtime=0.5), "magic is neither a diffusers folder nor a bundled configuration"),
        (None, dict(runtime=0.5), "plan expects a name, a folder or a pipeline, not None"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, speed=2), "no such option: speed"),
        ("wan2.1-t2v-1.3b", dict(), "exactly one of runtime and share"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, share=0.5), "exactly one of runtime and share"),
        ("wan2.1-t2v-1.3b", dict(config=HSAConfig(share=0.5), share=0.5), "not both"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, offload="disk"), "offload must be one of none, model, not 'disk'"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, kv_store="tape"), "kv_store must be one of"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, vram=0), "vram must be gigabytes above 0"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, vram=math.nan), "vram must be gigabytes above 0"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, vram=math.inf), "vram must be gigabytes above 0"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, height=100), "divisible by 16"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, height=0), "height must be at least 1, not 0"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, num_frames=-1), "num_frames must be at least 1, not -1"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, num_inference_steps=0), "num_inference_steps must be at least 1"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, image_to_video=True), "does not take a first frame"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.01), "runtime=0.01 is below the lowest possible"),
        ("wan2.2-t2v-a14b", dict(share=0.04), "where the second transformer takes over"),
        ("wan2.1-t2v-1.3b", dict(share=[1, 1, 0.5]), "share is for 3 steps, but the run has 50"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, attention_backend="nonsense"), "no such attention backend: nonsense"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, attention_backend=3), "attention_backend must be a name"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, dtype="bfloat16"), "dtype must be a torch.dtype"),
        ("wan2.1-t2v-1.3b", dict(runtime=0.5, sparse_share=0.2, kv_store=["fp8"]), "1 stores, but the run has 60"),
    ],
)  # fmt: skip
def test_faults_are_one_line(model, options, message):
    with pytest.raises(HeterostepError) as caught:
        plan(model, **options)
    text = str(caught.value)
    assert message in text and "\n" not in text


def test_an_attention_backend_that_is_not_installed_is_one_line():
    with pytest.raises(HeterostepError, match="(?i)sage") as caught:
        plan("wan2.1-t2v-1.3b", runtime=0.5, height=64, width=64, num_frames=5, attention_backend="sage")
    assert "\n" not in str(caught.value)


def test_a_damaged_folder(tmp_path):
    with pytest.raises(HeterostepError, match="model_index.json"):
        plan(tmp_path, runtime=0.5)


def timed(pipe, tokens=48, kind="WanTransformer3DModel", device="some card"):
    points = ((0.25, 0.3), (0.5, 0.6), (1.0, 1.0))
    how = {
        "dtype": "float32",
        "batch": 1,
        "store": "device",
        "sync": "hold",
        "attention_backend": None,
        "compiled": False,
    }
    return timings.Timed(device, timings.identity(kind, dict(pipe.transformer.config)), tokens, points, how)


def test_seconds_come_from_timings(folder):
    pipe = small_wan("wan2.1-t2v")
    options = dict(share=[1.0] * 4 + [0.25, 0.5] * 4, **SMALL)
    for unknown in (None, timed(pipe, tokens=64), timed(small_wan("wan2.1-i2v"))):
        if unknown is not None:
            timings.keep(unknown)
        made = plan(pipe, **options)
        assert (made.seconds, made.dense_seconds, made.device) == (None, None, None)
    timings.keep(timed(pipe))
    for model, dtype in ((pipe, torch.bfloat16), (folder, torch.float32)):
        made = plan(model, dtype=dtype, **options)
        # Two calls in each step.
        assert made.seconds == pytest.approx(2 * (4 * 1.0 + 4 * 0.3 + 4 * 0.6))
        assert made.dense_seconds == pytest.approx(2 * 12 * 1.0)
        assert made.device == "some card"


def test_steps_without_a_call_take_no_seconds():
    pipe = small_wan("wan2.1-t2v")
    timings.keep(timed(pipe))
    made = plan(pipe, **SMALL, share=[1.0] * 4 + [0.0] * 8)
    assert made.seconds == pytest.approx(2 * 4) and made.dense_seconds == pytest.approx(2 * 12)


def test_seconds_are_of_the_present_gpu(monkeypatch):
    pipe = small_wan("wan2.1-t2v")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timings, "device_name", lambda device: "this card")
    monkeypatch.setattr(planning, "_limit", lambda *_: None)
    timings.keep(timed(pipe))
    assert plan(pipe, **SMALL, share=0.55).seconds is None
    timings.keep(timed(pipe, device="this card"))
    timings.keep(timed(pipe, device="another card"))
    assert plan(pipe, **SMALL, share=0.55).device == "this card"


def test_a_plan_is_json(folder):
    for options in (dict(share=0.55), dict(share=0.55, vram=1e-4), dict(share=0.55, vram=1, sparse_share=0.2)):
        made = plan(folder, **SMALL, **options)
        content = json.loads(made.to_json(), parse_constant=pytest.fail)
        assert content == json.loads(json.dumps(made.to_dict())) == json.loads(made.to_json(indent=2))
        assert "\n" not in made.to_json() and "\n" in made.to_json(indent=2)
        assert set(content) == {field.name for field in dataclasses.fields(planning.Plan)}
        assert content["grid"] == [3, 4, 4] and [store["store"] for store in content["stores"]] == list(STORES)
        assert (content["chosen"] is None) is (content["peak_bytes"] is None)


@pytest.mark.parametrize("name", quickly(["wan2.1-t2v-1.3b", "ltx-2"], ["wan2.1-t2v-1.3b"]))
def test_one_of_several_gpus(name):
    options = dict(runtime=0.5, policy="hsa", num_inference_steps=40)
    one, two = plan(name, **options), plan(name, gpus=2, **options)
    assert (one.gpus, two.gpus) == (1, 2) and one.tokens == two.tokens and one.share == two.share
    assert one.weights == two.weights
    for store in ("device", "fp8"):
        assert by_name(two)[store].device_bytes == pytest.approx(by_name(one)[store].device_bytes / 2, rel=0.01)
    assert one.activation_bytes / 2 < two.activation_bytes < one.activation_bytes
    assert json.loads(two.to_json())["gpus"] == 2


def test_gpus_that_cannot_share_a_video():
    with pytest.raises(HeterostepError, match="the 12 heads of WanTransformer3DModel cannot be split over 5 GPUs"):
        plan("wan2.1-t2v-1.3b", gpus=5, runtime=0.5)
    with pytest.raises(HeterostepError, match="gpus must be at least 1"):
        plan("wan2.1-t2v-1.3b", gpus=0, runtime=0.5)


def test_seconds_are_those_of_as_many_gpus(folder):
    pipe = small_wan("wan2.1-t2v")
    identity = timings.identity("WanTransformer3DModel", dict(pipe.transformer.config))
    how = {"dtype": "bfloat16", "batch": 1, "attention_backend": None, "compiled": False}
    timings.keep(timings.Timed("card", identity, 48, ((1.0, 1.0),), how))
    timings.keep(timings.Timed("card", identity, 48, ((1.0, 0.6),), how | {"gpus": 2}))
    assert [plan(folder, gpus=gpus, share=1.0, **SMALL).dense_seconds for gpus in (1, 2)] == [24.0, pytest.approx(14.4)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"height": "480"}, "height must be a number, not '480'"),
        ({"width": 480.5}, "width must be a whole number, not 480.5"),
        ({"num_inference_steps": math.inf}, "num_inference_steps must be a whole number, not inf"),
        ({"guidance_scale": "x"}, "guidance_scale must be a number, not 'x'"),
        ({"gpus": 1.5}, "gpus must be a whole number"),
        ({"height": 10**6, "width": 10**6}, "height x width x frames can be 1,073,741,824 at the most"),
    ],
)
def test_sizes_that_cannot_be_are_one_line_before_anything_is_built(wrong, message, monkeypatch):
    monkeypatch.setattr(planning, "dry_run", lambda *args, **kwargs: pytest.fail("it went on"))
    with pytest.raises(HeterostepError) as caught:
        plan("wan2.1-t2v-1.3b", share=0.5, **wrong)
    assert str(caught.value).startswith(message)


def test_a_file_is_not_taken_for_an_indent(tmp_path):
    with pytest.raises(TypeError):
        plan("wan2.1-t2v-1.3b", share=0.5, **SMALL).to_json(str(tmp_path / "plan.json"))
