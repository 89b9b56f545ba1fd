import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image

import heterostep
from heterostep import cli, making, tiny
from heterostep.checkpoints import kv_cache_bytes
from heterostep.models import known_checkpoints
from heterostep.pipeline import disable
from heterostep.video import read_video
from rows import quickly
from small import run, small_pipeline
from small_ltx2 import small_ltx2
from small_wan import small_wan

PROMPT = "a red circle moving right"
SMALL = ["--steps", "12", "--frames", "9", "--height", "64", "--width", "64", "--device", "cpu"]


@pytest.fixture
def pipes(monkeypatch, tmp_path):
    """The small pipeline in place of the bundled one, and an empty working directory; the list of loaded pipelines."""
    loaded = []

    def load(image_to_video=False):
        loaded.append(small_pipeline(image_to_video))
        return loaded[-1]

    monkeypatch.setattr(tiny, "load", load)
    monkeypatch.chdir(tmp_path)
    return loaded


@pytest.fixture
def no_model(monkeypatch, tmp_path):
    """Faults that need no model must be found before one is loaded."""

    def load(image_to_video=False):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(tiny, "load", load)
    monkeypatch.chdir(tmp_path)


def files():
    return sorted(path.name for path in Path().iterdir())


def fails(capsys, *arguments, code=2, command="generate"):
    """The one line on stderr of a run that fails and leaves no file."""
    before = files()
    assert cli.main([command, PROMPT, *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and files() == before
    assert err.startswith("heterostep: ") and err.endswith("\n")
    return err


def only_line(err):
    assert err.count("\n") == 1, err
    return err


def test_a_video_that_is_there_is_kept_where_no_name_was_given(pipes, capsys):
    for name in ("video.mp4", "video-2.mp4"):
        Path(name).write_bytes(b"mine")
    assert cli.main(["generate", PROMPT, *SMALL]) == 0
    assert "video-3.mp4" in capsys.readouterr().out and files() == ["video-2.mp4", "video-3.mp4", "video.mp4"]
    assert Path("video.mp4").read_bytes() == Path("video-2.mp4").read_bytes() == b"mine"


@pytest.mark.parametrize("dial", [[], ["--share", "0.75"], ["--dense"], ["--share", "0.75", "--solver", "euler"]])
def test_generate_writes_a_video(pipes, capsys, dial):
    assert cli.main(["generate", PROMPT, *SMALL, *dial, "--fps", "8", "--seed", "3"]) == 0
    frames, fps = read_video("video.mp4")
    assert frames.shape == (9, 64, 64, 3) and fps == 8
    assert files() == ["video.mp4"]
    out, err = capsys.readouterr()
    for word in ("asked", "spent" if "share" in out else "achieved", "12 evaluated", "K/V cache", "peak", "video.mp4"):
        assert word in out
    assert "12/12, evaluated, " in err or "12/12, skipped, " in err
    assert "K/V cache 0 bytes (none is kept), peak" in out


def test_the_same_seed_gives_the_same_file(pipes):
    for name, seed in (("a.mp4", "1"), ("b.mp4", "1"), ("c.mp4", "2")):
        assert cli.main(["generate", PROMPT, *SMALL, "--share", "0.75", "--seed", seed, "--out", name, "--quiet"]) == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes() != Path("c.mp4").read_bytes()


def test_both_compares_with_dense_from_the_same_noise(pipes, capsys):
    arguments = ["--share", "0.75", "--both", "--report", "report.json", "--heatmap", "heat.png"]
    assert cli.main(["generate", PROMPT, *SMALL, *arguments]) == 0
    frames, _ = read_video("video.mp4")
    assert frames.shape[0] == 9 and frames.shape[2] == 128
    report = json.loads(Path("report.json").read_text())
    assert report["seed"] == 0 and report["share"]["target"] == 0.75
    assert report["dense_measured_seconds"] > 0 and 5 < report["psnr"] < 100
    with Image.open("heat.png") as picture:
        picture.load()
    out, err = capsys.readouterr()
    assert f"{report['psnr']:.1f} dB" in out and "of the dense run's" in out
    assert "dense 12/12" in err and "heterostep 12/12" in err and "asked 0.75" in err


def test_both_at_full_share_is_the_dense_video_twice(pipes):
    arguments = ["--share", "1", "--both", "--report", "report.json", "--quiet"]
    assert cli.main(["generate", PROMPT, *SMALL, *arguments]) == 0
    assert json.loads(Path("report.json").read_text())["psnr"] is None


def test_the_report_and_the_map_agree(pipes):
    arguments = ["--share", "0.75", "--report", "report.json", "--heatmap", "heat.mp4", "--quiet"]
    assert cli.main(["generate", PROMPT, *SMALL, *arguments]) == 0
    report = json.loads(Path("report.json").read_text())
    assert np.mean(report["steps_maps"]) == pytest.approx(report["steps"]["mean"])
    assert len(read_video("heat.mp4")[0]) == 9


@pytest.mark.parametrize(("sparse_share", "flat"), [("0", True), ("0.4", False)])
def test_a_map_of_one_colour_is_told_of(pipes, capsys, sparse_share, flat):
    arguments = [*SMALL, "--share", "0.5", "--sparse-share", sparse_share, "--heatmap", "map.png"]
    assert cli.main(["generate", PROMPT, *arguments]) == 0
    assert ("the heat map is of one colour" in capsys.readouterr().err) == flat and Path("map.png").is_file()


def test_quiet_is_quiet(pipes, capsys):
    assert cli.main(["generate", PROMPT, *SMALL, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_prompt_that_the_bundled_model_does_not_know_is_said_before_it_runs(pipes, capsys):
    assert cli.main(["generate", "a cat on the grass", *SMALL]) == 0
    err = capsys.readouterr().err
    assert err.startswith("note: the bundled model knows drawn shapes only") and "--model" in err.splitlines()[0]
    assert cli.main(["generate", PROMPT, *SMALL]) == 0
    assert "note" not in capsys.readouterr().err


def test_sizes_are_the_models_unless_given(pipes, monkeypatch):
    monkeypatch.setattr(tiny, "DEFAULTS", {**tiny.DEFAULTS, "height": 32, "width": 48, "num_frames": 5})
    assert cli.main(["generate", PROMPT, "--steps", "3", "--dense", "--quiet"]) == 0
    assert read_video("video.mp4")[0].shape == (5, 32, 48, 3)


def test_a_plan_and_its_run_take_the_models_own_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_wan("wan2.1-t2v").save_pretrained("model")
    size = ["--model", "model", "--height", "32", "--width", "32", "--frames", "5", "--share", "0.1"]
    assert cli.main(["plan", *size, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_inference_steps"] == 50
    assert cli.main(["generate", PROMPT, *size, "--dtype", "float32", "--report", "report.json", "--quiet"]) == 0
    assert json.loads(Path("report.json").read_text())["num_inference_steps"] == 50
    assert making.usual_steps("Lightricks/LTX-2") == 40
    assert making.usual_steps("a/b") is None and making.usual_steps(None) is None


def test_image_to_video_starts_from_the_image(pipes):
    Image.new("RGB", (100, 50), "teal").save("first.png")
    assert cli.main(["generate", PROMPT, *SMALL, "--image", "first.png", "--quiet"]) == 0
    assert type(pipes[0]).__name__ == "WanImageToVideoPipeline"
    assert read_video("video.mp4")[0].shape == (9, 64, 64, 3)


def test_the_cpu_is_taken_on_a_machine_with_cuda(pipes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["generate", PROMPT, *SMALL, "--share", "0.75", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("sparse_share", "said"), [("0", "6 of 12 evaluated, each for all tokens"), ("0.4", "mean 6.0 per token, min ")]
)
def test_the_summary_says_whether_tokens_were_told_apart(pipes, capsys, sparse_share, said):
    arguments = [*SMALL, "--steps", "12", "--share", "0.5", "--sparse-share", sparse_share]
    assert cli.main(["generate", PROMPT, *arguments]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("steps"))
    assert said in line


@pytest.mark.parametrize(
    ("achieved", "advice", "explained"),
    [(0.4, None, False), (0.52, None, False), (0.6, None, True), (0.6, "why", False)],
)
def test_the_summary_says_why_a_target_was_missed(achieved, advice, explained):
    pipe = small_pipeline()
    with heterostep.enabled(pipe, runtime=0.5):
        run(pipe)
    report = heterostep.report(pipe)
    report = replace(report, runtime=replace(report.runtime, achieved=achieved), advice=advice)
    said = making.summary(SimpleNamespace(report=report, seconds=1.0), None)["runtime"]
    assert ("steps took longer than expected, as on a busy machine" in said) == explained


def test_the_summary_says_how_far_the_estimate_was_off(pipes, capsys):
    arguments = ["--runtime", "0.6", "--both", "--report", "report.json"]
    assert cli.main(["generate", PROMPT, *SMALL, *arguments]) == 0
    report = json.loads(Path("report.json").read_text())
    estimate, measured = report["runtime"]["dense_seconds"], report["dense_measured_seconds"]
    off = round(100 * (estimate / measured - 1))
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("estimate"))
    assert f"{estimate:.1f} for the dense run ({off:+d} %), by this run's own steps" in said
    # A ratio that is not what was achieved is explained.
    when = "the dense run" if off < 0 else "this one"
    assert (f"the machine was slower during {when}" in said) == (abs(off) >= making.SPEED_DIFFERS)


def test_the_pipeline_is_restored_and_the_dtype_followed(pipes):
    assert cli.main(["generate", PROMPT, *SMALL, "--dtype", "bfloat16", "--quiet"]) == 0
    (pipe,) = pipes
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    assert "forward" not in vars(pipe.transformer)


def test_a_saved_pipeline_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_pipeline().save_pretrained("model")
    Image.new("RGB", (64, 64), "teal").save("first.png")
    common = ["generate", PROMPT, *SMALL, "--model", "model", "--quiet", "--guidance", "3"]
    assert cli.main([*common, "--out", "text.mp4"]) == 0
    assert cli.main([*common, "--out", "image.mp4", "--image", "first.png"]) == 0
    assert read_video("text.mp4")[0].shape == read_video("image.mp4")[0].shape == (9, 64, 64, 3)


@pytest.mark.parametrize("kind", quickly(["text", "image"], ["image"]))
def test_ltx2_makes_video_and_sound(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    small_ltx2().save_pretrained("model")
    Image.new("RGB", (64, 64), "teal").save("first.png")
    image = ["--image", "first.png"] if kind == "image" else []
    arguments = ["--model", "model", "--steps", "12", "--frames", "17", "--height", "64", "--width", "64", *image]
    assert cli.main(["generate", PROMPT, *arguments, "--device", "cpu", "--both", "--report", "report.json"]) == 0
    frames, fps = read_video("video.mp4")
    assert frames.shape == (17, 84, 128, 3) and fps == 24
    with av.open("video.mp4") as container:
        (sound,) = container.streams.audio
        seconds = float(sound.duration * sound.time_base)
    assert sound.rate == 24_000 and seconds == pytest.approx(17 / 24, abs=0.05)
    report = json.loads(Path("report.json").read_text())
    assert report["pipeline"] == ("LTX2ImageToVideoPipeline" if image else "LTX2Pipeline")
    capsys.readouterr()
    assert "must be a multiple of 8 plus 1" in only_line(fails(capsys, *arguments, "--frames", "16"))


def test_two_experts_through_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_wan("wan2.2-i2v").save_pretrained("model")
    Image.new("RGB", (64, 64), "teal").save("first.png")
    arguments = ["--model", "model", "--image", "first.png", "--share", "0.6", "--sparse-share", "0.2"]
    assert cli.main(["generate", PROMPT, *SMALL, *arguments, "--report", "report.json", "--quiet"]) == 0
    assert json.loads(Path("report.json").read_text())["share"]["achieved"] == pytest.approx(0.6, abs=0.01)


def test_the_second_expert_has_a_guidance_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_wan("wan2.2-t2v").save_pretrained("model")
    arguments = ["generate", PROMPT, *SMALL, "--model", "model", "--share", "0.6", "--quiet"]
    clips = {}
    for name, more in {"same": [], "given": ["--guidance-2", "5"], "other": ["--guidance-2", "2"]}.items():
        assert cli.main([*arguments, "--guidance", "5", *more, "--out", f"{name}.mp4"]) == 0
        clips[name] = Path(f"{name}.mp4").read_bytes()
    assert clips["same"] == clips["given"] != clips["other"]
    capsys.readouterr()
    assert cli.main([*arguments[:-1], "--guidance", "1", "--guidance-2", "2"]) == 0
    assert "note: --guidance-2 has no effect, for --guidance is not above 1" in capsys.readouterr().err
    small_pipeline().save_pretrained("one")
    line = only_line(fails(capsys, "--model", "one", "--guidance-2", "3"))
    assert line.strip() == "heterostep: one has no second expert: leave out --guidance-2"


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_weights_wait_in_host_memory(pipes, monkeypatch, how):
    """As on a GPU, but that the hooks of accelerate bring weights from the CPU to the CPU."""
    arguments = ["generate", PROMPT, *SMALL, "--share", "0.5", "--quiet"]
    assert cli.main([*arguments, "--out", "all.mp4"]) == 0
    monkeypatch.setattr("heterostep.cli.generate.check_offload", lambda *given: None)
    if how == "sequential":
        # On the CPU alone accelerate stumbles over the text encoder, whose embedding is two of its weights.
        monkeypatch.setattr(
            type(pipes[0]), "enable_sequential_cpu_offload", lambda pipe, device: cpu_offload(pipe.transformer, device)
        )
    assert cli.main([*arguments, "--offload", how, "--out", "parts.mp4"]) == 0
    hooks = [type(pipe.transformer.__dict__.get("_hf_hook")).__name__ for pipe in pipes]
    assert hooks == ["NoneType", "CpuOffload" if how == "model" else "SequentialHook"]
    assert Path("parts.mp4").read_bytes() == Path("all.mp4").read_bytes()


@pytest.mark.parametrize(
    ("offload", "advice"),
    [
        (None, "lower --height, --width or --frames, or take a smaller --dtype"),
        ("model", "lower --height, --width or --frames, take a smaller --dtype, or give --offload model"),
    ],
)
def test_what_needs_less_memory(offload, advice):
    assert cli.generate._smaller(offload) == advice


def test_every_pipeline_that_the_command_loads_is_supported():
    loaded = {name for kind in known_checkpoints().values() for name in (kind.text, kind.image) if name}
    assert loaded <= set(heterostep.pipeline.supported())


def test_scene_writes_a_first_frame(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["scene", PROMPT + " over blue stripes", "--seed", "1"]) == 0
    with Image.open("first.png") as picture:
        assert picture.size == (192, 192)
    assert "first.png" in capsys.readouterr().out


def test_scene_without_a_shape_fails_in_one_line(no_model, capsys):
    assert cli.main(["scene", "the meaning of life"]) == 2
    assert only_line(capsys.readouterr().err).startswith("heterostep: ")
    assert files() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtime", "0"], "heterostep: --runtime must be above 0"),
        (["--runtime", "1.5"], "at most 1"),
        (["--share", "-0.1"], "share must be above 0"),
        (["--share", "nan"], "share must be above 0"),
        (["--share", "half"], "--share"),
        (["--runtime", "0.5", "--share", "0.5"], "not both"),
        (["--dense", "--runtime", "0.5"], "--dense"),
        (["--dense", "--both"], "--dense"),
        (["--share", "0.01"], "heterostep: --share=0.01 is below the lowest possible"),
        (["--runtime", "0.2", "--steps", "4"], "lowest possible"),
        (["--policy", "best"], "heterostep: --policy must be one of auto, hsa"),
        (["--policy", "round-robin"], "heterostep: --policy must be one of auto, hsa, not 'round-robin'"),
        (["--policy", "hsa", "--sparse-share", "0.2"], "heterostep: --sparse-share belongs to policy='auto'"),
        (["--steps", "0"], "--steps"),
        (["--steps", "10001"], "--steps"),
        (["--out", ""], ". is a folder: give a file that ends in .mp4"),
        (["--out", "v" * 300 + ".mp4"], "vvv... is too long"),
        (["--model", ""], "heterostep: --model: the name of the model is empty"),
        (["--image", "missing.png"], "the image missing.png does not exist"),
        (["--out", "nowhere/video.mp4"], "no folder nowhere"),
        (["--out", "video.gif"], ".mp4"),
        (["--report", "report.txt"], ".json"),
        (["--heatmap", "heat.jpg"], ".png or .mp4"),
        (["--heatmap", "video.mp4"], "same path"),
        (["--out", "v" * 250 + ".mp4"], "vvv... is too long"),
        (["--device", "abacus"], "unknown device"),
        (["--device", "cuda:99"], "no device cuda:99"),
        (["--device", "cpu:9"], "the CPU is one, called cpu"),
        (["--image", "."], ". is a folder, not an image"),
        (["--dtype", "int3"], "--dtype"),
        (["--solver", "magic"], "--solver"),
        (["--guidance", "nan"], "--guidance must be a number of at least 0, not nan"),
        (["--guidance", "inf"], "--guidance"),
        (["--guidance", "-0.5"], "--guidance"),
        (["--guidance-2", "-1"], "heterostep: --guidance-2 must be a number of at least 0, not -1"),
        (["--guidance-2", "3"], "heterostep: the bundled model has no second expert: leave out --guidance-2"),
        (["--offload", "layers"], "heterostep: --offload must be one of none, model, sequential, not layers"),
        (["--offload", "model", "--device", "cpu"], "heterostep: --offload needs a GPU: leave it out"),
        (["--offload", "model", "--gpus", "2"], "heterostep: --offload is for one GPU: leave it out, or --gpus"),
        (["--fps", "0"], "--fps"),
        (["--fps", "inf"], "--fps"),
        (["--seed", str(2**64)], "--seed"),
        (["--nonsense"], "--nonsense"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_faults_are_found_before_the_model_is_loaded(no_model, capsys, arguments, message):
    assert message in only_line(fails(capsys, *arguments))


def test_an_unreadable_image_is_refused(no_model, capsys):
    Path("first.png").write_text("no picture")
    assert "cannot read the image first.png" in only_line(fails(capsys, "--image", "first.png"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux's folder where nobody can write a file, nor root")
def test_a_folder_that_takes_no_files_is_refused(no_model, capsys):
    assert "cannot write to the folder /proc" in only_line(fails(capsys, "--out", "/proc/video.mp4"))


def test_a_folder_as_output_is_refused(no_model, capsys):
    Path("a.mp4").mkdir()
    assert "is a folder" in only_line(fails(capsys, "--out", "a.mp4"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "100"], "--height must be a multiple of 16"),
        (["--width", "72"], "--width must be a multiple of 16"),
        (["--frames", "10"], "such as 9"),
        (["--width", "1040"], "--width can be 1024 at the most for this model, not 1040"),
    ],
)
def test_sizes_the_model_cannot_do(pipes, capsys, arguments, message):
    assert message in only_line(fails(capsys, *SMALL, *arguments))


def test_a_size_that_the_configuration_rules_out_is_told_before_the_model_is_loaded(no_model, capsys):
    assert "--height must be a multiple of 16" in only_line(fails(capsys, "--height", "97"))
    line = only_line(fails(capsys, "--frames", "10", "--model", "Lightricks/LTX-2"))
    assert line == "heterostep: --frames must be a multiple of 8 plus 1 for this model, such as 9, not 10\n"


def test_a_negative_prompt_without_guidance_is_told(pipes, capsys):
    common = ["generate", PROMPT, "--steps", "3", "--dense", "--frames", "1", "--height", "32", "--width", "32"]
    for guidance, told in (("1", True), ("3", False)):
        assert cli.main([*common, "--device", "cpu", "--negative", "blur", "--guidance", guidance]) == 0
        assert ("note: --negative has no effect" in capsys.readouterr().err) == told


def test_a_folder_that_is_no_model(no_model, capsys):
    Path("weights").mkdir()
    assert "--model: weights is not a diffusers folder or hub id" in only_line(fails(capsys, "--model", "weights"))


def test_a_name_of_plan_and_bench_is_told_as_a_hub_id(no_model, capsys):
    said = only_line(fails(capsys, "--model", "wan2.1-t2v-1.3b"))
    assert "give Wan-AI/Wan2.1-T2V-1.3B-Diffusers or the checkpoint's folder" in said


def test_a_path_that_is_no_folder(no_model, capsys):
    assert "the folder ./models/wan does not exist" in only_line(fails(capsys, "--model", "./models/wan"))


@pytest.mark.parametrize("option", [["--policy", "hsa"], ["--sync", "drift"], ["--both"]])
def test_dense_goes_with_nothing_that_skips(no_model, capsys, option):
    assert "--dense skips nothing" in only_line(fails(capsys, "--dense", *option))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command; see heterostep --help"),
        (["draw"], "No such command 'draw'; see heterostep --help"),
        (["generate"], "Missing argument 'prompt'; see heterostep generate --help"),
        (["generate", "x", "--frames", "1.5"], "--frames must be a whole number, not '1.5'; see heterostep generate"),
        (["generate", "x", "--frames", "0"], "heterostep: --frames must be at least 1, not 0; see heterostep generate"),
        (["generate", "x", "--frames", "9" * 5000], "heterostep: --frames must be a smaller number, not '999"),
        (["generate", "x", "--steps", "20000"], "heterostep: --steps must be at most 10,000, not 20000; see"),
        (["generate", "x", "--sparse-share", "2"], "heterostep: --sparse-share must be at most 1, not 2; see"),
        (["batch", "x", "--out", "y", "--runtime", "half"], "heterostep: --runtime must be a number, not 'half'; see"),
        (["serve", "--keep-hours", "0"], "heterostep: --keep-hours must be at least 0.01, not 0; see heterostep serve"),
        (["generate", ""], "the prompt is empty: say what the video should show"),
        (["generate", " \n"], "the prompt is empty"),
        (
            ["generate", "x", "--solver", "rk4"],
            "'rk4' is not one of 'pipeline', 'euler'; see heterostep generate --help",
        ),
    ],
)
def test_a_command_line_that_cannot_be_read_says_where_to_look(capsys, arguments, message):
    assert cli.main(arguments) == 2
    err = only_line(capsys.readouterr().err)
    assert message in err and "Value error" not in err


def test_a_broken_model(no_model, capsys):
    small_pipeline().save_pretrained("model")
    for weights in Path("model/transformer").glob("*.safetensors"):
        weights.write_bytes(b"broken")
    assert "cannot load model" in only_line(fails(capsys, "--model", "model", *SMALL))


def test_an_unsupported_pipeline_is_named_with_those_supported(no_model, capsys):
    Path("model").mkdir()
    Path("model/model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    line = only_line(fails(capsys, "--model", "model"))
    assert "StableDiffusionPipeline" in line and "WanPipeline" in line


def test_an_unsupported_scheduler(monkeypatch, pipes, capsys):
    from diffusers import DDIMScheduler

    pipe = small_pipeline()
    pipe.scheduler = DDIMScheduler()
    monkeypatch.setattr(tiny, "load", lambda image_to_video=False: pipe)
    assert "DDIMScheduler" in only_line(fails(capsys, *SMALL))


def test_an_image_for_a_model_of_text_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_pipeline(expand_timesteps=False).save_pretrained("model")
    Image.new("RGB", (64, 64)).save("first.png")
    line = only_line(fails(capsys, "--model", "model", "--image", "first.png", *SMALL))
    assert line == "heterostep: --image: model makes videos from text alone: leave the first frame out\n"


def test_a_model_of_images_without_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_pipeline(image_to_video=True).save_pretrained("model")
    line = only_line(fails(capsys, "--model", "model", *SMALL))
    assert line == "heterostep: --image: model makes videos from a first frame: give one\n"


def _interrupt_at(monkeypatch, step, error):
    """Raise at this step of the generation, from inside the pipeline."""
    from heterostep import progress

    show = progress.RunProgress.__call__

    def call(self, info):
        if info.step == step:
            raise error
        show(self, info)

    monkeypatch.setattr(progress.RunProgress, "__call__", call)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_says_what_to_lower(pipes, capsys, monkeypatch, error):
    _interrupt_at(monkeypatch, 3, error)
    line = only_line(fails(capsys, *SMALL, "--sparse-share", "0.3", "--quiet"))
    assert "out of memory" in line and "kB" in line and "--height" in line
    assert "forward" not in vars(pipes[0].transformer)


def test_out_of_memory_without_a_cache_does_not_blame_it(pipes, capsys, monkeypatch):
    _interrupt_at(monkeypatch, 3, torch.OutOfMemoryError("no"))
    assert "K/V" not in only_line(fails(capsys, *SMALL, "--dense", "--quiet"))


def test_out_of_memory_of_whole_steps_does_not_blame_it_either(pipes, capsys, monkeypatch):
    _interrupt_at(monkeypatch, 3, torch.OutOfMemoryError("no"))
    assert "K/V" not in only_line(fails(capsys, *SMALL, "--share", "0.5", "--quiet"))


def test_the_k_v_cache_needs_what_it_was_said_to(pipes):
    arguments = ["--share", "0.72", "--sparse-share", "0.2", "--report", "report.json", "--quiet"]
    assert cli.main(["generate", PROMPT, *SMALL, *arguments]) == 0
    sizes = {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": tiny.DEFAULTS["guidance_scale"]}
    report = json.loads(Path("report.json").read_text())
    assert report["memory"]["kv_cache_bytes"] == kv_cache_bytes(pipes[0], **sizes)


def test_whole_steps_alone_need_no_k_v_cache(pipes, capsys):
    arguments = ["generate", PROMPT, *SMALL, "--share", "0.72", "--report", "report.json", "--quiet"]
    for option in (["--no-kv"], ["--sparse-share", "0"]):
        assert cli.main([*arguments, *option]) == 0
        report = json.loads(Path("report.json").read_text())
        assert report["memory"]["kv_cache_bytes"] == 0 and set(report["active_share"]) == {0.0, 1.0}
    assert "not both" in only_line(fails(capsys, *SMALL, "--no-kv", "--sparse-share", "0.2"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], ""),
        (["--kv-store", "fp8"], "; --kv-store had no effect"),
        (["--sync", "drift"], "; --sync had no effect"),
        (["--kv-store", "fp8", "--vram", "8"], "; --kv-store and --vram had no effect"),
        (["--kv-store", "fp8", "--sparse-share", "0.2"], ""),
    ],
)
def test_a_store_where_nothing_is_kept_is_told_of(pipes, capsys, arguments, told):
    whole = [] if "--sparse-share" in arguments else ["--sparse-share", "0"]
    assert cli.main(["generate", PROMPT, *SMALL, "--share", "0.72", *whole, *arguments]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("memory"))
    assert told in line and ("no effect" in line) == bool(told)


def test_the_k_v_store_is_chosen_and_told(pipes, capsys):
    arguments = ["generate", PROMPT, *SMALL, "--share", "0.72", "--sparse-share", "0.2", "--kv-store", "fp8-offload"]
    assert cli.main([*arguments, "--report", "report.json"]) == 0
    out = capsys.readouterr().out
    assert "(fp8-offload)" in out and "in host memory" in out
    memory = json.loads(Path("report.json").read_text())["memory"]
    assert memory["kv_store"] == "fp8-offload" and memory["kv_host_bytes"] > 0 and not memory["fell_back"]
    assert "--kv-store must be one of" in only_line(fails(capsys, *SMALL, "--kv-store", "disk"))
    for vram in ("0", "1e308"):
        assert "vram must be" in only_line(fails(capsys, *SMALL, "--vram", vram))


def test_the_papers_policy_with_k_v_in_drift(pipes, capsys):
    arguments = ["generate", PROMPT, *SMALL, "--share", "0.76", "--policy", "hsa", "--sync", "drift", "--quiet"]
    assert cli.main([*arguments, "--report", "report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    assert any(0 < share < 1 for share in report["active_share"]) and report["memory"]["kv_cache_bytes"] > 0
    assert "--sync must be one of" in only_line(fails(capsys, *SMALL, "--sync", "slide"))


def test_ctrl_c_is_one_line_and_restores_the_pipeline(pipes, capsys, monkeypatch):
    _interrupt_at(monkeypatch, 2, KeyboardInterrupt())
    assert only_line(fails(capsys, *SMALL, "--quiet", code=130)) == "heterostep: interrupted\n"
    assert "forward" not in vars(pipes[0].transformer)
    disable(pipes[0])


def test_a_failed_run_keeps_the_old_video(pipes, capsys, monkeypatch):
    Path("video.mp4").write_bytes(b"old")
    _interrupt_at(monkeypatch, 2, KeyboardInterrupt())
    fails(capsys, *SMALL, "--quiet", code=130)
    assert Path("video.mp4").read_bytes() == b"old"


def test_a_terminal_gets_a_bar(pipes, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["generate", PROMPT, *SMALL, "--share", "0.75"]) == 0
    err = capsys.readouterr().err
    assert "━" in err and "asked 0.75" in err


def test_version_and_missing_arguments(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"heterostep {heterostep.__version__}\n"
    assert cli.main(["generate"]) == 2
    assert cli.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def _python(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(heterostep.__file__).parents[1])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_help_answers_without_torch():
    def used():
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    # The processor's seconds: those of the clock would also tell of a busy machine.
    before = used()
    result = _python("-m", "heterostep", "--help")
    assert used() - before < 2
    assert result.returncode == 0 and "generate" in result.stdout
    code = "import sys, heterostep.cli; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers')))"
    assert _python("-c", code).returncode == 0


def test_the_module_runs_as_a_command(tmp_path):
    small_pipeline().save_pretrained(tmp_path / "model")
    video = tmp_path / "video.mp4"
    result = _python(
        "-m", "heterostep", "generate", PROMPT, *SMALL, "--model", str(tmp_path / "model"), "--out", str(video)
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert all(line.startswith("heterostep ") for line in lines), result.stderr
    assert "ends at" in lines[-1] and "(asked 0.50)" in lines[-1]
    assert ", evaluated, " in lines[0] and any(", skipped, " in line for line in lines)
    assert video.is_file()
    assert _python("-m", "heterostep", "generate", PROMPT, "--runtime", "7").returncode == 2


def test_compare_writes_a_page(pipes, capsys):
    arguments = [*SMALL, "--count", "1", "--runtimes", "1,0.6", "--methods", "heterostep,steps", "--out", "report"]
    assert cli.main(["compare", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "runtime 0.6 of dense" in out and "report/index.html" in out and "4/4" in err
    results = json.loads(Path("report/results.json").read_text())
    assert results["complete"] and {r["method"] for r in results["generations"]} == {"heterostep", "steps"}
    assert results["generations"][0]["caption"] is not None
    page = Path("report/index.html").read_text()
    assert results["prompts"][0]["prompt"] in page
    # Again: nothing is left to do. Another one does not mix with it.
    assert cli.main(["compare", *arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["compare", *arguments, "--repeats", "2"]) == 2
    assert "another comparison" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mode", [pytest.param([], marks=pytest.mark.slow), ["--image-to-video"]], ids=["text", "image"]
)
def test_compare_in_batches(pipes, capsys, mode):
    arguments = [*SMALL, "--count", "2", "--seeds", "2", "--batch", "3", "--runtimes", "0.5", "--methods", "steps"]
    assert cli.main(["compare", *arguments, *mode, "--videos", "0"]) == 0
    out, err = capsys.readouterr()
    assert (
        "token evaluations" in out and "prompts 1-3 dense" in err and "prompt 4 steps" in err and "minute left" in err
    )
    results = json.loads(Path("report/results.json").read_text())
    assert [p["seed"] for p in results["prompts"]] == [0, 1, 1000003, 1000004]
    assert results["prompts"][0]["prompt"] == results["prompts"][2]["prompt"]
    assert len(results["generations"]) == 4 and results["settings"]["seeds"] == 2
    assert "2 prompts x 2 seeds" in Path("report/index.html").read_text()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--runtimes", "fast"], "--runtimes"),
        (["--runtimes", "0,1"], "--runtimes"),
        (["--methods", "heterostep,magic"], "no such method: magic; the methods are heterostep"),
        (["--prompts", "none.txt"], "none.txt does not exist"),
        (["--prompts", "."], ". is a folder, not a file of prompts"),
        (["--runtimes", ""], "not ''"),
        (["--repeats", "2", "--batch", "2"], "leave out --repeats or --batch"),
        (["--methods", ""], "--methods names none; the methods are heterostep"),
        (["--methods", ","], "--methods names none"),
        (["--guidance", "nan"], "--guidance must be a number of at least 0, not nan"),
        (["--guidance", "-1"], "not -1"),
        (["--prompts", "empty.txt"], "empty.txt has no prompts"),
        (["--prompts", "prompts.txt", "--image-to-video"], "line 1: image-to-video needs a tab"),
        (["--prompts", "latin.txt"], "latin.txt is not UTF-8 text"),
        (["--out", "empty.txt"], "empty.txt is not a folder"),
        (["--out", "empty.txt/deep/report"], "empty.txt is not a folder"),
    ],
)
def test_compare_used_wrongly(no_model, capsys, arguments, message):
    Path("empty.txt").touch()
    Path("prompts.txt").write_text("a cat\n")
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    before = files()
    assert cli.main(["compare", *SMALL, *arguments]) == 2
    assert message in only_line(capsys.readouterr().err) and files() == before


@pytest.mark.parametrize("regime", [False, True])
def test_a_comparison_of_nothing_is_an_error(pipes, capsys, regime):
    """A target below what any plan can meet leaves no curve."""
    # A regime brings its own steps.
    at = [*SMALL[2:], "--regime", "lightx2v"] if regime else SMALL
    assert cli.main(["compare", *at, "--count", "1", "--runtimes", "0.01", "--methods", "heterostep"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("heterostep: nothing could be compared (heterostep: without 0.01")


def test_prompts_that_the_bundled_model_cannot_follow_are_told_of(pipes, capsys):
    Path("prompts.txt").write_text(f"a cat\n{PROMPT}\n")
    arguments = [*SMALL, "--runtimes", "0.5", "--methods", "steps", "--videos", "0", "--prompts", "prompts.txt"]
    assert cli.main(["compare", *arguments]) == 0
    note = capsys.readouterr().err.splitlines()[0]
    assert "cannot follow 1 of 2 prompts, such as 'a cat' (" in note and note.endswith("for others give --model")


def test_compare_wants_no_more_prompts_than_a_model_brings(no_model, capsys):
    Path("model").mkdir()
    Path("model/heterostep.json").write_text(json.dumps({"held_out": [{"prompt": "a cat"}]}))
    assert cli.main(["compare", *SMALL, "--model", "model", "--count", "2"]) == 2
    err = only_line(capsys.readouterr().err)
    assert err == "heterostep: --count 2 is more than model's own prompts (1): lower it, or give a file of prompts\n"
    assert files() == ["model"]


def test_compare_ignores_empty_names_and_goes_on_with_other_methods(pipes, capsys):
    arguments = ["compare", *SMALL, "--count", "1", "--runtimes", "0.5", "--videos", "0", "--quiet", "--methods"]
    assert cli.main([*arguments, "steps,,steps-euler,"]) == 0
    assert cli.main([*arguments, "heterostep"]) == 0
    results = json.loads(Path("report/results.json").read_text())
    assert [method["name"] for method in results["methods"]] == ["heterostep", "steps", "steps-euler"]
    assert {line["method"] for line in results["curves"]} == {"heterostep", "steps", "steps-euler"}
