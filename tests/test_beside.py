"""How pipelines are used in services: other precisions, backends, batches, threads, parts that are freed or swapped."""

import copy
import threading

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
from peft import LoraConfig
from torch.nn.functional import scaled_dot_product_attention

import heterostep
from heterostep.errors import HeterostepError
from rows import ROWS, equal, transformers

STEPS = 8
WHOLE, SINGLE = {"share": 0.5}, {"share": 0.6, "sparse_share": 0.4}
FAMILIES = ("wan2.1-t2v", "wan2.1-vace", "wan2.2-i2v", "ltx2.3-t2v", "ltx0.9-t2v", "hunyuan1.5-t2v")
QUICK = ("wan2.1-t2v", "ltx0.9-t2v")


@pytest.fixture(params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def row(request):
    return ROWS[request.param]


def shown_to_work(row, pipe, **options):
    """Bit-identical with nothing skipped, before and after; sparse runs, of whole steps and not, can be repeated."""
    plain = row.run(pipe, steps=4, **options)
    with heterostep.enabled(pipe, share=1.0):
        assert equal(row.run(pipe, steps=4, **options), plain)
    for how in (WHOLE, SINGLE):
        with heterostep.enabled(pipe, **how):
            sparse = row.run(pipe, steps=STEPS, **options)
            assert heterostep.report(pipe).finished
            assert equal(row.run(pipe, steps=STEPS, **options), sparse)
    assert equal(row.run(pipe, steps=4, **options), plain)
    return sparse


def test_float16(row):
    shown_to_work(row, row.build().to(torch.float16))


# What is computed and no part of saved weights: `to(float16)` rounds it, `from_pretrained` makes it anew in float32.
ROTARY = ("sliding_attention_inv_freq", "full_attention_inv_freq")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ltx2.0-t2v", pytest.param("ltx2.3-i2v", marks=pytest.mark.slow)])
def test_saving_and_loading_in_float16_changes_the_prompt_and_nothing_else(name, tmp_path):
    """LTX-2 differs before and after, at any share: its text encoder's rotary tables do. With those, nothing does."""
    row = ROWS[name]
    pipe = row.build().to(torch.float16)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, torch_dtype=torch.float16)
    loaded.set_progress_bar_config(disable=True)
    assert not equal(row.run(pipe, steps=STEPS), row.run(loaded, steps=STEPS))
    tables = dict(pipe.text_encoder.named_buffers())
    with torch.no_grad():
        for key, buffer in loaded.text_encoder.named_buffers():
            if key.endswith(ROTARY):
                buffer.copy_(tables[key])
    for options in ({"share": 1.0}, WHOLE, SINGLE):
        with heterostep.enabled(pipe, **options), heterostep.enabled(loaded, **options):
            assert equal(row.run(pipe, steps=STEPS), row.run(loaded, steps=STEPS))


@pytest.mark.parametrize("options", [pytest.param(WHOLE, marks=pytest.mark.slow), SINGLE], ids=["whole", "single"])
def test_a_lora_on_nearly_all_modules_of_vace_put_on_after_enable(options):
    row = ROWS["wan2.1-vace"]
    pipe = row.build()
    plain = row.run(pipe, steps=STEPS)
    leaves = (torch.nn.Linear, torch.nn.Conv3d)
    names = [name for name, module in pipe.transformer.named_modules() if isinstance(module, leaves)]
    config = LoraConfig(r=2, target_modules=names, exclude_modules=r".*blocks\.1\.attn1\..*", init_lora_weights=False)

    def put_on():
        torch.manual_seed(5)
        pipe.transformer.add_adapter(config, "style")

    with heterostep.enabled(pipe, **options):
        row.run(pipe, steps=STEPS)
        put_on()
        assert "vace_patch_embedding.lora_A.style.weight" in dict(pipe.transformer.named_parameters())
        after = row.run(pipe, steps=STEPS)
    styled = row.run(pipe, steps=STEPS)
    assert not equal(styled, plain)
    with heterostep.enabled(pipe, **options):
        assert equal(row.run(pipe, steps=STEPS), after)
    with heterostep.enabled(pipe, share=1.0):
        assert equal(row.run(pipe, steps=STEPS), styled)


BACKENDS = ("native", "_native_math", pytest.param("flex", marks=pytest.mark.slow))


# flex is not compiled here, and says so.
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_backends_of_a_cpu(row, backend, monkeypatch):
    """Each is asked in sparse calls as in dense ones."""
    pipe, calls = row.build(), []
    name = AttentionBackendName(backend)
    original = registry._backends[name]

    def spy(query, key, *args, **kwargs):
        calls.append((query.shape[1], key.shape[1]))
        return original(query, key, *args, **kwargs)

    monkeypatch.setitem(registry._backends, name, spy)
    for model in transformers(pipe):
        model.set_attention_backend(backend)
    shown_to_work(row, pipe)
    assert any(queries < keys for queries, keys in calls if keys >= 48)


