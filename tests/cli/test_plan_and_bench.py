"""`heterostep plan` and `heterostep bench` as they are typed."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional

from heterostep import cli, configs
from heterostep.kv.cache import STORES
from heterostep.planning.plan import plan
from small_wan import small_wan

SIZE = ["--height", "64", "--width", "64", "--frames", "9"]
PLAN = ["plan", "--model", "wan2.1-t2v-1.3b"]
BENCH = ["bench", "--config", "model", *SIZE, "--repeats", "1", "--shares", "0.5", "--device", "cpu"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    small_wan("wan2.1-t2v").save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path, saved):
    """A working directory that holds a small pipeline alone, a cache beside it, no GPU, and a wide terminal."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model").symlink_to(saved, target_is_directory=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HETEROSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def tf32():
    """What `use_tf32` does is undone at the end, or by `undo`."""
    before, attend = torch.get_float32_matmul_precision(), functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", attend)
        yield patch
    torch.set_float32_matmul_precision(before)


def files():
    return sorted(path.name for path in Path().iterdir())


def fails(capsys, *arguments):
    """The one line on stderr of a command that fails and writes nothing."""
    before = files()
    assert cli.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and files() == before and not Path("../cache").exists()
    assert err.startswith("heterostep: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


def works(capsys, *arguments, code=0):
    assert cli.main(list(arguments)) == code
    return capsys.readouterr()


def rows(out, first):
    """The cells of a table's rows that begin with one of these."""
    lines = [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in out.splitlines()]
    return {tuple(line) for line in lines if line[0] in first}


def test_plan_shows_every_store(capsys):
    out, err = works(capsys, *PLAN, "--offload", "model", "--vram", "80", "--sparse-share", "0.2")
    made = plan("wan2.1-t2v-1.3b", runtime=0.5, offload="model", vram=80, sparse_share=0.2)
    assert err == ""
    assert "32,760 tokens (21 x 30 x 52), 2 transformer calls a step" in out
    assert "50; runtime 0.5: 0.500 of the dense token evaluations" in out
    assert "transformer 2.8 GB" in out and "text_encoder" not in out and "seconds" not in out
    table = {row[0]: row[1:] for row in rows(out, STORES)}
    assert table["device"][:2] == ("12.1 GB", "0 bytes") and set(table) == set(STORES)
    for store in made.stores:
        assert table[store.store][2] == f"{store.peak_bytes / 1e9:.1f} GB" and table[store.store][3] == "yes"
    assert "may use      76.8 GB of the device, a margin left" in out
    assert f"chosen       device: peak {made.peak_bytes / 1e9:.1f} GB" in out


def test_an_option_goes_on_working_under_its_old_name(capsys):
    for old in (["--between", "0.2"], ["--between=0.2"]):
        assert cli.main([*PLAN, "--no-kv", *old]) == 2
        told, error = capsys.readouterr().err.splitlines()
        assert told == "heterostep: --between is called --sparse-share now" and "--sparse-share or --no-kv" in error


def test_plan_says_what_does_not_fit(capsys):
    out, _ = works(capsys, *PLAN, "--vram", "6", "--policy", "hsa", code=1)
    assert "chosen       nothing fits" in out
    assert "give plan and generate --offload model, or leave out --sparse-share and --policy" in out
    assert {row[-1] for row in rows(out, STORES)} == {"no"}
    out, _ = works(capsys, *PLAN, "--vram", "6", code=1)
    less = "make a smaller or shorter video"
    assert f"this does not fit: {less}, or give plan and generate --offload model\n" in out and "chosen" not in out
    out, _ = works(capsys, *PLAN, "--vram", "1", "--offload", "model", code=1)
    assert f"this does not fit: {less}, or generate with --offload sequential\n" in out
    out, _ = works(capsys, *PLAN, "--vram", "1", "--gpus", "2", code=1)
    assert f"this does not fit: {less}\n" in out
    sparse = ["--kv-store", "fp8", "--share", "0.55", "--sparse-share", "0.2"]
    out, _ = works(capsys, *PLAN, "--vram", "6", *sparse, code=1)
    assert "chosen       fp8: peak" in out and "this does not fit" in out and "share 0.55" in out
    assert json.loads(works(capsys, *PLAN, "--vram", "6", "--json", code=1)[0])["chosen"]["fits"] is False


def test_plan_without_known_memory(capsys):
    arguments = ["plan", "--model", "model", *SIZE, "--steps", "12"]
    out, _ = works(capsys, *arguments, "--kv-store", "offload", "--sparse-share", "0.2")
    assert {row[-1] for row in rows(out, STORES)} == {"?"} and "may use" not in out
    assert "chosen       offload: peak" in out and "in host memory" in out and "fit" not in out.split("chosen")[1]
    out, _ = works(capsys, *arguments)
    assert "run's peak   " in out and "none are kept" in out and not rows(out, STORES) and "no effect" not in out
    out, _ = works(capsys, *arguments, "--kv-store", "fp8")
    assert "none are kept: a step evaluates all tokens or none; --kv-store has no effect" in out
    out, _ = works(capsys, *arguments, "--share", "0.55")
    assert "0.55 with single tokens, where their K and V fit: give the gigabytes of a GPU as --vram" in out
    out, _ = works(capsys, *arguments, "--share", "0.55", "--vram", "0.0001", code=1)
    assert out.splitlines()[-3].endswith("0.55 with single tokens, where their K and V fit")


def test_plan_as_json(capsys):
    arguments = [*SIZE, "--steps", "12", "--runtime", "0.6", "--guidance", "3", "--vram", "1", "--kv-store", "fp8"]
    out, err = works(capsys, "plan", "--model", "model", *arguments, "--sparse-share", "0.2", "--json")
    assert err == "" and out.count("\n") == 1
    options = dict(height=64, width=64, num_frames=9, num_inference_steps=12, guidance_scale=3.0)
    made = plan("model", runtime=0.6, sparse_share=0.2, vram=1.0, kv_store="fp8", **options)
    assert json.loads(out) == json.loads(made.to_json())


def test_plan_of_an_image_to_video_run(capsys):
    arguments = ["plan", "--model", "wan2.2-ti2v-5b", "--height", "128", "--width", "128", "--frames", "9", "--json"]
    assert json.loads(works(capsys, *arguments)[0])["pipeline"] == "WanPipeline"
    assert json.loads(works(capsys, *arguments, "--image-to-video")[0])["pipeline"] == "WanImageToVideoPipeline"
    text, _ = works(capsys, *arguments[:-1], "--steps", "8")
    image, _ = works(capsys, *arguments[:-1], "--steps", "8", "--image-to-video")
    assert "at first     all tokens at steps 1-3, 6\n" in text and "advice" not in text
    assert "(WanImageToVideoPipeline, from a first frame)" in image
    assert "at first     all tokens at steps 1-2, 4, 7\n" in image and "advice       with 8 steps from a first" in image
    # By the command's option, not by the argument of a call.
    assert "4 steps may give" in image and "num_inference_steps" not in image


def test_the_known_models_are_listed(capsys):
    out, err = works(capsys, "plan", "--list")
    assert out.split() == list(configs.names()) and err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "give --model: a hub id, a folder, or one of ltx-2, "),
        (["plan", "--model", "magic"], "magic is neither"),
        ([*PLAN, "--runtime", "0.5", "--share", "0.5"], "give --runtime or --share, not both"),
        ([*PLAN, "--no-kv", "--sparse-share", "0.5"], "give --sparse-share or --no-kv, not both"),
        ([*PLAN, "--runtime", "0.01"], "runtime=0.01 is below the lowest possible"),
        ([*PLAN, "--runtime", "0"], "runtime must be above 0"),
        ([*PLAN, "--share", "nan"], "share must be above 0"),
        ([*PLAN, "--vram", "0"], "vram must be gigabytes above 0 and below 1,000,000, not 0"),
        ([*PLAN, "--vram", "-4"], "vram must be gigabytes above 0 and below 1,000,000, not -4"),
        ([*PLAN, "--vram", "inf"], "vram must be gigabytes above 0 and below 1,000,000, not inf"),
        ([*PLAN, "--vram", "much"], "--vram"),
        (
            [*PLAN, "--kv-store", "tape"],
            "--kv-store must be one of auto, device, fp8, offload, fp8-offload, not 'tape'",
        ),
        ([*PLAN, "--policy", "round-robin"], "heterostep: --policy must be one of auto, hsa, not 'round-robin'"),
        ([*PLAN, "--offload", "disk"], "heterostep: --offload must be one of none, model"),
        ([*PLAN, "--sparse-share", "2"], "--sparse-share"),
        ([*PLAN, "--steps", "0"], "--steps"),
        ([*PLAN, "--height", "0"], "--height"),
        ([*PLAN, "--height", "100"], "heterostep: --height must be a multiple of 16 for this model, not 100"),
        ([*PLAN, "--image-to-video"], "does not take a first frame"),
        ([*PLAN, "--guidance", "nan"], "guidance"),
        ([*PLAN, "--dtype", "int3"], "--dtype"),
        ([*PLAN, "--attention-backend", "nonsense"], "no such attention backend: nonsense"),
        ([*PLAN, "--nonsense"], "--nonsense"),
    ],
)
def test_plan_used_wrongly(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "10"], "--frames must be a multiple of 4 plus 1 for this model, such as 9, not 10"),
        (["--height", "100"], "--height must be a multiple of 16 for this model, not 100"),
        (["--width", "20000"], "--width can be 1024 at the most for this model, not 20000"),
    ],
)
def test_what_generate_refuses_is_refused_alike(capsys, monkeypatch, arguments, message):
    for module in ("heterostep.planning.plan.dry_run", "heterostep.bench.dry_run"):
        monkeypatch.setattr(module, lambda *args, **options: pytest.fail("it went on"))
    for command in (["generate", "a cat", "--model"], ["plan", "--model"], ["bench", "--config"]):
        assert fails(capsys, *command, "model", *arguments) == f"heterostep: {message}\n"


