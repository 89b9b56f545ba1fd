"""ComfyUI's nodes, on a double of ComfyUI's hooks (`small_comfyui.py`), and in ComfyUI where COMFYUI_PATH names it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import heterostep
import small_comfyui as comfy
from heterostep.engine.trajectory import Trajectory
from heterostep.errors import HeterostepError
from heterostep.kv.cache import Workspace
from heterostep.plan_picture import plan_picture
from small_ltx2 import small_transformer
from small_wan import small_wan

if not comfy.NODE.exists():
    pytest.skip("the nodes are not in this distribution", allow_module_level=True)

NODES = comfy.node_package()
STEPS = 12


def slow(*values):
    """The rest of a table."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipe():
    return small_wan("wan2.1-t2v")


@pytest.fixture(scope="module")
def wan(pipe):
    return comfy.ModelPatcher(comfy.WAN21(comfy.WanModel(pipe.transformer)))


@pytest.fixture(scope="module")
def ltx2():
    torch.manual_seed(0)
    return comfy.ModelPatcher(comfy.LTXAV(comfy.LTXAVModel(small_transformer(False))))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXTS = [random(1, 512, 32, seed=seed) for seed in (1, 2)]
NOISE = random(1, 16, 3, 8, 8)
SOUND = [random(1, 8, 3, 4, 4), random(1, 2, 18, 4)]


def put_on(model, share=0.5, policy="auto", sparse_share=0.0, kv_store="auto", verbose=False):
    """The MODEL with Heterostep."""
    return NODES.Heterostep().apply(model, share, policy, sparse_share, kv_store, verbose)[0]


def sample(model, sampler="euler", noise=None, sigmas=None, cfg=3.0, positive=None, extra=None, **more):
    """Latents, and how often the transformer ran."""
    if noise is None:
        noise = SOUND if isinstance(model.model, comfy.LTXAV) else NOISE
    model.model.diffusion_model.calls = 0
    function = comfy.SAMPLERS.get(sampler, sampler)
    sigmas = comfy.shifted_sigmas(STEPS) if sigmas is None else sigmas
    texts = TEXTS if not isinstance(model.model, comfy.LTXAV) else [random(1, 8, 32, seed=seed) for seed in (1, 2)]
    guider = comfy.CFGGuider(model, positive or [(texts[0], {})], [(texts[1], {})], cfg)
    made = guider.sample(noise, comfy.Sampler(function, **(extra or {})), sigmas, **more)
    return made, model.model.diffusion_model.calls


def same(a, b, within=0.0):
    pairs = zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]
    return all(x.isfinite().all() and (x - y).abs().max() <= within * y.abs().max() for x, y in pairs)


def told(model, second=None):
    """The report of the MODEL's last sampling."""
    return NODES.HeterostepReport().tell({}, model, second)[1]


def account(model):
    return sys.modules["comfyui_heterostep.hooks"].of(model).account


# What it must be equal to


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", slow("heun"), slow("res_2s")])
def test_a_share_of_1_is_the_model_as_it_is(wan, sampler):
    plain, calls = sample(wan, sampler)
    made, as_many = sample(put_on(wan, 1.0), sampler)
    assert same(made, plain) and as_many == calls


@pytest.mark.parametrize("policy", [slow("auto"), "hsa"])
def test_a_share_of_1_of_single_tokens_is_the_model_as_it_is(wan, policy):
    assert same(sample(put_on(wan, 1.0, policy))[0], sample(wan)[0])


def test_ltx2_of_a_share_of_1_is_the_model_as_it_is(ltx2):
    plain, calls = sample(ltx2)
    made, as_many = sample(put_on(ltx2, 1.0))
    assert same(made, plain) and as_many == calls == STEPS


@pytest.mark.parametrize(
    "options",
    [{"share": 0.5}, slow({"share": 0.25}), {"share": 0.5, "sparse_share": 0.5}, slow({"share": 0.4, "policy": "hsa"})],
    ids=["half", "quarter", "tokens", "hsa"],
)
def test_it_is_what_diffusers_makes(pipe, wan, options):
    """The same weights, noise and noise levels, on either side."""
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    size = {"height": 64, "width": 64, "num_frames": 9, "output_type": "latent", "num_inference_steps": STEPS}
    texts = {"prompt_embeds": TEXTS[0], "negative_prompt_embeds": TEXTS[1]}
    with heterostep.enabled(pipe, **options):
        theirs = pipe(**texts, latents=NOISE.clone(), guidance_scale=3.0, **size).frames
        report = heterostep.report(pipe)
    model = put_on(wan, **options)
    ours, _ = sample(model, sigmas=pipe.scheduler.sigmas.clone())
    assert account(model).report.active_share == report.active_share
    assert same(ours, theirs, 1e-4)