# They are for GPUs. What stands for them takes what they take, and fails without data as they do.
STAND_INS = ("sage", "flash", "_flash_3", "xformers")


def _stand_in(query, key, value, attn_mask=None, **kwargs):
    if query.is_meta:
        raise TypeError("no kernel for this device")
    _stand_in.calls.append((query.shape[1], key.shape[1]))
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=attn_mask)
    return out.transpose(1, 2)


@pytest.mark.parametrize("backend", STAND_INS)
def test_attention_backends_of_a_gpu_by_name(backend, monkeypatch, caplog):
    row, name = ROWS["wan2.1-t2v"], AttentionBackendName(backend)
    pipe = row.build()
    _stand_in.calls = []
    monkeypatch.setitem(registry._backends, name, _stand_in)
    monkeypatch.setitem(registry._constraints, name, [])
    monkeypatch.setitem(registry._supported_arg_names, name, {"query", "key", "value", "attn_mask"})
    monkeypatch.setattr("diffusers.models.attention_dispatch._check_attention_backend_requirements", lambda name: None)
    # As where memory decides between stores.
    monkeypatch.setattr("heterostep.engine.forecast.room_on", lambda *args: 10**9)
    pipe.transformer.set_attention_backend(backend)
    with caplog.at_level("WARNING", "heterostep"):
        shown_to_work(row, pipe)
    assert any(queries < keys == 48 for queries, keys in _stand_in.calls)
    assert "memory cannot be forecast (no kernel for this device)" in caplog.text


@pytest.mark.parametrize("backend", STAND_INS)
def test_a_backend_that_is_missing_is_told_by_diffusers(backend):
    row = ROWS["wan2.1-t2v"]
    pipe = row.build()
    try:
        pipe.transformer.set_attention_backend(backend)
    except Exception as error:
        expected = error
    else:
        pytest.skip(f"{backend} is installed")
    plain = row.run(pipe, steps=4)
    with heterostep.enabled(pipe, **SINGLE):
        with pytest.raises(type(expected)) as told:
            pipe.transformer.set_attention_backend(backend)
        assert str(told.value) == str(expected)
        row.run(pipe, steps=STEPS)
    assert equal(row.run(pipe, steps=4), plain)


def test_a_backend_that_fails_in_the_run_fails_as_it_does_without(monkeypatch):
    """cuDNN's attention wants a GPU, which shows when it is called."""
    row = ROWS["wan2.1-t2v"]
    pipe = row.build()
    before = row.run(pipe, steps=4)
    pipe.transformer.set_attention_backend("_native_cudnn")
    with pytest.raises(RuntimeError) as plain:
        row.run(pipe, steps=4)
    heterostep.enable(pipe, **SINGLE)
    with pytest.raises(RuntimeError) as ours:
        row.run(pipe, steps=STEPS)
    assert str(ours.value) == str(plain.value)
    pipe.transformer.set_attention_backend("native")
    row.run(pipe, steps=STEPS)
    heterostep.disable(pipe)
    assert equal(row.run(pipe, steps=4), before)


