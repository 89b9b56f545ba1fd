PYTHON ?= python3
PROMPT ?= a red circle moving right over blue stripes

COMPARE ?= --count 2 --points 2 --runtimes 1,0.5,0.25 --methods heterostep,steps,easycache,first-block-cache

.PHONY: compare demo test test-all test-diffusers lint format clean

demo: .venv/.library
	mkdir -p demo
	.venv/bin/heterostep generate "$(PROMPT)" --runtime 0.5 --both --report demo/report.json --out demo/video.mp4
	@echo "The video is demo/video.mp4, the report demo/report.json"

compare: .venv/.compare
	.venv/bin/heterostep compare $(COMPARE) --out report
	@echo "The page is report/index.html, every number report/results.json"

# Two processes of one thread each: threads of several processes would wait for each other.
test: lint
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2

# The suite on another version of diffusers: make test-diffusers DIFFUSERS=0.42.0
DIFFUSERS ?= 0.42.0
test-diffusers:
	$(PYTHON) -m venv .venv-diffusers
	grep -v '^diffusers==' constraints.txt > .venv-diffusers/constraints.txt
	.venv-diffusers/bin/pip install -c .venv-diffusers/constraints.txt -e ".[dev]" diffusers==$(DIFFUSERS)
	OMP_NUM_THREADS=1 .venv-diffusers/bin/pytest -n 2 -m "not slow"

lint: .venv/.dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: .venv/.dev
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:
	rm -rf .venv .venv-diffusers demo report .mypy_cache .pytest_cache .ruff_cache

# What a target needs, and no more: a demo can do without the tests' tools.
.venv/.library: EXTRA =
.venv/.compare: EXTRA = [compare]
.venv/.dev: EXTRA = [dev]
.venv/.library .venv/.compare .venv/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -c constraints.txt -e ".$(EXTRA)"
	touch $@
