"""The page in headless Chromium, and its server without one."""

import contextlib
import functools
import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from heterostep import cli, tiny
from heterostep.addresses import listen
from heterostep.errors import HeterostepError
from small import small_pipeline

server = pytest.importorskip("heterostep.ui.server", reason="the extra ui is not installed")
jobs = pytest.importorskip("heterostep.ui.jobs")

SMALL = {"height": 64, "width": 64, "num_frames": 9, "fps": 16, "guidance_scale": 3.0}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of a page that makes videos with the small pipeline, and its studio."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETEROSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(tiny, "DEFAULTS", SMALL)
        patch.setattr(tiny, "load", functools.lru_cache(lambda image_to_video=False: small_pipeline(image_to_video)))
        with listen("127.0.0.1", 0) as sock, jobs.Studio() as studio:
            serving = server.Server(studio, sock)
            thread = threading.Thread(target=serving.serve_until_told)
            thread.start()
            yield server.address(sock), studio
            serving.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium: install your distribution's package, such as chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install 'heterostep[dev]'")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture
def visit(site, browser):
    """Opens the page as another person would each time; at the end nothing may have failed or been asked elsewhere."""
    url, studio = site
    asked, faults, contexts = [], [], []

    def opened(width=1280, steps=None):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, reduced_motion="reduce"))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        contexts[-1].on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        # A refused form is an answer, and the browser's console counts it as a fault.
        page.on(
            "console", lambda said: faults.append(said.text) if said.type == "error" and "422" not in said.text else 0
        )
        page.goto(url)
        page.locator("#estimate:not(:empty)").wait_for()
        page.locator("#more > summary").click()
        page.locator("#dial").select_option("share")
        page.locator("#steps").fill(str(steps or 6))
        return page

    yield opened
    for job in list(studio._jobs.values()):
        studio.cancel(job)
    for context in contexts:
        context.close()
    assert not faults
    elsewhere = [url_ for url_ in asked if not url_.startswith((url, "blob:" + url.rstrip("/")))]
    assert asked and not elsewhere


def counts(said):
    """Whether a line of the browser's console is a fault; it reports refused forms, too, which are answers."""
    return said.type == "error" and "422" not in said.text


def eventually(page, condition):
    """Waits until an expression in the page's script is true; the page's policy keeps Playwright's own way out."""
    end = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def sideways(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def image_file(width=64, height=64, name="first.png"):
    out = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), (200, 30, 30), np.uint8)).save(out, format="PNG")
    return {"name": name, "mimeType": "image/png", "buffer": out.getvalue()}


def test_a_video_is_made_and_plays_in_step_beside_the_dense_one(visit):
    page = visit()
    assert "unknown yet" in page.locator("#estimate").inner_text()
    page.locator("#generate").click()
    page.locator("#made").wait_for()
    assert re.search(r"of the dense time, \d+\.\d dB PSNR", page.locator("#verdict").inner_text())
    assert page.locator("#strip i").count() == 6 and page.locator("#strip i.run").count() == 3
    assert page.locator("#code").inner_text() == "heterostep.enable(pipe, share=0.5)"
    assert "asked 0.50" in page.locator("#summary").inner_text()
    assert "3 times" in page.locator("#heat-caption").inner_text()
    # Both have come, and both are moved by the one slider and the buttons.
    eventually(page, "[...document.querySelectorAll('video')].every((video) => video.readyState >= 2)")
    times = "[...document.querySelectorAll('video')].map((video) => video.currentTime)"
    page.locator("#moment").fill("0.5")
    assert page.locator("#play").inner_text() == "Play"
    dense, fast = page.evaluate(times)
    assert dense == fast == pytest.approx(4.5 / 16, abs=0.01)
    page.locator("#forth").click()
    dense, fast = page.evaluate(times)
    assert dense == fast == pytest.approx(5.5 / 16, abs=0.01)
    page.locator("#play").click()
    assert page.locator("#play").inner_text() == "Pause"
    eventually(
        page,
        "(([a, b]) => !a.paused && !b.paused && a.currentTime > 0.1 &&"
        " Math.abs(a.currentTime - b.currentTime) < 1 / 16)([...document.querySelectorAll('video')])",
    )
    with page.expect_download() as saved:
        page.locator("#downloads a", has_text="report").click()
    assert json.loads(saved.value.path().read_text())["share"]["achieved"] == 0.5
    # The next estimate is of seconds, the dense video is not made again, and the session is there after a reload.
    page.locator("#estimate", has_text="the dense video is there already").wait_for()
    assert "About" in page.locator("#estimate").inner_text()
    page.reload()
    page.locator("#made").wait_for()
    page.locator("#history button[aria-current=true]").wait_for()
    assert sideways(page) == 0
    page.set_viewport_size({"width": 390, "height": 800})
    assert sideways(page) == 0