def test_bench_shows_tables_and_one_line_of_json(capsys):
    out, err = works(capsys, *BENCH, "--stores", "device, fp8", "--layers", "2", "--json", "result.json")
    *shown, line = out.splitlines()
    result = json.loads(line)
    assert json.loads(Path("result.json").read_text()) == result
    assert files() == ["model", "result.json"] and Path("../cache/timings.jsonl").is_file()
    assert (result["layers"], result["tokens"], result["dtype"], result["device"]) == (2, 48, "float32", "cpu")
    assert "model, 2 layers, 48 tokens, float32, eager, cpu: a plain dense call takes" in " ".join(shown)
    table = {row[:2]: row[2:] for row in rows("\n".join(shown), ("device", "fp8"))}
    assert set(table) == {(store, share) for store in ("device", "fp8") for share in ("all, K/V kept", "0.5")}
    for row in result["rows"]:
        cells = table[row["store"], "all, K/V kept" if row["share"] == 1 else "0.5"]
        assert cells[0] == f"{row['seconds'] * 1000:.1f}" and cells[1] == f"{row['ratio']:.4f}"
        # 2 * layers * (tokens + states of the text) * dim * 4 bytes.
        assert row["store"] != "device" or row["device_bytes"] == 2 * 2 * (48 + 512) * 48 * 4
        assert row["store"] != "device" or cells[2:] == ("430.1 kB", "0 bytes")
    kinds = {row[0] for row in rows("\n".join(shown), ("plain", "dense", "0.5"))}
    assert kinds == {"plain", "dense", "0.5"} and "scatter" in out
    assert "between GPUs" in result["breakdown"]["plain"] and "between GPUs" not in " ".join(shown)
    assert err.splitlines()[0] == "building model with 2 layers on cpu" and "round 1/1: " in err.splitlines()[-1]