def test_two_experts_are_what_diffusers_makes_of_the_same_steps():
    """Wan 2.2 A14B: two MODELs in two samplers, each with a part of the steps; diffusers runs both in one."""
    pipe = small_wan("wan2.2-t2v")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe.scheduler.set_timesteps(STEPS)
    sigmas = pipe.scheduler.sigmas.clone()
    first = int((sigmas >= 0.875).sum())
    assert 2 < first < STEPS - 2
    experts = (pipe.transformer, pipe.transformer_2)
    models = [put_on(comfy.ModelPatcher(comfy.WAN21(comfy.WanModel(each)))) for each in experts]
    high, calls = sample(models[0], sigmas=sigmas[: first + 1])
    assert calls == first // 2
    # The second goes on with what noise is left.
    begin = sigmas[first]
    low, calls = sample(models[1], noise=high * (1 - begin) / begin, sigmas=sigmas[first:])
    assert calls == (STEPS - first) // 2
    shares = [share for model in models for share in account(model).report.active_share]
    texts = {"prompt_embeds": TEXTS[0], "negative_prompt_embeds": TEXTS[1]}
    size = {"height": 64, "width": 64, "num_frames": 9, "output_type": "latent", "num_inference_steps": STEPS}
    with heterostep.enabled(pipe, share=shares):
        theirs = pipe(**texts, latents=NOISE.clone(), guidance_scale=3.0, guidance_scale_2=3.0, **size).frames
    assert same(low, theirs, 1e-3)
    text = told(*models)
    assert text.count("0.5 asked") == 2 and f"{first} steps" in text and f"{STEPS - first} steps" in text
    assert "little to leave out" not in text


@pytest.mark.parametrize("per_frame", [False, True])
def test_all_tokens_as_active_ones_are_a_dense_call(pipe, wan, per_frame):
    """In another order, through the hooks on blocks and attention."""
    tokens = sys.modules["comfyui_heterostep.tokens"].WanTokens(wan.model, NOISE.shape)
    model = wan.model.diffusion_model
    times = random(2, 3, seed=5).abs() * 900 if per_frame else torch.tensor([700.0, 700.0])
    x, text, options = random(2, 16, 3, 8, 8, seed=4), torch.cat(TEXTS), {}

    def call(x, times, text, options):
        return model(x, times, text, transformer_options=options)

    class Wanted:
        """A generation in which K and V are wanted."""

        total, stores, workspace = tokens.grid.num_tokens, None, Workspace()
        branches, config = [None], heterostep.HSAConfig(share=0.5)
        kv_store, store_names = "none", ()

        def wants_kv(self, drift):
            return True

        def note_kv(self):
            pass

    generation, branch = Wanted(), type("Branch", (), {})()
    plain = call(x, times, text, options)
    given = (lambda *args, **named: call(*args, **named), (x, times, text, options), {}, options)
    dense = tokens.call(*given, generation, ("a",), [branch], None)
    order = torch.randperm(generation.total, generator=torch.Generator().manual_seed(1))[None].expand(2, -1)
    model.rows = []
    sparse = tokens.call(*given, generation, ("a",), [branch], order)
    few = tokens.call(*given, generation, ("a",), [branch], order[:, :5])
    assert same(dense, plain) and same(sparse, plain, 1e-5)
    assert model.rows[-1] == 5 and (tokens.rows(few, 1)[0][:, order[0, 5:]] != 0).any()
    kept = tokens.rows(few, 1)[0].gather(1, order[:, :5, None].expand(-1, -1, 64))
    assert same(kept, tokens.rows(plain, 1)[0].gather(1, order[:, :5, None].expand(-1, -1, 64)), 1e-5)


# What it saves, and for whom