def test_a_run_shows_where_it_is_and_is_cancelled_while_another_waits(visit):
    first, second = visit(steps=1000), visit(width=390)
    first.locator("#generate").click()
    first.locator("#counts", has_text="step").wait_for()
    first.set_viewport_size({"width": 390, "height": 800})
    assert sideways(first) == 0 and first.locator("#strip").evaluate(
        "(strip) => strip.scrollWidth <= strip.clientWidth"
    )
    assert first.locator("#generate").is_disabled() and first.locator("#strip i.ahead").count() > 0
    second.locator("#generate").click()
    second.locator("#phase", has_text="next in the queue").wait_for()
    second.locator("#history li").wait_for()
    assert first.locator("#history li").count() == second.locator("#history li").count() == 1
    first.reload()
    first.locator("#counts", has_text="step").wait_for()
    first.locator("#cancel").click()
    first.locator("#ended", has_text="Cancelled").wait_for()
    assert first.locator("#generate").is_enabled()
    second.locator("#made").wait_for()
    assert sideways(second) == 0


def test_a_first_frame_is_uploaded_and_drawn(visit):
    page = visit(width=390)
    page.locator("#image").set_input_files(image_file(96, 64))
    page.locator("#image-note", has_text="96 x 64: its middle is cropped to 64 x 64").wait_for()
    assert page.locator("#preview").is_visible() and sideways(page) == 0
    page.locator("#remove").click()
    page.locator("#draw").click()
    page.locator("#preview").wait_for()
    page.locator("#dense").uncheck()
    page.locator("#generate").click()
    page.locator("#made").wait_for()
    assert page.locator("#dense-figure").is_hidden() and "from first.png" in page.locator("#made-prompt").inner_text()
    page.locator("#prompt").fill("a cat")
    page.locator("#draw").click()
    page.locator('[data-error="prompt"]:not(:empty)').wait_for()


def test_faults_are_told_where_they_are(visit):
    page = visit(width=390)

    def error(field):
        place = page.locator(f'[data-error="{field}"]:not([hidden])')
        place.wait_for()
        return place.inner_text()

    page.locator("#prompt").fill("   ")
    page.locator("#generate").click()
    assert error("prompt") == "The prompt is empty: say what the video should show."
    page.locator("#prompt").fill("a red circle moving right")
    assert page.locator('[data-error="prompt"]').is_hidden()
    page.locator("#image").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    assert "x.png cannot be read as an image" in error("image")
    page.locator("#image").set_input_files(image_file(400, 40))
    assert "10% of it would be left" in error("image")
    page.locator("#target").fill("0.05")
    assert "lowest possible" in error("target")
    page.locator("#target").fill("0.5")
    page.locator("#model").fill("/no/such/folder")
    page.locator("#generate").click()
    assert error("model") == "The folder /no/such/folder does not exist." and sideways(page) == 0
    page.locator("#model").fill("")
    page.locator("#frames").fill("8")
    page.locator("#generate").click()
    assert "a multiple of 4 plus 1" in error("frames")
    page.locator("#ended", has_text="It could not be made").wait_for()
    page.locator("#plan_vram").fill("-1")
    page.locator("#plan-form button").click()
    page.locator("#plan-error", has_text="Memory should be a number").wait_for()
    page.locator("#plan_vram").fill("24")
    page.locator("#plan-form button").click()
    page.locator("#plan-verdict", has_text="It fits").wait_for()
    assert sideways(page) == 0


@pytest.mark.slow
def test_a_page_whose_program_was_ended_says_so(site, browser):
    context = browser.new_context()
    page = context.new_page()
    page.goto(site[0])
    page.locator("#estimate:not(:empty)").wait_for()
    context.set_offline(True)
    page.locator("#generate").click()
    page.locator("#lost", has_text="does not answer").wait_for()
    context.set_offline(False)
    page.locator("#target").fill("0.75")
    page.locator("#lost").wait_for(state="hidden")
    context.close()


