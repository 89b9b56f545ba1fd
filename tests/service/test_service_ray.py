"""The service on a real Ray Serve with two workers and the bundled model: `make test-ray`."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from heterostep.video import read_video
from processes import heed

pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
pytestmark = pytest.mark.slow
SMALL = {"prompt": "a red circle moving right", "steps": 6, "share": 0.5, "num_frames": 5, "size": "64x64"}
WIDE = {**SMALL, "size": "96x64"}
QUEUE = 30


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Service:
    """The command in a process of its own."""

    def __init__(self, *arguments, token=None, ending=signal.SIGINT):
        self.port, self.token, self.ending = free_port(), token, ending
        environment = {**os.environ} | ({} if token is None else {"HETEROSTEP_TOKEN": token})
        command = [sys.executable, "-m", "heterostep", "serve", "--port", str(self.port), *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed
        )
        line = self.process.stdout.readline()
        assert "/v1/videos" in line, self.process.stderr.read()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.process.send_signal(self.ending)
        self.out, self.err = self.process.communicate(timeout=60)

    def ask(self, method, path="", content=None, token=None):
        """Status, headers and body of an answer; the body is parsed where it is JSON."""
        headers = {"content-type": "application/json"} if content is not None else {}
        if token or self.token:
            headers["authorization"] = f"Bearer {token or self.token}"
        data = None if content is None else json.dumps(content).encode()
        url = f"http://127.0.0.1:{self.port}/v1/videos{path}"
        try:
            answer = urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            body = answer.read()
            kind = answer.headers.get("content-type", "")
            return answer.status, answer.headers, json.loads(body) if kind == "application/json" else body

    def all(self):
        return {video["id"]: video for video in self.ask("GET", "?limit=100")[2]["data"]}

    def settle(self, seconds=240):
        """All videos, once none is under way."""
        end = time.monotonic() + seconds
        while {"queued", "in_progress"} & {video["status"] for video in self.all().values()}:
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.2)
        return self.all()

    def content(self, video):
        status, headers, body = self.ask("GET", f"/{video}/content")
        assert status == 200 and headers["content-type"] == "video/mp4"
        return body

    def workers(self):
        """The processes that make videos."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in found if each.name().startswith("ray::_Actor") or "_Actor" in " ".join(each.cmdline())]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with Service("--workers", 2, "--queue", QUEUE, "--max-size", "96x96", "--folder", folder) as made:
        yield made
    assert made.process.returncode == 130 and made.err == "heterostep: interrupted\n"
    # What was finished stays, for the next service, and nothing else but the lock.
    videos = {path.parent for path in folder.glob("video_*/video.mp4")}
    assert set(folder.iterdir()) == {*videos, folder / ".lock"} and videos


def test_only_this_machine_is_listened_to(service):
    listening = [each for each in psutil.net_connections("tcp") if each.laddr and each.laddr.port == service.port]
    assert {each.laddr.ip for each in listening if each.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_fifty_at_once_some_cancelled_some_too_large(service):
    asked = []
    for number in range(50):
        sizes = SMALL if number % 2 else WIDE
        asked.append({**sizes, "seed": number} if number % 10 else {**sizes, "size": "512x512"})
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda content: service.ask("POST", "", content), asked))
    large = [answer for content, answer in zip(asked, answers) if content["size"] == "512x512"]
    rest = [(content, answer) for content, answer in zip(asked, answers) if content["size"] != "512x512"]
    assert len(large) == 5 and {status for status, _, _ in large} == {400}
    assert all("more than the 9216 pixels" in body["error"]["message"] for _, _, body in large)
    full = [answer for _, answer in rest if answer[0] == 429]
    taken = {answer[2]["id"]: content for content, answer in rest if answer[0] == 200}
    # Two run, and perhaps some were made meanwhile.
    assert len(taken) + len(full) == 45 and QUEUE <= len(taken) < 45
    assert all(int(headers["retry-after"]) >= 1 and "error" in body for _, headers, body in full)
    # The last ones wait, the first that run are running.
    running = [video for video, told in service.all().items() if told["status"] == "in_progress"]
    cancelled = [*running[:1], *list(taken)[-4:]]
    for video in cancelled:
        service.ask("DELETE", f"/{video}")
    settled = service.settle()
    assert all(settled[video]["status"] in ("cancelled", "completed") for video in cancelled)
    assert [settled[video]["status"] for video in cancelled].count("cancelled") >= 4
    made = {video for video in taken if settled[video]["status"] == "completed"}
    assert made | set(cancelled) == set(taken)
    assert all(service.ask("GET", f"/{video}/content")[0] == 409 for video in set(taken) - made)
    # Two sizes went through each worker in turn: each video is what it is alone.
    for sizes in (SMALL, WIDE):
        video = next(video for video in made if taken[video]["size"] == sizes["size"])
        _, _, alone = service.ask("POST", "", taken[video])
        assert service.settle()[alone["id"]]["status"] == "completed"
        assert service.content(alone["id"]) == service.content(video)
    assert len({service.content(video) for video in made}) == len(made)


