"""The service without Ray: its routes around workers that make nothing."""

import asyncio
import io
import json
import threading
import time

import pytest
from PIL import Image, ImageOps
from starlette.testclient import TestClient

from crews import ABOUT, FakeWorker
from heterostep import cli
from heterostep.cli import serve
from heterostep.errors import HeterostepError
from heterostep.order import Order, read_picture
from heterostep.service.app import application, digest
from heterostep.service.limits import Limits, Refused
from heterostep.service.store import Store
from heterostep.service.videos import KEPT, Videos

LIMITS = Limits(queue=3, pixels=64 * 96, frames=17, steps=50, upload=50_000, keep=4)
ASKED = {"prompt": "a cat", "steps": 12}


class Bench:
    """A service in its own event loop, and a client of it."""

    def __init__(self, folder, workers, limits, token=None):
        self.workers, self.gate = workers, workers[0].gate
        self.videos = Videos(workers, ABOUT, None, limits, Store(folder))
        app = application(lambda: self.videos, limits.upload, None if token is None else digest(token))
        self.client = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)

    def __enter__(self):
        self.client.__enter__()
        self.client.portal.call(self.videos.__aenter__)
        return self

    def __exit__(self, *exception):
        self.client.portal.call(self.videos.__aexit__)
        self.client.__exit__(*exception)

    def create(self, **fields):
        answer = self.client.post("/v1/videos", json={**ASKED, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def status(self, video):
        return self.client.get(f"/v1/videos/{video}").json()["status"]

    def until(self, video, status):
        end = time.monotonic() + 20
        while (now := self.status(video)) != status:
            assert time.monotonic() < end, now
            time.sleep(0.01)

    def open_gate(self):
        self.client.portal.call(self.gate.set)


@pytest.fixture
def bench(tmp_path):
    with Bench(tmp_path / "videos", [FakeWorker()], LIMITS) as made:
        yield made


def fault(answer, status):
    assert answer.status_code == status, answer.text
    content = answer.json()
    assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in content["error"]["message"]
    return content["error"]


def picture(width=64, height=64):
    out = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(out, format="PNG")
    return out.getvalue()


def test_a_video_from_its_order_to_its_end(bench, tmp_path):
    before = int(time.time())
    answer = bench.client.post("/v1/videos", json={**ASKED, "size": "64x48", "share": 0.5, "seed": 7, "seconds": "1"})
    video = answer.json()
    assert video["object"] == "video" and video["status"] == "queued" and video["progress"] == 0
    assert video["model"] == "heterostep-tiny" and video["size"] == "64x48" and video["created_at"] >= before
    assert video["heterostep"] == {"share": 0.5, "num_frames": 17, "steps": 12, "seed": 7, "summary": {}}
    bench.until(video["id"], "completed")
    told = bench.client.get(f"/v1/videos/{video['id']}").json()
    assert told["progress"] == 100 and told["error"] is None and told["completed_at"] <= told["expires_at"]
    content = bench.client.get(f"/v1/videos/{video['id']}/content")
    assert content.content == b"video of a cat 7" and content.headers["content-type"] == "video/mp4"
    report = bench.client.get(f"/v1/videos/{video['id']}/content?variant=report").json()
    assert report["report"] == {"schema": 3} and report["settings"]["seed"] == 7
    gone = bench.client.delete(f"/v1/videos/{video['id']}").json()
    assert gone == {"id": video["id"], "object": "video.deleted", "deleted": True}
    assert fault(bench.client.get(f"/v1/videos/{video['id']}"), 404)["code"] == "not_found"
    assert list((tmp_path / "videos").iterdir()) == []


def test_a_first_frame_comes_as_a_file(bench):
    files = {"input_reference": ("first.png", picture(), "image/png")}
    answer = bench.client.post("/v1/videos", data={"prompt": "a cat", "steps": "12", "seed": "2"}, files=files)
    bench.until(answer.json()["id"], "completed")
    report = bench.client.get(f"/v1/videos/{answer.json()['id']}/content?variant=report").json()
    assert report["settings"]["image"] is not None


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "say what"),
        ({"size": "1024x1024"}, "size", "more than the 6144 pixels allowed"),
        ({"size": "60x64"}, "size", "multiple of 16"),
        ({"size": "large"}, "size", "such as 832x480"),
        ({"num_frames": 10}, "num_frames", "frames must be a multiple of 4 plus 1"),
        ({"frames": 21}, "num_frames", "more than the 17 allowed"),
        ({"seconds": 60}, "num_frames", "more than the 17 allowed"),
        ({"seconds": "soon"}, "seconds", "should be a number above 0"),
        ({"seconds": 1, "num_frames": 9}, "seconds", "not both"),
        ({"steps": 51}, "steps", "more than the 50 allowed"),
        ({"runtime": 2}, "runtime", "from 0.001 to 1"),
        ({"runtime": 0.5, "share": 0.5}, "share", "not both"),
        ({"share": 0.01}, "share", "lowest possible"),
        ({"policy": "round-robin"}, "policy", "policy must be one of auto, hsa, not 'round-robin'"),
        ({"seed": -1}, "seed", "from 0"),
        ({"model": "sora-2"}, "model", "only runs heterostep-tiny"),
        ({"colour": "red"}, "colour", "no field is called 'colour'"),
        ({"input_reference": "data:"}, "input_reference", "comes as a file"),
    ],
)
def test_bad_requests_are_told_in_one_line(bench, fields, param, message):
    told = fault(bench.client.post("/v1/videos", json={**ASKED, **fields}), 400)
    assert told["param"] == param and message in told["message"] and told["type"] == "invalid_request_error"
    assert bench.workers[0].jobs == []