def test_half_of_the_calls_are_saved(wan, ltx2):
    for model in (wan, ltx2):
        plain, calls = sample(model)
        made, fewer = sample(put_on(model))
        assert (calls, fewer) == (STEPS, STEPS // 2) and not same(made, plain)


def test_the_model_that_came_in_is_as_it_was(wan):
    before = sample(wan)[0]
    put_on(wan)
    assert wan.wrappers == {} and wan.model_options == {"transformer_options": {}}
    assert same(sample(wan)[0], before)


def test_each_run_is_the_first(wan):
    model = put_on(wan)
    once = sample(model)[0]
    sample(model, noise=random(2, 16, 3, 10, 8, seed=3))
    assert same(sample(model)[0], once)


def test_heterostep_behind_heterostep_takes_its_place(wan):
    model = put_on(put_on(wan, 0.25), 0.75)
    assert sample(model)[1] == 9


def test_clones_have_runs_of_their_own(wan):
    """A run inside of another's, of a clone: as nodes that sample in a sampler do."""
    model = put_on(wan)
    alone = sample(model)[0]
    inner = []

    def callback(step, denoised, x, total):
        if step == 4:
            inner.append(sample(model.clone(), noise=random(1, 16, 3, 8, 8, seed=9))[0])

    assert same(sample(model, callback=callback)[0], alone)
    assert same(inner[0], sample(model, noise=random(1, 16, 3, 8, 8, seed=9))[0])


@pytest.mark.slow
def test_what_is_in_one_call_is_memorys_choice(wan):
    together = sample(put_on(wan))[0]
    tokens = sample(put_on(wan, sparse_share=0.5))[0]
    turns = iter([2, 1, 1, 2, 1, 2] * 20)
    try:
        for choice in (1, lambda: next(turns)):
            wan.model.together = choice
            assert same(sample(put_on(wan))[0], together, 1e-4)
        wan.model.together = 1
        assert same(sample(put_on(wan, sparse_share=0.5))[0], tokens, 1e-4)
        wan.model.together = lambda: next(turns)
        assert sample(put_on(wan, sparse_share=0.5))[0].isfinite().all()
    finally:
        wan.model.together = 2


@pytest.mark.parametrize("sparse_share", [slow(0.0), 0.5])
def test_samples_of_a_batch_are_as_alone(wan, sparse_share):
    noise = torch.cat([NOISE, NOISE])
    made, _ = sample(put_on(wan, sparse_share=sparse_share), noise=noise)
    alone, _ = sample(put_on(wan, sparse_share=sparse_share))
    assert same(made[:1], alone, 1e-3) and same(made[1:], alone, 1e-3)


def test_without_guidance_there_is_one_call_of_one(wan):
    plain, _ = sample(wan, cfg=1)
    assert same(sample(put_on(wan, 1.0), cfg=1)[0], plain)
    assert sample(put_on(wan), cfg=1)[1] == 6


def test_sizes_that_are_no_multiple_of_a_patch(wan):
    noise = random(1, 16, 3, 7, 9)
    assert same(sample(put_on(wan, 1.0, "hsa"), noise=noise)[0], sample(wan, noise=noise)[0])
    assert sample(put_on(wan, sparse_share=0.5), noise=noise)[0].shape == noise.shape


def test_a_conditioning_that_comes_later_is_evaluated_when_it_does(wan):
    """A prompt for a range of the steps."""
    positive = [(TEXTS[0], {"end": 0.5}), (TEXTS[1], {"start": 0.4999})]
    plain, _ = sample(wan, positive=positive)
    assert same(sample(put_on(wan, 1.0), positive=positive)[0], plain)
    made, calls = sample(put_on(wan), positive=positive)
    # It takes no velocity from another prompt.
    assert made.isfinite().all() and calls >= 6


def test_no_line_goes_from_one_prompt_to_another(wan, monkeypatch):
    """Where a prompt takes over at a step of single tokens, the gap is not corrected."""
    restarts, restart = [], Trajectory.restart
    monkeypatch.setattr(Trajectory, "restart", lambda trajectory: (restarts.append(trajectory), restart(trajectory)))
    model = put_on(wan, sparse_share=0.5)
    sample(model)
    once = len(restarts)
    sample(model, positive=[(TEXTS[0], {"end": 0.5}), (TEXTS[1], {"start": 0.4999})])
    assert len(restarts) == 2 * once + 1


def test_a_given_frame_is_known_before_anything_changes(wan):
    """With half of four steps: the first two from a text alone, the first and the third from a frame."""
    half = put_on(wan)
    frame = {"concat_latent_image": torch.zeros(1, 4, 3, 8, 8)}
    for options, evaluated in (({}, [1, 1, 0, 0]), (frame, [1, 0, 1, 0])):
        sample(half, sigmas=comfy.shifted_sigmas(4), cfg=1.0, positive=[(TEXTS[0], options)])
        assert account(half).report.active_share == evaluated


def test_given_frames_do_not_count(pipe):
    """Image-to-video of Wan 2.2 5B: the first frame is given, by a mask and by its noise level."""
    model = comfy.ModelPatcher(comfy.WAN22(comfy.WanModel(pipe.transformer)))
    mask = torch.ones(1, 1, 3, 8, 8)
    mask[:, :, 0] = 0
    plain, _ = sample(model, mask=mask)
    assert same(sample(put_on(model, 1.0), mask=mask)[0], plain)
    assert same(sample(put_on(model, 1.0, "hsa"), mask=mask)[0], plain)
    whole, tokens = put_on(model), put_on(model, sparse_share=0.5)
    assert (sample(whole, mask=mask)[0][:, :, 0] == 0).all() and sample(tokens, mask=mask)[0].isfinite().all()
    assert account(whole).changes != () and all(value > 0 for _, value in account(whole).changes)
    # Tokens that are given are never chosen alone.
    steps = account(tokens).report.steps_map
    assert steps[0].max() == (np.array(account(tokens).report.active_share) == 1).sum() < steps[1:].max()


@pytest.mark.parametrize("sampler", [slow("heun"), "res_2s"])
def test_more_predictions_a_step_share_its_fate(wan, sampler):
    calls = sample(wan, sampler)[1]
    model = put_on(wan)
    made, fewer = sample(model, sampler)
    assert made.isfinite().all() and abs(fewer - calls / 2) <= 1
    assert f"{fewer} made, {calls - fewer} extrapolated" in told(model)


@pytest.mark.parametrize("restarts", [True, slow(False)])
def test_a_sampler_with_noise_levels_of_its_own_is_left_alone(wan, restarts, caplog):
    sampler, extra = (comfy.sample_restart, {}) if restarts else ("euler", {"s_churn": 0.2})
    model = put_on(wan)
    sample(model, sampler, extra=extra)
    assert "does not keep to the schedule's noise levels" in caplog.text + told(model)
    made, calls = sample(put_on(wan, 1.0), sampler, extra=extra)
    assert same(made, sample(wan, sampler, extra=extra)[0])
    if not restarts:
        assert sample(model, sampler, extra=extra)[1] == calls == STEPS


# A run's life


def left(model):
    """What a run has left on a MODEL."""
    return [key for key in model.model_options["transformer_options"] if "heterostep" in key]


@pytest.mark.parametrize(
    ("where", "sparse_share"), [("callback", 0.0), slow("callback", 0.5), slow("model", 0.0), ("model", 0.5)]
)
def test_nothing_is_left_of_a_cancelled_run(wan, where, sparse_share):
    model = put_on(wan, sparse_share=sparse_share)
    once = sample(model)[0]

    def cancel(*args):
        if where == "callback" and args[0] == 5 or where == "model" and wan.model.diffusion_model.calls == 4:
            raise KeyboardInterrupt

    hook = wan.model.diffusion_model.blocks[0].register_forward_hook(cancel) if where == "model" else None
    with pytest.raises(KeyboardInterrupt):
        sample(model, callback=cancel if where == "callback" else None)
    if hook is not None:
        hook.remove()
    assert not left(model) and "it was stopped after" in told(model)
    assert same(sample(model)[0], once)
    assert "stopped" not in told(model)


def test_a_preview_shows_what_was_predicted(wan):
    """Where a gap is corrected, the sampler is given another prediction for its step; it is none to look at."""
    seen = []

    def callback(step, denoised, x, total):
        seen.append((step, denoised, x, total))

    sample(put_on(wan), callback=callback)
    assert [each[0] for each in seen] == list(range(STEPS)) and {each[3] for each in seen} == {STEPS}
    sizes = [float(denoised.abs().max()) for _, denoised, _, _ in seen]
    assert max(sizes) < 5 * min(sizes)


def test_progress_is_told(wan, caplog):
    lines = []
    hooks = sys.modules["comfyui_heterostep.hooks"].Hooks(heterostep.HSAConfig(share=0.5), True, lines.append)
    with caplog.at_level("INFO", "heterostep"):
        sample(hooks.put_on(wan))
    assert lines[0] == "step 1 of 12: evaluated" and "step 12 of 12: extrapolated" in lines and len(lines) == STEPS
    assert "step 3 of 12" in caplog.text and "6 evaluated, 6 extrapolated" in caplog.text


def test_hooks_of_others_are_called_as_before(wan):
    """Replaced blocks, an attention of one's own, a wrapper around the transformer."""
    seen = {"block": 0, "attention": 0, "wrapper": 0}

    def block(args, extra):
        seen["block"] += 1
        return extra["original_block"](args)

    def attention(function, *args, **named):
        seen["attention"] += 1
        return function(*args, **named)

    def wrapper(executor, *args, **kwargs):
        seen["wrapper"] += 1
        return executor(*args, **kwargs)

    theirs = wan.clone()
    options = theirs.model_options["transformer_options"]
    options["patches_replace"] = {"dit": {("double_block", 1): block}, "other": {}}
    options["optimized_attention_override"] = attention
    theirs.add_wrapper_with_key("diffusion_model", "theirs", wrapper)
    made, calls = sample(put_on(theirs, sparse_share=0.5))
    assert same(made, sample(put_on(wan, sparse_share=0.5))[0])
    assert seen == {"block": calls, "attention": 6 * calls, "wrapper": STEPS} and calls < STEPS
    assert set(options["patches_replace"]["dit"]) == {("double_block", 1)}


# What is told


def test_the_report(wan):
    model = put_on(wan, sparse_share=0.5)
    sample(model)
    latent, text, plan, steps = NODES.HeterostepReport().tell({"samples": NOISE}, model)
    assert latent["samples"] is NOISE
    assert "WAN21, euler, 12 steps" in text and "0.5 asked, 0.5 spent" in text and "with some of the tokens" in text
    assert plan.shape == (1, 320, 960, 3) and plan.min() >= 0 and plan.max() <= 1
    assert steps.shape == (3, 64, 64, 3) and steps.unique().numel() > 2
    _, text, plan, _ = NODES.HeterostepReport().tell({}, model, model)
    assert text.count("WAN21") == 2 and plan.shape == (1, 640, 960, 3)


def test_the_picture_of_a_plan():
    """Blue where a step is evaluated, light grey where not, nothing where it was not made."""
    picture = plan_picture([1, 1, 0, 0.5], (1.0, 0.9, 0.7, 0.4, 0.2, 0.0), [(1, 0.3)])
    blue, light, grey = ((picture == colour).all(-1) for colour in ((51, 102, 170), (143, 179, 221), (227, 227, 227)))
    assert picture.dtype == np.uint8 and blue.sum() > light.sum() > 0 and grey.sum() > 0
    columns = np.flatnonzero(blue[200])
    assert columns.max() < 960 * 0.45


# What is refused


def test_options_that_do_not_go_together_are_refused(wan):
    with pytest.raises(HeterostepError, match="sparse_share belongs to policy='auto'"):
        put_on(wan, policy="hsa", sparse_share=0.5)
    with pytest.raises(HeterostepError, match="below the lowest possible"):
        sample(put_on(wan, 0.05))


def test_models_that_predict_noise_are_refused(wan):
    model = comfy.ModelPatcher(comfy.BaseModel(wan.model.diffusion_model))
    model.model.model_sampling = comfy.EPS()
    with pytest.raises(HeterostepError, match="no flow-matching model"):
        put_on(model)


def test_single_tokens_run_through_wan_alone(ltx2):
    with pytest.raises(HeterostepError, match="not through LTXAVModel: evaluate whole steps"):
        sample(put_on(ltx2, sparse_share=0.5))
    assert sample(put_on(ltx2))[1] == 6


@pytest.mark.parametrize("place", ["options", "wrappers"])
def test_two_that_skip_are_refused(wan, place):
    model = wan.clone()
    if place == "options":
        model.model_options["transformer_options"]["rel_teacache_holder"] = object()
    else:
        model.add_wrapper_with_key(
            "outer_sample", "EasyCache", lambda executor, *args, **kwargs: executor(*args, **kwargs)
        )
    with pytest.raises(HeterostepError, match="cache skips steps on this MODEL too"):
        sample(put_on(model))


def test_noise_levels_that_do_not_fall_are_refused(wan):
    with pytest.raises(HeterostepError, match="must fall"):
        sample(put_on(wan), sigmas=torch.tensor([1.0, 0.8, 0.8, 0.0]))


def test_a_report_of_nothing_is_refused(wan):
    with pytest.raises(HeterostepError, match="wants the MODEL that comes out of Heterostep"):
        told(wan)
    with pytest.raises(HeterostepError, match="nothing to report"):
        told(put_on(wan))


# The package


@pytest.mark.slow
def test_whole_steps_do_without_diffusers():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import small_comfyui; small_comfyui.node_package(); "
        "from comfyui_heterostep import account, run; print('diffusers' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert out.stdout.split() == ["False"]


def test_the_registrys_fields():
    tomllib = pytest.importorskip("tomllib")
    package = tomllib.loads((comfy.NODE / "pyproject.toml").read_text())
    project, listed = package["project"], package["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{1,98}", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"]) and project["license"] == {"file": "LICENSE"}
    assert "GNU GENERAL PUBLIC LICENSE" in (comfy.NODE / "LICENSE").read_text()
    assert {"PublisherId", "DisplayName", "Icon"} <= set(listed) and "Repository" in project["urls"]
    assert project["dependencies"] == (comfy.NODE / "requirements.txt").read_text().split()
    with Image.open(comfy.NODE / "icon.png") as icon:
        assert icon.width <= 800 and icon.height <= 400
    for name, node in NODES.NODE_CLASS_MAPPINGS.items():
        assert name in NODES.NODE_DISPLAY_NAME_MAPPINGS and callable(getattr(node, node.FUNCTION)) and node.DESCRIPTION
        fields = [each for kind in ("required", "optional") for each in node.INPUT_TYPES().get(kind, {}).values()]
        assert all(each[1]["tooltip"] for each in fields if each[0] != "MODEL" or len(each) > 1)


@pytest.mark.parametrize("file", sorted(path.name for path in (comfy.NODE / "workflows").glob("*.json")))
def test_workflows_fit_the_nodes(file):
    """Links meet slots of their kind, fields are the node's own and within its bounds."""
    graph = json.loads((comfy.NODE / "workflows" / file).read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    for number, source, output, target, place, kind in graph["links"]:
        assert number in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][place]["link"] == number
        assert kind in (nodes[source]["outputs"][output]["type"], "*")
    ours = [node for node in nodes.values() if node["type"].startswith("Heterostep")]
    assert len(ours) == (4 if "a14b" in file else 2) - ("a14b" in file)
    for node in ours:
        declared = NODES.NODE_CLASS_MAPPINGS[node["type"]]
        required, optional = declared.INPUT_TYPES()["required"], declared.INPUT_TYPES().get("optional", {})
        slots = [(name, each[0]) for name, each in {**required, **optional}.items() if each[0] in ("MODEL", "LATENT")]
        assert [(each["name"], each["type"]) for each in node["inputs"]] == slots
        assert [each["type"] for each in node["outputs"]] == list(declared.RETURN_TYPES)
        fields = [each for each in required.values() if each[0] not in ("MODEL", "LATENT")]
        for value, (kind, bounds) in zip(node["widgets_values"], fields, strict=True):
            assert value in kind if isinstance(kind, list) else bounds.get("min", 0) <= value <= bounds.get("max", 1)


@pytest.mark.slow
@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no checkout of ComfyUI")
def test_in_comfyui():
    """The nodes loaded by ComfyUI itself, in its own samplers, on models of its own with small random weights."""
    script = Path(__file__).with_name("comfyui_real.py")
    out = subprocess.run([sys.executable, script, os.environ["COMFYUI_PATH"]], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    found = json.loads(out.stdout)
    assert all(away < 1e-4 for away in found["diffusers"].values()), found["diffusers"]
    runs = {**found["samplers"], "fp8": found["fp8"]["euler simple"]}
    moving = found["parts"].pop("standard_uniform")
    # Where a window has moved, it is evaluated.
    assert moving["exact"] and moving["finite"] and moving["calls"] / 2 < moving["calls at half"] < moving["calls"]
    runs |= found["parts"]
    if found["ltx2"] is not None:
        assert found["ltx2"].pop("shapes") == [[1, 128, 3, 4, 4], [1, 8, 18, 16]]
        assert "not through LTXAVModel" in found["ltx2"].pop("tokens")
        runs |= {f"LTX-2 {name}": each for name, each in found["ltx2"].items()}
    for name, each in runs.items():
        assert each["exact"] and each["finite"], name
        gave_up = "does not keep to the schedule" in each["report"]
        assert gave_up == name.startswith("heunpp2"), name
        assert gave_up or each["calls at half"] * 2 <= each["calls"] + 1, name
    assert found["experts"]["exact"] and found["experts"]["calls at half"] == 6
    assert found["stopped"]["cancelled"] and not found["stopped"]["left"] and found["stopped"]["again"] == 0
    for order in ("lora before", "lora behind"):
        assert found[order] == {"exact": True, "changes": True}