def test_bench_quietly(capsys):
    out, err = works(capsys, *BENCH, "--quiet", "--dtype", "bfloat16", "--layers", "1")
    assert err == "" and out.count("\n") == 1
    assert json.loads(out)["dtype"] == "bfloat16"


def test_a_plan_shows_the_seconds_of_a_bench(capsys):
    result = json.loads(works(capsys, *BENCH, "--quiet")[0])
    out, _ = works(capsys, "plan", "--model", "model", *SIZE, "--steps", "10", "--share", "0.5", "--dtype", "float32")
    assert f"dense {20 * result['plain_seconds']:.1f} (cpu)" in out


def test_a_plan_of_tf32_has_seconds_of_its_own(capsys, tf32):
    result = json.loads(works(capsys, *BENCH, "--quiet", "--dtype", "tf32")[0])
    arguments = ["plan", "--model", "model", *SIZE, "--steps", "10", "--sparse-share", "0.2", "--json", "--dtype"]
    made = json.loads(works(capsys, *arguments, "tf32")[0])
    assert result["dtype"] == "tf32" and made["dense_seconds"] == pytest.approx(20 * result["plain_seconds"])
    tf32.undo()
    plain = json.loads(works(capsys, *arguments, "float32")[0])
    assert plain["dense_seconds"] is None and plain["stores"] == made["stores"]
    # Without a GPU that is what auto is.
    assert json.loads(works(capsys, *arguments, "auto")[0]) == plain