def test_bodies_that_are_no_request(bench):
    post = bench.client.post
    json_type = {"content-type": "application/json"}
    assert "not valid JSON" in fault(post("/v1/videos", content=b"{", headers=json_type), 400)["message"]
    assert "not a JSON object" in fault(post("/v1/videos", content=b"[]", headers=json_type), 400)["message"]
    assert fault(post("/v1/videos", content=b"hello", headers={"content-type": "text/plain"}), 415)
    assert fault(post("/v1/videos", json={"prompt": "x" * 60_000}), 413)["code"] == "too_large"
    assert fault(post("/v1/videos", content=iter([b"{}"]), headers=json_type), 411)
    two = [("prompt", (None, "a")), ("prompt", (None, "b"))]
    assert "given twice" in fault(post("/v1/videos", files=two), 400)["message"]
    broken = {"input_reference": ("first.png", b"no picture", "image/png")}
    assert fault(post("/v1/videos", data={"prompt": "a"}, files=broken), 400)["param"] == "input_reference"
    odd = {"prompt": ("a.txt", b"a cat", "text/plain")}
    assert "should not be a file" in fault(post("/v1/videos", files=odd), 400)["message"]
    wide = {"input_reference": ("wide.png", picture(400, 20), "image/png")}
    assert "would be left" in fault(post("/v1/videos", data={"prompt": "a"}, files=wide), 400)["message"]


def test_routes_that_there_are_not(bench):
    assert "no such route" in fault(bench.client.get("/v1/images"), 404)["message"]
    assert "PUT is not for this route" in fault(bench.client.put("/v1/videos"), 405)["message"]
    assert fault(bench.client.get("/v1/videos/video_x/content"), 404)
    for query in ("limit=0", "limit=many", "order=up", "after=video_x"):
        assert fault(bench.client.get(f"/v1/videos?{query}"), 400)["param"] == query.partition("=")[0]


def test_a_full_queue_says_when_to_come_again(bench):
    running = bench.create(prompt="wait")
    bench.until(running, "in_progress")
    waiting = [bench.create(seed=seed) for seed in range(3)]
    answer = bench.client.post("/v1/videos", json=ASKED)
    assert fault(answer, 429)["code"] == "queue_full" and int(answer.headers["retry-after"]) >= 1
    assert [bench.client.get(f"/v1/videos/{video}").json()["queue_position"] for video in waiting] == [0, 1, 2]
    assert fault(bench.client.get(f"/v1/videos/{running}/content"), 409)["code"] == "not_ready"
    bench.open_gate()
    for video in (running, *waiting):
        bench.until(video, "completed")


def test_many_at_once_are_no_more_than_the_queue_holds(bench):
    running = bench.create(prompt="wait")
    bench.until(running, "in_progress")
    codes = []

    def ask():
        codes.append(bench.client.post("/v1/videos", json=ASKED).status_code)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200] * 3 + [429] * 17


def test_videos_are_cancelled(bench):
    running, waiting = bench.create(prompt="wait"), bench.create()
    bench.until(running, "in_progress")
    told = bench.client.delete(f"/v1/videos/{waiting}").json()
    assert told["status"] == "cancelled" and told["error"] is None and told["deleted"] is False
    assert bench.client.delete(f"/v1/videos/{running}").json()["status"] == "cancelled"
    last = bench.create(seed=5)
    bench.until(last, "completed")
    assert bench.workers[0].jobs == [running, last]
    assert fault(bench.client.get(f"/v1/videos/{running}/content"), 409)
    assert bench.client.delete(f"/v1/videos/{running}").json()["deleted"] is True


def test_failures_are_told(bench):
    failed, good = bench.create(prompt="fail"), bench.create()
    bench.until(failed, "failed")
    told = bench.client.get(f"/v1/videos/{failed}").json()
    assert told["error"] == {"code": "generation_failed", "message": "it failed: on purpose"}
    bench.until(good, "completed")


