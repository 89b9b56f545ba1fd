import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from heterostep import cli
from heterostep.batch import lines, manifest
from heterostep.errors import HeterostepError
from heterostep.order import Order
from heterostep.workers.maker import Made


@pytest.fixture
def file(tmp_path):
    """Writes lines, of objects or texts, and gives the file."""

    def write(*rows):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


def read(path, model=None, **defaults):
    return lines.read(path, defaults, model)


def test_lines_become_orders_and_the_options_fill_what_they_leave_open(file):
    path = file(
        {"prompt": "a cat", "seed": 3, "size": "64x48", "frames": 9, "steps": 8, "share": 0.5},
        "",
        {"prompt": "a dog", "num_frames": 5, "num_inference_steps": 9, "guidance_scale": 2, "negative_prompt": "blur"},
        {"prompt": "a cow", "height": 32, "runtime": 0.75},
    )
    found = read(path, steps=12, share=0.25, size="32x32", frames=13)
    cat, dog, cow = (line.order() for line in found.good)
    assert (cat.seed, cat.width, cat.height, cat.frames, cat.steps) == (3, 64, 48, 9, 8)
    assert (cat.dial, cat.target, cat.dense) == ("share", 0.5, False)
    assert (dog.frames, dog.steps, dog.guidance, dog.negative, dog.width) == (5, 9, 2.0, "blur", 32)
    assert (dog.dial, dog.target) == ("share", 0.25)
    assert (cow.height, cow.width, cow.dial, cow.target) == (32, None, "runtime", 0.75)
    assert [line.number for line in found.good] == [1, 3, 4] and found.bad == []
    assert found.good[0].stem.startswith("a-cat-")


def test_a_key_is_the_content_and_a_line_said_twice_is_one(file):
    same = {"prompt": "a cat", "seed": 1, "size": "64x64"}
    path = file(same, {"seed": 1, "prompt": "a cat", "height": 64, "width": 64}, {**same, "seed": 2})
    found = read(path)
    assert [line.number for line in found.good] == [1, 3] and found.repeated == 1
    moved = read(file("", "", {**same, "seed": 2}, same)).good
    assert {line.key for line in moved} == {line.key for line in found.good}
    assert {line.stem for line in moved} == {line.stem for line in found.good}
    assert not {line.key for line in read(path, model="x/y").good} & {line.key for line in found.good}


def test_a_first_frame_is_found_beside_the_file_and_belongs_to_the_key(file, tmp_path):
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "first.png")
    row = {"prompt": "a cat", "image": "first.png", "name": "kitty"}
    (line,) = read(file(row)).good
    assert line.order().picture.name == "first.png" and line.stem == "kitty"
    Image.new("RGB", (64, 64), "red").save(tmp_path / "first.png")
    assert read(file(row)).good[0].key != line.key
    # Its video would go by the key of the picture that was there.
    with pytest.raises(HeterostepError, match="first.png was changed since the batch began: give the batch again"):
        line.order()
    (tmp_path / "first.png").unlink()
    with pytest.raises(HeterostepError, match="cannot read the image"):
        line.order()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a', "^not valid JSON; expected a line such as"),
        ('["a cat"]', "^not a JSON object"),
        ("[" * 100_000, "^not valid JSON; expected a line such as"),
        ({}, "the prompt is empty: say what the video should show"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt should be a text, not 3"),
        ({"prompt": "a", "seed": True}, "seed should be a text or a number, not true or false"),
        ({"prompt": "a", "seed": [1]}, "not a list"),
        ({"prompt": "a", "seed": 1.5}, "seed should be a whole number"),
        ({"prompt": "a", "seed": -1}, "seed should be from 0"),
        ({"prompt": "a", "steps": 0}, "steps should be from 1"),
        ({"prompt": "a", "size": "64"}, "such as 832x480, not '64'"),
        ({"prompt": "a", "size": "64x64", "width": 64}, "size or width and height"),
        ({"prompt": "a", "size": "8x64"}, "width should be from 16"),
        ({"prompt": "a", "runtime": 0.5, "share": 0.5}, "runtime or share, not both"),
        ({"prompt": "a", "runtime": 7}, "runtime should be from 0.001 to 1"),
        ({"prompt": "a", "share": 0.01}, "lowest possible"),
        ({"prompt": "a", "policy": "round-robin"}, "policy must be one of auto, hsa, not 'round-robin'"),
        ('{"prompt": "a", "share": NaN}', "share should be from"),
        ({"prompt": "a", "frames": 9, "num_frames": 9}, "frames or num_frames, not both"),
        ({"prompt": "a", "colour": "red"}, "no field is called 'colour'; the fields are prompt, .*, image, name"),
        ({"prompt": "a", "model": "x/y"}, "a batch has one model"),
        ({"prompt": "a", "image": "none.png"}, "cannot read the image"),
        ({"prompt": "a", "image": 3}, "should be the path"),
        ({"prompt": "a", "name": "../../up"}, "name should be"),
        ({"prompt": "a", "name": ".lock"}, "name should be"),
    ],
)
def test_a_bad_line_is_told_and_the_others_are_good(file, row, message):
    found = read(file({"prompt": "before"}, row, {"prompt": "after"}))
    assert [line.number for line in found.good] == [1, 3]
    (bad,) = found.bad
    assert bad.number == 2 and "\n" not in bad.message
    assert re.search(message, bad.message), bad.message