def test_a_lost_worker_costs_no_video(service, tmp_path):
    ids = [service.ask("POST", "", {**SMALL, "steps": 30, "seed": 100 + seed})[2]["id"] for seed in range(4)]
    time.sleep(1)
    before = service.workers()
    assert len(before) == 2
    before[0].kill()
    settled = service.settle()
    assert {settled[video]["status"] for video in ids} == {"completed"}
    for video in ids:
        (tmp_path / "video.mp4").write_bytes(service.content(video))
        assert read_video(tmp_path / "video.mp4")[0].shape == (5, 64, 64, 3)


def test_what_is_finished_outlives_the_process_that_serves(service):
    video = service.ask("POST", "", {**SMALL, "seed": 200})[2]["id"]
    service.settle()
    content = service.content(video)
    found = psutil.Process(service.process.pid).children(recursive=True)
    (replica,) = (each for each in found if "ServeReplica" in " ".join(each.cmdline()))
    replica.kill()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if service.ask("GET", f"/{video}")[0] == 200:
                break
        time.sleep(0.5)
    assert service.content(video) == content
    later = service.ask("POST", "", {**SMALL, "seed": 201})[2]["id"]
    assert service.settle()[later]["status"] == "completed"


def test_a_target_in_seconds_is_the_requests_own(service):
    ids = {
        target: service.ask("POST", "", {**SMALL, "share": None, "runtime": target, "steps": 24}) for target in (0.5, 1)
    }
    settled = service.settle()
    for target, (_, _, told) in ids.items():
        report = service.ask("GET", f"/{told['id']}/content?variant=report")[2]["report"]
        assert report["runtime"]["target"] == target and settled[told["id"]]["status"] == "completed"


def test_a_token_and_a_folder_of_its_own():
    with Service("--workers", 1, token="a token of some length", ending=signal.SIGTERM) as made:
        assert made.ask("GET", token="another one")[0] == 401
        assert made.ask("GET")[2]["data"] == []
        video = made.ask("POST", "", SMALL)[2]["id"]
        assert made.settle()[video]["status"] == "completed"
    assert made.process.returncode == 130 and made.err == "heterostep: interrupted\n"


def test_a_group_of_two_processes_makes_and_cancels():
    with Service("--workers", 1, "--device", "cpu", "--gpus-per-video", 2) as made:
        long = made.ask("POST", "", {**SMALL, "steps": 100, "seed": 1})[2]["id"]
        video = made.ask("POST", "", SMALL)[2]["id"]
        end = time.monotonic() + 60
        while made.all()[long]["progress"] == 0:
            assert time.monotonic() < end
            time.sleep(0.05)
        below = psutil.Process(made.process.pid).children(recursive=True)
        ranks = [each for each in below if "heterostep.workers.rank" in each.cmdline()]
        assert len(ranks) == 2
        made.ask("DELETE", f"/{long}")
        settled = made.settle()
        assert (settled[long]["status"], settled[video]["status"]) == ("cancelled", "completed")
        report = made.ask("GET", f"/{video}/content?variant=report")[2]
        assert report["settings"]["gpus"] == 2 and all(each.is_running() for each in ranks)
    assert psutil.wait_procs(ranks, timeout=20)[1] == []


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    command = [sys.executable, "-m", "heterostep", "serve", "--port", str(free_port()), "--model", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "is not a diffusers folder" in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