def test_out_of_memory_in_a_bench_is_one_line(capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("heterostep.bench.bench", fail)
    assert "out of memory: lower the size, or take fewer --layers" in fails(capsys, *BENCH)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "--config"),
        (["bench", "--config", "magic"], "magic is neither"),
        ([*BENCH, "--shares", "half"], "--shares expects numbers, as in 0.5,0.25, not 'half'"),
        ([*BENCH, "--shares", ""], "--shares expects numbers"),
        ([*BENCH, "--shares", "0.5,1"], "shares must be above 0 and below 1"),
        ([*BENCH, "--shares", "0,0.5"], "shares must be above 0 and below 1"),
        ([*BENCH, "--shares", "nan"], "shares must be above 0 and below 1"),
        ([*BENCH, "--dtype", "int3"], "--dtype"),
        ([*BENCH, "--stores", "device,tape"], "no such store: tape"),
        ([*BENCH, "--stores", ""], "no such store"),
        ([*BENCH, "--layers", "4"], "model has 3 layers, not 4"),
        ([*BENCH, "--layers", "0"], "--layers"),
        ([*BENCH, "--repeats", "0"], "--repeats"),
        ([*BENCH, "--device", "abacus"], "unknown device"),
        ([*BENCH, "--json", "nowhere/result.json"], "there is no folder nowhere"),
        ([*BENCH, "--json", "result.txt"], ".json"),
        ([*BENCH, "--nonsense"], "--nonsense"),
    ],
)
def test_bench_used_wrongly(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


def test_an_attention_backend_that_is_not_for_this_device_is_one_line(capsys):
    said = fails(capsys, *BENCH, "--quiet", "--device", "cpu", "--attention-backend", "_native_cudnn")
    assert "_native_cudnn failed on cpu: leave out --attention-backend, or use a GPU (" in said


def test_an_attention_backend_that_bench_does_not_know(capsys):
    assert cli.main([*BENCH, "--quiet", "--attention-backend", "nonsense"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "heterostep: no such attention backend: nonsense\n" and files() == ["model"]