def test_a_lost_worker_costs_no_video(bench):
    video = bench.create(prompt="die once")
    bench.until(video, "completed")
    assert bench.workers[0].starts == 1


def test_without_workers_requests_are_refused(bench):
    bench.workers[0].broken = True
    lost = bench.create()
    bench.until(lost, "failed")
    assert "no worker is left" in fault(bench.client.post("/v1/videos", json=ASKED), 503)["message"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(28, "No space left on device"), "No space left"), (TypeError("no JSON\nat all"), "no JSON")],
)
def test_what_cannot_be_kept_fails_one_video_alone(bench, monkeypatch, error, said):
    def full(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(bench.videos.store, "add", full)
        video = bench.create()
        bench.until(video, "failed")
    message = bench.client.get(f"/v1/videos/{video}").json()["error"]["message"]
    assert said in message and "\n" not in message
    bench.until(bench.create(), "completed")


def test_the_list_goes_by_pages(bench):
    ids = [bench.create(seed=seed) for seed in range(3)]
    for video in ids:
        bench.until(video, "completed")
    page = bench.client.get("/v1/videos?limit=2").json()
    assert [video["id"] for video in page["data"]] == ids[:0:-1] and page["has_more"]
    rest = bench.client.get(f"/v1/videos?limit=2&after={page['last_id']}").json()
    assert [video["id"] for video in rest["data"]] == ids[:1] and not rest["has_more"]
    oldest = bench.client.get("/v1/videos?order=asc").json()
    assert [video["id"] for video in oldest["data"]] == ids


def test_only_so_many_are_kept_and_only_so_long(bench, tmp_path, monkeypatch):
    ids = [bench.create() for _ in range(2)]
    ids += [bench.until(ids[-1], "completed") or bench.create() for _ in range(4)]
    bench.until(ids[-1], "completed")
    assert [video["id"] for video in bench.client.get("/v1/videos?order=asc").json()["data"]] == ids[2:]
    assert len(list((tmp_path / "videos").iterdir())) == 4
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    assert bench.client.get("/v1/videos").json()["data"] == [] and list((tmp_path / "videos").iterdir()) == []


def test_the_next_service_finds_what_is_kept(tmp_path):
    with Bench(tmp_path, [FakeWorker()], LIMITS) as first:
        video = first.create(seed=9)
        first.until(video, "completed")
        told = first.client.get(f"/v1/videos/{video}").json()
    (tmp_path / ".video_x.part").mkdir()
    (tmp_path / ("video_" + "0" * 32)).mkdir()
    with Bench(tmp_path, [FakeWorker()], LIMITS) as second:
        assert second.client.get(f"/v1/videos/{video}").json() == told
        assert second.client.get(f"/v1/videos/{video}/content").content == b"video of a cat 9"
        assert len(second.client.get("/v1/videos").json()["data"]) == 1 and not (tmp_path / ".video_x.part").exists()


BROKEN = [
    "{",
    "[]",
    "null",
    "[" * 100_000,
    {"object": None},
    {"object": "x"},
    {"settings": None},
    {"report": []},
    *({"object": {name: value}} for name in KEPT for value in (None, 0.5)),
]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: json.dumps(content)[:40])
def test_the_next_service_passes_over_what_it_cannot_read(tmp_path, content):
    with Bench(tmp_path, [FakeWorker()], LIMITS) as first:
        good, bad = first.create(seed=1), first.create(seed=2)
        first.until(bad, "completed")
        told = first.client.get(f"/v1/videos/{good}").json()
    path = tmp_path / bad / "video.json"
    if isinstance(content, dict):
        whole = json.loads(path.read_text())
        parts = {name: whole[name] | part if isinstance(part, dict) else part for name, part in content.items()}
        content = json.dumps(whole | parts)
    path.write_text(content)
    with Bench(tmp_path, [FakeWorker()], LIMITS) as second:
        assert second.client.get("/v1/videos").json()["data"] == [told]
        second.until(second.create(seed=3), "completed")


def test_a_token_is_asked_for_on_every_route(tmp_path):
    with Bench(tmp_path, [FakeWorker()], LIMITS, token="t" * 20) as bench:
        for method, path in (("GET", ""), ("POST", ""), ("GET", "/x"), ("GET", "/x/content"), ("DELETE", "/x")):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "t" * 20}):
                answer = bench.client.request(method, f"/v1/videos{path}", headers=headers)
                assert fault(answer, 401)["type"] == "authentication_error"
                assert answer.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer " + "t" * 20, "host": "videos.example"}
        assert bench.client.get("/v1/videos", headers=right).status_code == 200