def asked(site, path, method="GET", body=None, **headers):
    """Status, headers and text of a plain request."""
    connection = http.client.HTTPConnection(site[0].split("/")[2])
    connection.request(method, path, body, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def test_other_sites_cannot_use_the_page(site):
    form = {"content_type": "application/x-www-form-urlencoded"}
    status, headers, _ = asked(site, "/")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    assert asked(site, "/", host="evil.example")[0] == 400
    for own in ("127.0.0.2:7860", "[::1]:7860", "localhost"):
        assert asked(site, "/", host=own)[0] == 200
    assert asked(site, "/api/jobs", "POST", "prompt=x", origin="http://evil.example", **form)[0] == 403
    assert asked(site, "/api/jobs", "POST", "prompt=", origin=site[0].rstrip("/"), **form)[0] == 422
    assert asked(site, "/api/jobs", "POST", "", content_length="50000000", **form)[0] == 413


def test_a_plan_tells_the_steps_by_the_task(site):
    def planned(fields):
        form = "plan_model=wan2.2-ti2v-5b&plan_width=128&plan_height=128&plan_frames=9" + fields
        headers = {"content_type": "application/x-www-form-urlencoded"}
        status, _, text = asked(site, "/api/plan", "POST", form, **headers)
        assert status == 200, text
        return json.loads(text)["lines"]["evaluated at first"]

    text, image = planned(""), planned("&plan_image=on")
    assert text.startswith("all tokens at steps 1-") and image.startswith("all tokens at steps 1-") and text != image


def test_a_job_gives_out_its_own_files_alone(site):
    url, studio = site
    _, _, text = asked(
        site, "/api/jobs", "POST", "prompt=x&dial=share&steps=2", content_type="application/x-www-form-urlencoded"
    )
    job = studio.find(json.loads(text)["id"])
    while job.state not in jobs.FINAL:
        time.sleep(0.01)
    base = f"/api/jobs/{job.id}/"
    status, _, part = asked(site, base + "heterostep.mp4", range="bytes=4-7")
    assert (status, part) == (206, "ftyp")
    for path in (base + "nothing.mp4", base + "..%2f..%2fpasswd", base + "%2fetc%2fpasswd"):
        assert asked(site, path)[0] == 404
    status, _, text = asked(site, "/api/jobs/unknown")
    assert status == 422 and "not kept" in text


def test_what_the_command_cannot_do_is_one_line(site, capsys):
    port = site[0].rstrip("/").split(":")[-1]
    assert cli.main(["ui", "--port", port, "--no-open"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"cannot listen on 127.0.0.1, port {port}" in err and "--port" in err
    assert cli.main(["ui", "--port", "0", "--model", "/no/such/folder", "--no-open"]) == 2
    assert capsys.readouterr().err == "heterostep: --model: the folder /no/such/folder does not exist\n"


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "localhost", "0.0.0.0"])
def test_which_addresses_are_this_machines_own(host, monkeypatch, capsys):
    """Elsewhere nobody may load folders or download models through the page, and any name will do for it."""
    try:
        listen(host, 0).close()
    except HeterostepError:
        pytest.skip(f"there is no {host} here")
    made = []
    monkeypatch.setattr(jobs, "Studio", lambda *args, only: made.append(only) or contextlib.nullcontext())
    monkeypatch.setattr(server.Server, "serve_until_told", lambda serving: made.append(serving.config.app))
    assert cli.main(["ui", "--host", host, "--port", "0", "--no-open", "--device", "cpu"]) == 0
    local = host != "0.0.0.0"
    assert made[0] is not local and ("Whoever can reach" in capsys.readouterr().err) is not local
    (guard,) = made[1].user_middleware
    assert guard.kwargs == {"local": local}


def test_without_the_extra_the_command_names_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["ui"]) == 2
    assert "pip install '.[ui]' in heterostep's checkout" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_it_and_leaves_no_files(tmp_path):
    command = [sys.executable, "-m", "heterostep", "ui", "--port", "0", "--no-open", "--device", "cpu"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as started:
        address = re.search(r"http://127\.0\.0\.1:\d+/", started.stdout.readline()).group()
        form = {"content_type": "application/x-www-form-urlencoded"}
        assert asked((address,), "/api/jobs", "POST", "prompt=x&steps=1000", **form)[0] == 201
        assert list(tmp_path.glob("heterostep-ui-*"))
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=120)
    assert (started.returncode, err) == (130, "heterostep: interrupted\n")
    assert not list(tmp_path.iterdir())