def test_bytes_that_are_no_text_spoil_their_line_alone(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a cat"}\r\n{"prompt": "caf\xe9"}\r\n')
    found = read(path)
    assert len(found.good) == 1 and found.bad[0].message == "not UTF-8 text"


def test_two_requests_of_one_name(file):
    found = read(file({"prompt": "a", "name": "x"}, {"prompt": "b", "name": "X"}))
    assert len(found.good) == 1 and "is line 1's" in found.bad[0].message


def test_files_without_lines(file, tmp_path):
    with pytest.raises(HeterostepError, match="does not exist"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(HeterostepError, match="has no lines"):
        read(file("", "  "))


def test_a_file_that_is_no_text_is_told_once(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"\0\0\0\x20ftypisom\n\xff\n{\n")
    with pytest.raises(HeterostepError, match=r"video\.mp4 is not a text file; expected lines such as"):
        read(path)


MADE = Made(b"video", {"schema": 3}, {"seed": 0}, {})


def lines_of(file, count=3):
    return read(file(*({"prompt": "a cat", "seed": seed} for seed in range(count)))).good


def test_what_was_made_is_known_to_the_next_run(file, tmp_path):
    first, second, third = lines_of(file)
    with manifest.opened(tmp_path / "out") as made:
        made.add(first, MADE, 1.5, "worker 1")
        made.fail(2, second.key, "no")
    with manifest.opened(tmp_path / "out") as made:
        assert [made.has(line) for line in (first, second, third)] == [True, False, False]
        video, report = made.files(first)
        assert video.read_bytes() == b"video"
        told = json.loads(report.read_text())
        assert told["settings"] == {"seed": 0} and told["report"] == {"schema": 3} and told["key"] == first.key
        video.unlink()
        assert not made.has(first)
    entries = [json.loads(line) for line in (tmp_path / "out" / manifest.NAME).read_text().splitlines()]
    assert [(entry["line"], entry["state"]) for entry in entries] == [(1, "done"), (2, "failed")]


def test_a_video_whose_note_was_lost_is_not_made_again(file, tmp_path):
    (line,) = lines_of(file, 1)
    with manifest.opened(tmp_path) as made:
        made.add(line, MADE, 1, "worker 1")
    log = tmp_path / manifest.NAME
    whole = log.read_text()
    log.write_text(whole[:-20])
    with manifest.opened(tmp_path) as made:
        assert log.read_text() == "" and made.has(line)
    assert json.loads(log.read_text())["key"] == line.key


def test_files_that_cannot_be_written_leave_nothing(file, tmp_path, monkeypatch):
    (line,) = lines_of(file, 1)
    replace = os.replace

    def full(part, path):
        if str(path).endswith(".mp4"):
            raise OSError("no space left")
        replace(part, path)

    with manifest.opened(tmp_path / "out") as made:
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            made.add(line, MADE, 1, "worker 1")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_name_is_not_taken_from_another_request(file, tmp_path):
    (old,) = read(file({"prompt": "a", "name": "x"})).good
    (new,) = read(file({"prompt": "b", "name": "x"})).good
    with manifest.opened(tmp_path / "out") as made:
        made.add(old, MADE, 1, "worker 1")
        with pytest.raises(HeterostepError, match="video of another request"):
            made.has(new)


def test_one_batch_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    with (
        manifest.opened(tmp_path),
        pytest.raises(HeterostepError, match="another batch writes to"),
        manifest.opened(tmp_path),
    ):
        pass


def test_orders_know_themselves_as_plain_data():
    order = Order.of_data({"prompt": "a", "share": 0.5, "steps": 12})
    assert json.loads(json.dumps(order.data())) == order.data()
    assert order.data()["image"] is None and "dense" not in order.data()


def test_without_ray_the_command_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert cli.main(["batch", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "heterostep: a batch needs Ray: pip install '.[ray]' in heterostep's checkout\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "97x96"], "--size: width must be a multiple of 16 for this model, not 97"),
        (["--frames", "10"], "--frames must be a multiple of 4 plus 1 for this model, such as 9, not 10"),
        (["--size", "97"], "--size should be a width and a height, such as 832x480, not '97'"),
        (["--runtime", "3"], "--runtime should be from 0.001 to 1, not 3.0"),
    ],
)
def test_faults_of_the_options_are_told_before_a_worker_starts(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.setattr("heterostep.cli.batch.check_ray", lambda module, what: None)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert cli.main(["batch", str(path), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert capsys.readouterr().err == f"heterostep: {message}\n"


def test_the_command_is_there_without_importing_ray():
    code = "import sys, heterostep, heterostep.cli; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