def test_without_a_token_foreign_names_and_sites_are_refused(bench):
    get = bench.client.get
    assert "for this machine" in fault(get("/v1/videos", headers={"host": "evil.example:8000"}), 403)["message"]
    assert "another site" in fault(get("/v1/videos", headers={"origin": "http://evil.example"}), 403)["message"]
    assert get("/v1/videos", headers={"origin": "http://127.0.0.1:8000"}).status_code == 200
    assert get("/v1/videos", headers={"host": "localhost:8000"}).status_code == 200


def test_a_first_frame_waits_in_the_size_of_the_video():
    given = read_picture(picture(640, 480), "first.png")
    order = LIMITS.order({"prompt": "a", "size": "64x48"}, given, ABOUT, None)
    assert order.picture.image.size == (64, 48) and order.picture == given
    # The pipeline's own cropping leaves it as it is.
    assert ImageOps.fit(order.picture.image, (64, 48)).tobytes() == order.picture.image.tobytes()
    with pytest.raises(Refused, match="would be left"):
        LIMITS.order({"prompt": "a"}, read_picture(picture(400, 20), "first.png"), ABOUT, None)


async def until(video, status):
    for _ in range(500):
        if video.status == status:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(video.status)


def test_the_videos_that_ended_last_are_kept(tmp_path):
    workers = [FakeWorker("one"), FakeWorker("two")]

    async def walk():
        async with Videos(workers, ABOUT, None, Limits(keep=2, queue=50), Store(tmp_path)) as videos:
            long = await videos.create({"prompt": "wait", "steps": 12}, None)
            await until(long, "in_progress")
            made = [await videos.create({"prompt": f"cat {number}", "steps": 12}, None) for number in range(3)]
            for video in made:
                await until(video, "completed")
            workers[0].gate.set()
            await until(long, "completed")
            assert [video.id for video in videos.all()] == [long.id, made[2].id]
            # What came to nothing takes no video's place.
            workers[0].gate.clear()
            await videos.create({"prompt": "wait", "steps": 12}, None)
            for number in range(4):
                await videos.end(await videos.create({"prompt": f"dog {number}", "steps": 12}, None))
            assert {long.id, made[2].id} <= {video.id for video in videos.all()}
            workers[0].gate.set()

    asyncio.run(walk())


def test_what_was_lost_with_the_last_worker_has_an_end(tmp_path):
    worker = FakeWorker("one")

    async def walk():
        async with Videos([worker], ABOUT, None, Limits(keep=3, queue=50), Store(tmp_path)) as videos:
            await videos.create({"prompt": "wait", "steps": 12}, None)
            broken = await videos.create({"prompt": "die", "steps": 12}, None)
            last = await videos.create({"prompt": "cat", "steps": 12}, None)
            worker.broken = True
            worker.gate.set()
            for video in (broken, last):
                await until(video, "failed")
            videos.all()
            assert last.completed_at is not None and last.expires_at > last.completed_at

    asyncio.run(walk())


def test_limits_alone():
    order = LIMITS.order({"prompt": "a", "model": "heterostep-tiny", "seconds": 0.5}, None, ABOUT, None)
    assert isinstance(order, Order) and order.frames == 9 and order.model is None
    with pytest.raises(Refused) as told:
        LIMITS.order({"prompt": "a", "seconds": True}, None, ABOUT, None)
    assert json.loads(json.dumps(told.value.content()))["error"]["param"] == "seconds"
    assert isinstance(told.value, HeterostepError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "set HETEROSTEP_TOKEN"),
        (["--host", "192.0.2.77", "--token", "t" * 20], "cannot listen on 192.0.2.77"),
        (["--token", "short"], "16 letters and digits or more"),
        (["--max-size", "huge"], "--max-size should be"),
        (["--device", "cuda:3"], "--device is auto, cpu or cuda here"),
        (["--model", "/no/model"], "the folder /no/model does not exist"),
    ],
)
def test_the_command_used_wrongly(monkeypatch, capsys, arguments, message):
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    monkeypatch.delenv("HETEROSTEP_TOKEN", raising=False)
    assert cli.main(["serve", "--port", "8197", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_folder_is_one_services(tmp_path):
    pytest.importorskip("fcntl")
    folder = tmp_path / "videos"
    with serve._folder(folder) as place:
        assert place == folder.resolve()
        with pytest.raises(HeterostepError, match="another service keeps its videos in"), serve._folder(folder):
            pass
    with serve._folder(folder):
        pass


def test_closing_ends_what_runs(tmp_path):
    async def scene():
        async with Videos([FakeWorker()], ABOUT, None, LIMITS, Store(tmp_path)) as videos:
            video = await videos.create({"prompt": "wait"}, None)
            while video.status != "in_progress":
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(scene(), 10))
