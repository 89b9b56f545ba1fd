"""The pages: links lead somewhere, code runs or at least compiles, and no public name is missing from the reference."""

import functools
import inspect
import os
import pydoc
import re
from pathlib import Path

import pytest
import yaml

import heterostep
from small import run, small_pipeline

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "recipes/**/*.md", "integrations/**/*.md")
    for path in ROOT.glob(pattern)
    if "_build" not in path.parts
)
# Their Python runs from the top, block after block.
RUN = ("docs/guide/first-run.md", "docs/guide/choosing-a-target.md")
# Their Python takes a pipeline `pipe` that is there already.
ON_A_PIPELINE = ("docs/background/method.md", "docs/guide/memory.md")
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


def without_code(text):
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`code`", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


@functools.cache
def anchors(path):
    """What GitHub, and the site, call the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = Path(os.path.normpath(page.parent / file)) if file else page
        assert path.exists(), f"{target} in {name}"
        assert not anchor or anchor in anchors(path), f"{target} in {name}"


def blocks(name):
    """A page's Python: (what stands behind the word python, the code)."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"^```python ?([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name)])
def test_code_compiles(name):
    for _, code in blocks(name):
        compile(code, name, "exec")


@pytest.mark.parametrize("name", RUN)
def test_code_runs_from_the_top(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = {}
    for kind, code in blocks(name):
        if kind != "skip":
            exec(compile(code, name, "exec"), page)


@pytest.mark.parametrize("name", ON_A_PIPELINE)
def test_code_runs_on_a_pipeline(name):
    pipe = small_pipeline()
    # So that there is something to report.
    with heterostep.enabled(pipe, share=0.5):
        run(pipe)
    for _, code in blocks(name):
        exec(compile(code, name, "exec"), {"pipe": pipe, "heterostep": heterostep})
    heterostep.disable(pipe)


def test_the_reference_has_every_public_name():
    reference = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)$", reference, re.MULTILINE))
    assert {f"heterostep.{name}" for name in heterostep.__all__} <= documented
    for name in documented:
        assert inspect.getdoc(pydoc.locate(name)), name


def test_the_version_and_the_address_are_the_same_everywhere():
    """`pyproject.toml`, the package and `CITATION.cff`."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    assert version == heterostep.__version__ == citation["version"]
    (repository,) = re.findall(r'^Repository = "(.+)"$', project, re.MULTILINE)
    assert repository == citation["repository-code"]
    assert all(url.startswith(repository) for url in re.findall(r'^\w+ = "(https://.+)"$', project, re.MULTILINE))


def test_the_versions_that_are_tested_are_those_that_are_pinned():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for name in ("CONTRIBUTING.md", "docs/guide/install.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for package in ("torch", "diffusers", "transformers"):
            assert pins[package] in text, f"{package} {pins[package]} in {name}"
