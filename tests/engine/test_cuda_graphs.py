"""Recorded calls: when they are replayed, and that what is replayed is what would have been called.

The recording itself is CUDA's (tests/test_gpu.py); here it is one that calls again, on the recorded inputs.
"""

import contextlib

import pytest
import torch
from peft import LoraConfig

import heterostep
from heterostep.engine import cuda_graphs
from heterostep.engine.cuda_graphs import ReplayedCalls
from heterostep.parallel import Ranks
from heterostep.pipeline import inspect
from rows import ROWS, equal, quickly

CPU = torch.device("cpu")


@pytest.fixture
def replays(monkeypatch):
    """Calls that were replayed, by how a recording is made without a GPU."""
    made = []

    def capture(call, pool):
        return lambda: (made.append(1), call())[1]

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "why_not", lambda *_: "")
    return made


def double(inputs):
    return {"twice": inputs["x"] * 2, "named": inputs["name"]}


def calls(at_once=False):
    return ReplayedCalls(torch.nn.Linear(1, 1), [], CPU, lambda: None, at_once=at_once)


def test_from_the_second_call_alike_on_it_is_replayed(replays):
    ask, kept = calls(), torch.zeros(3)
    for number in range(4):
        x = torch.full((2,), float(number))
        assert torch.equal(ask(double, {"x": x, "name": "a"}, [kept])["twice"], x * 2)
        assert len(replays) == number
        assert ask.recorded == (number > 0)


def test_what_was_recorded_before_is_recorded_at_once(replays):
    ask = calls(at_once=True)
    for number in range(3):
        x = torch.full((2,), float(number))
        assert torch.equal(ask(double, {"x": x, "name": "a"}, [])["twice"], x * 2)
        assert ask.recorded and len(replays) == number + 1


def test_where_recording_at_once_fails_the_second_call_is_recorded(replays, monkeypatch):
    capture, failures = cuda_graphs.capture, []

    def first_fails(call, pool):
        if not failures:
            failures.append(1)
            raise RuntimeError("a kernel was compiled")
        return capture(call, pool)

    monkeypatch.setattr(cuda_graphs, "capture", first_fails)
    ask = calls(at_once=True)
    for number in range(3):
        x = torch.full((2,), float(number))
        assert torch.equal(ask(double, {"x": x, "name": "a"}, [])["twice"], x * 2)
        assert ask.recorded == (number > 0)


class Two(Ranks):
    """One of two ranks; `other` is what the other one says, each time it is asked."""

    size = 2

    def __init__(self, other):
        self.other = other

    def all_reduce_min(self, values):
        return [min(value, int(next(self.other))) for value in values]


# What another rank says in turn, and how many calls were replayed after each: can calls be recorded, at once; then of
# each call whether it is alike, and once whether it was recorded.
OTHERS = {
    "as this one": ([True, False, False, True, True, True, True], [0, 1, 2, 3]),
    "with tensors in another place": ([True, False, False, True, True, False, True, True], [0, 1, 1, 2]),
    "that could not record": ([True, False, False, True, False], [0, 0, 0, 0]),
    "that has a hook": ([False, False], [0, 0, 0, 0]),
    "that has recorded such calls before": ([True, True, False, True, True, True], [0, 1, 2]),
}


@pytest.mark.parametrize(("says", "expected"), OTHERS.values(), ids=list(OTHERS))
def test_ranks_record_and_replay_together(replays, says, expected):
    ask = ReplayedCalls(torch.nn.Linear(1, 1), [], CPU, lambda: None, Two(iter(says)))
    for number, count in enumerate(expected):
        x = torch.full((2,), float(number))
        assert torch.equal(ask(double, {"x": x, "name": "a"}, [])["twice"], x * 2)
        assert len(replays) == count


def test_what_it_returns_is_not_overwritten(replays):
    ask = calls()
    out = [ask(lambda x: x["x"], {"x": torch.full((2,), float(number))}, []) for number in range(4)]
    assert [float(each[0]) for each in out] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "other",
    [
        ({"x": torch.zeros(3), "name": "a"}, 0),
        ({"x": torch.zeros(2, dtype=torch.float64), "name": "a"}, 0),
        ({"x": torch.zeros(2), "name": "b"}, 0),
        ({"x": torch.zeros(2), "name": "a"}, 1),
    ],
    ids=["shape", "dtype", "value", "place"],
)
def test_a_call_of_another_kind_is_not_replayed(replays, other):
    ask, kept = calls(), [torch.zeros(1), torch.zeros(1)]
    for _ in range(3):
        ask(double, {"x": torch.ones(2), "name": "a"}, kept[:1])
    assert len(replays) == 2
    inputs, place = other
    assert torch.equal(ask(double, inputs, [kept[place]])["twice"], inputs["x"] * 2)
    assert len(replays) == 2 and not ask.recorded


def test_a_lora_that_is_turned_down_is_noticed(replays):
    row = ROWS["wan2.1-t2v"]
    model = row.build().transformer
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    ask = ReplayedCalls(model, [], CPU, lambda: None)
    changes = (
        lambda: model.disable_adapters(),
        lambda: model.enable_adapters(),
        lambda: model.blocks[0].attn1.to_q.set_scale("default", 0.5),
        lambda: model.fuse_lora(),
    )
    for number, change in enumerate(changes):
        for _ in range(2):
            ask(double, {"x": torch.ones(2), "name": "a"}, [])
        assert ask.recorded and len(replays) == number + 1
        change()
        ask(double, {"x": torch.ones(2), "name": "a"}, [])
        assert not ask.recorded
        ask.reset()