def test_several_videos_of_a_prompt_each_with_its_generator(row):
    def go(pipe, steps, seeds, **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return row.run(_Seeded(pipe, generators), steps=steps, num_videos_per_prompt=len(seeds), **options)

    pipe = row.build()
    if type(pipe).__name__ in ("WanVACEPipeline", "HunyuanVideo15Pipeline"):
        pytest.skip("diffusers makes one video of a prompt with this pipeline")
    plain = go(pipe, 4, (1, 2))
    assert plain[0].shape[0] == 2
    with heterostep.enabled(pipe, share=1.0):
        assert equal(go(pipe, 4, (1, 2)), plain)
    with heterostep.enabled(pipe, **WHOLE):
        both = go(pipe, STEPS, (1, 2))
        assert heterostep.report(pipe).share.achieved == pytest.approx(0.5)
    with heterostep.enabled(pipe, **SINGLE):
        single = go(pipe, STEPS, (1, 2))
        assert equal(go(pipe, STEPS, (1, 2)), single)
        # A generation of another size in between leaves nothing behind.
        row.run(pipe, steps=STEPS)
        assert equal(go(pipe, STEPS, (1, 2)), single)
    assert not torch.equal(both[0][0], both[0][1]) and equal(go(pipe, 4, (1, 2)), plain)


class _Seeded:
    """A pipeline whose calls get these generators in place of one."""

    def __init__(self, pipe, generators):
        self._pipe, self._generators = pipe, generators

    def __getattr__(self, name):
        return getattr(self._pipe, name)

    def __call__(self, generator=None, **options):
        return self._pipe(generator=self._generators, **options)


def _encoded(pipe):
    """What a call takes in place of a prompt."""
    options = {"do_classifier_free_guidance": True, "max_sequence_length": 16}
    kind = type(pipe).__name__
    with torch.no_grad():
        if kind.startswith("Hunyuan"):
            names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
            asked = dict(zip(names, pipe.encode_prompt('a red circle moving right over "stop"')))
            without = dict(zip(names, pipe.encode_prompt("")))
            return asked | {f"negative_{name}": value for name, value in without.items()}
        if kind.startswith("Wan"):
            asked, without = pipe.encode_prompt("a red circle moving right", device="cpu", max_sequence_length=512)
            return {"prompt_embeds": asked, "negative_prompt_embeds": without}
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        return dict(zip(names, pipe.encode_prompt("a red circle moving right", negative_prompt="", **options)))


def test_text_encoders_that_were_freed(row):
    pipe = row.build()
    with heterostep.enabled(pipe, **SINGLE):
        expected = row.run(pipe, steps=STEPS)
    given = _encoded(pipe)
    pipe.text_encoder = pipe.tokenizer = None
    if hasattr(pipe, "text_encoder_2"):
        pipe.text_encoder_2 = pipe.tokenizer_2 = None
    assert equal(shown_to_work(row, pipe, prompt=None, **given), expected)


@pytest.mark.parametrize("options", [WHOLE, SINGLE], ids=["whole", "single"])
def test_a_server_with_two_threads_and_two_pipelines(options):
    """Each of its own family and model, both enabled, at the same time."""
    names = ("wan2.1-t2v", "ltx0.9-t2v")
    pipes = {name: ROWS[name].build() for name in names}
    for pipe in pipes.values():
        heterostep.enable(pipe, **options)
    expected = {(name, seed): ROWS[name].run(pipes[name], steps=STEPS, seed=seed) for name in names for seed in (1, 2)}
    made, together = {}, threading.Barrier(2)

    def serve(name):
        for seed in (1, 2, 1):
            together.wait(60)
            made[name, seed] = ROWS[name].run(pipes[name], steps=STEPS, seed=seed)

    threads = [threading.Thread(target=serve, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.keys() == expected.keys() and all(equal(made[key], expected[key]) for key in made)
    assert all(heterostep.report(pipe).finished for pipe in pipes.values())


@pytest.mark.parametrize("options", [pytest.param(WHOLE, marks=pytest.mark.slow), SINGLE], ids=["whole", "single"])
def test_components_swapped_between_runs(row, options):
    """A scheduler is followed, an autoencoder is none of our business, a transformer wants `enable` again."""
    pipe, other = row.build(), row.build()
    with torch.no_grad():
        for model in transformers(other):
            model.proj_out.weight.mul_(1.1)
    plain = row.run(pipe, steps=STEPS)
    heterostep.enable(pipe, **options)
    sparse = row.run(pipe, steps=STEPS)

    scheduler, pipe.scheduler = pipe.scheduler, copy.deepcopy(pipe.scheduler)
    assert equal(row.run(pipe, steps=STEPS), sparse)
    if isinstance(scheduler, UniPCMultistepScheduler):
        pipe.scheduler = UniPCMultistepScheduler.from_config(scheduler.config, flow_shift=6.0)
        assert not equal(row.run(pipe, steps=STEPS), sparse)
    pipe.scheduler = scheduler
    assert "step" not in vars(scheduler) and equal(row.run(pipe, steps=STEPS), sparse)

    pipe.vae = other.vae
    assert equal(row.run(pipe, steps=STEPS), sparse)

    names = [name for name in ("transformer", "transformer_2") if getattr(pipe, name, None) is not None]
    first = {name: getattr(pipe, name) for name in names}
    for name in names:
        setattr(pipe, name, getattr(other, name))
    others = row.run(other, steps=STEPS)
    assert not equal(others, plain)
    with pytest.raises(HeterostepError, match="replaced .* call heterostep.enable again"):
        row.run(pipe, steps=STEPS)
    heterostep.enable(pipe, **options)
    assert not equal(row.run(pipe, steps=STEPS), sparse)
    assert not any("forward" in vars(model) for model in first.values())
    heterostep.disable(pipe)
    assert equal(row.run(pipe, steps=STEPS), others)
    for name, model in first.items():
        setattr(pipe, name, model)
    assert equal(row.run(pipe, steps=STEPS), plain)
    with heterostep.enabled(pipe, **options):
        assert equal(row.run(pipe, steps=STEPS), sparse)
