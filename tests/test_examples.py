"""The scripts in examples/, each from end to end on a small random checkpoint of the kind that it asks for."""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import heterostep
from heterostep.video import read_video, write_video
from rows import quickly
from small_hunyuan import small_hunyuan
from small_ltx2 import small_ltx2
from small_wan import FRAMES, SIZE, moving_square, small_wan

EXAMPLES = Path(__file__).parents[1] / "examples"
# By script: the pipeline that the checkpoint is published as, and the files that the script asks for.
SCRIPTS = {
    "hunyuan15_i2v": (lambda: small_hunyuan("image"), ["image"]),
    "hunyuan15_t2v": (lambda: small_hunyuan("text"), []),
    "ltx2_i2v": (small_ltx2, ["image"]),
    "ltx2_keyframes": (small_ltx2, ["image", "image"]),
    "ltx2_t2v": (small_ltx2, []),
    "wan21_flf2v": (lambda: small_wan("wan2.1-flf2v"), ["image", "image"]),
    "wan21_i2v": (lambda: small_wan("wan2.1-i2v"), ["image"]),
    "wan21_t2v": (lambda: small_wan("wan2.1-t2v"), []),
    "wan21_v2v": (lambda: small_wan("wan2.1-t2v"), ["video"]),
    "wan21_vace": (lambda: small_wan("wan2.1-vace"), ["image"]),
    "wan22_a14b_i2v": (lambda: small_wan("wan2.2-i2v"), ["image"]),
    "wan22_a14b_t2v": (lambda: small_wan("wan2.2-t2v"), []),
    "wan22_ti2v_5b_i2v": (lambda: small_wan("wan2.2-ti2v-t2v"), ["image"]),
    "wan22_ti2v_5b_t2v": (lambda: small_wan("wan2.2-ti2v-t2v"), []),
}
# What small_hunyuan sets on its pipeline and a checkpoint does not hold.
LENGTHS = (
    "prompt_template_encode_start_idx",
    "tokenizer_max_length",
    "tokenizer_2_max_length",
    "vision_num_semantic_tokens",
)


def main_of(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def files(tmp_path):
    """An image and a video, both larger than what is to be made; the video longer too."""
    frames = [frame.resize((2 * SIZE, 2 * SIZE)) for frame in moving_square()]
    frames[0].save(tmp_path / "given.png")
    write_video(tmp_path / "given.mp4", np.stack([np.asarray(frame) for frame in 2 * frames]), fps=8)
    return {"image": str(tmp_path / "given.png"), "video": str(tmp_path / "given.mp4")}


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """publish(pipe) makes it what every hub id loads; returns the list of the pipelines that are loaded."""
    from_pretrained = DiffusionPipeline.from_pretrained.__func__

    def publish(checkpoint):
        checkpoint.save_pretrained(tmp_path / "checkpoint")
        loaded = []

        def load(cls, model, **options):
            assert re.fullmatch(r"[\w-]+/[\w.-]+", model)
            pipe = from_pretrained(cls, tmp_path / "checkpoint", **options)
            for name in LENGTHS:
                if hasattr(checkpoint, name):
                    setattr(pipe, name, getattr(checkpoint, name))
            # The tests need no GPU.
            pipe.to = pipe.enable_model_cpu_offload = lambda *args: pipe
            loaded.append(pipe)
            return pipe

        monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(load))
        return loaded

    return publish


NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", quickly(NAMES, set(NAMES) - {"hunyuan15_i2v", "ltx2_keyframes"}))
def test_a_script_makes_its_video(name, publish, files, tmp_path, capsys):
    build, needed = SCRIPTS[name]
    loaded, main = publish(build()), main_of(name)
    sizes = dict(height=SIZE, width=SIZE, num_frames=FRAMES, num_inference_steps=20)
    taken = {key: value for key, value in sizes.items() if key in inspect.signature(main).parameters}
    out = str(tmp_path / "out.mp4")

    main(*(files[kind] for kind in needed), out=out, runtime=0.6, **taken)

    (pipe,) = loaded
    assert pipe.transformer.dtype == torch.bfloat16
    report = heterostep.report(pipe)
    assert report.finished and 0 < report.share.achieved < 1
    assert str(report.runtime) in capsys.readouterr().out
    video, _ = read_video(out)
    assert video.shape == (FRAMES, SIZE, SIZE, 3)
    with av.open(out) as container:
        assert len(container.streams.audio) == ("vocoder" in pipe.components)


def test_no_script_is_missing():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", [name for name, (_, needed) in SCRIPTS.items() if needed])
def test_a_missing_file_is_asked_for_before_a_model_is_loaded(name, monkeypatch):
    needed = SCRIPTS[name][1]

    def load(cls, model, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(load))
    with pytest.raises(SystemExit, match=rf"^give .*: python {name}\.py [A-Z ]+\[PROMPT\]$"):
        main_of(name)(*needed[1:])


@pytest.mark.parametrize("name", NAMES)
def test_help_is_no_prompt_and_no_file(name, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *given: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit, match=rf"python {name}\.py [A-Z ]*\[PROMPT\]$"):
        main_of(name)("--help")


def test_the_command_asks_in_one_line(tmp_path):
    command = [sys.executable, str(EXAMPLES / "wan21_i2v.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    # Imports of libraries may have something to say before.
    assert done.stderr.splitlines()[-1] == "give a first frame, a file or a URL: python wan21_i2v.py IMAGE [PROMPT]"
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