def test_where_recording_fails_calls_go_on_as_they_are(monkeypatch, caplog):
    def capture(call, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "why_not", lambda *_: "")
    cuda_graphs._log.cache_clear()
    ask = calls()
    with caplog.at_level("INFO", logger="heterostep"):
        for number in range(4):
            x = torch.full((2,), float(number))
            assert torch.equal(ask(double, {"x": x, "name": "a"}, [])["twice"], x * 2)
    assert not ask.recorded
    assert caplog.text.count("operation not permitted when stream is capturing") == 1


def test_a_call_is_recorded_on_a_stream_of_its_own_gpu(monkeypatch):
    """Without one torch takes the stream of the GPU that it recorded on first, and nothing is recorded."""
    used = []

    class Graph:
        def replay(self):
            used.append("replayed")

    def graph(made, pool, stream, capture_error_mode):
        used.append(stream)
        return contextlib.nullcontext()

    cuda_graphs._capture_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    for device in (0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        assert cuda_graphs.capture(lambda: "outputs", lambda: None)() == "outputs"
    assert used[::2] == ["a stream of 0", "a stream of 1", "a stream of 0"] and used[1::2] == ["replayed"] * 3
    cuda_graphs._capture_stream.cache_clear()


def test_what_cannot_be_recorded_says_why():
    cuda = torch.device("cuda")
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    assert "gradients" in cuda_graphs.why_not(model, [], cuda)
    with torch.no_grad():
        assert cuda_graphs.why_not(model, [], CPU) == "the device is cpu"
        assert cuda_graphs.why_not(model, [], cuda) == ""
        handle = model[0].register_forward_hook(lambda *_: None)
        assert cuda_graphs.why_not(model, [model[0]], cuda) == ""
        assert cuda_graphs.why_not(model, [], cuda) == "Linear has a hook"
        handle.remove()
        ranks = Ranks()
        ranks.uneven = True
        assert "split unevenly" in cuda_graphs.why_not(model, [], cuda, ranks)
        model[1]._hf_hook = object()
        assert "accelerate" in cuda_graphs.why_not(model, [], cuda)


OPTIONS = {"sparse": {"sparse_share": 0.5}, "drift": {"round_robin": 4, "sync": "drift"}}
REPLAYED = ("wan2.1-i2v", "wan2.1-vace", "wan2.2-t2v", "wan2.2-ti2v-i2v", "ltx2.0-t2v", "ltx2.3-t2v", "ltx0.9-t2v")
RUNS = [(kind, name) for kind in OPTIONS for name in REPLAYED]
QUICK = [("sparse", name) for name in REPLAYED if name != "ltx2.3-t2v"] + [("drift", "wan2.2-ti2v-i2v")]


@pytest.mark.parametrize(("kind", "name"), quickly(RUNS, QUICK))
def test_replayed_runs_are_bit_identical(kind, name, replays):
    options = OPTIONS[kind]
    row = ROWS[name]
    pipe = row.build()
    with heterostep.enabled(pipe, share=0.5, dense_start=2, **options, cuda_graphs=False):
        expected = row.run(pipe, steps=12)
    assert not replays
    with heterostep.enabled(pipe, share=0.5, dense_start=2, **options):
        for _ in range(2):
            assert equal(row.run(pipe, steps=12), expected)
    assert replays


@pytest.mark.parametrize("name", ["ltx2.0-t2v", "ltx2.3-t2v"])
def test_recordings_outlive_dense_steps(name, replays):
    """Whatever LTX-2's recorded calls read stays in its place, also where dense steps take turns with sparse ones."""
    row = ROWS[name]
    pipe = row.build()
    shares = [1, 1, *[1, 0.25] * 5]
    with heterostep.enabled(pipe, share=shares, cuda_graphs=False):
        expected = row.run(pipe, steps=12)
    with heterostep.enabled(pipe, share=shares):
        assert equal(row.run(pipe, steps=12), expected)
    # Of five sparse steps all but the first, in each guidance branch.
    assert replays and len(replays) % 4 == 0


def test_only_calls_of_few_tokens_are_replayed(replays, monkeypatch):
    row = ROWS["wan2.1-t2v"]
    pipe = row.build()
    monkeypatch.setattr("heterostep.engine.cuda_graphs.MOST_ROWS", 8)
    with heterostep.enabled(pipe, share=0.5, dense_start=2, round_robin=4):
        row.run(pipe, steps=12)
    assert not replays


def test_coded_keys_and_values_are_not_replayed(replays):
    row = ROWS["wan2.1-t2v"]
    pipe = row.build()
    with heterostep.enabled(pipe, share=0.5, dense_start=2, round_robin=4, kv_store="fp8"):
        row.run(pipe, steps=12)
    assert not replays


def test_nothing_recorded_outlives_the_generation(replays):
    row = ROWS["wan2.1-t2v"]
    pipe = row.build()
    heterostep.enable(pipe, share=0.5, dense_start=2, round_robin=4)
    row.run(pipe, steps=12)
    assert replays
    assert all(not branch.replays for branch in inspect(pipe).generation.branches)
    heterostep.disable(pipe)
