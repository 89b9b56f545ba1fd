PYTHON ?= python3
PROMPT ?= a red circle moving right over blue stripes

COMPARE ?= --count 2 --points 2 --runtimes 1,0.5,0.25 --methods heterostep,steps,easycache,first-block-cache

ROOMS ?= --seconds 1200

.PHONY: compare demo docs package rooms-model rooms-train test test-all test-diffusers test-ray lint format clean

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
	.venv-diffusers/bin/pip install --no-compile -c .venv-diffusers/constraints.txt -e ".[dev]" diffusers==$(DIFFUSERS)
	OMP_NUM_THREADS=1 .venv-diffusers/bin/pytest -n 2 -m "not slow"

# Batches and the service on a real Ray: .venv gets the extra `ray`.
test-ray: .venv/.dev
	.venv/bin/pip install --no-compile -c constraints.txt -e ".[dev,ray]"
	OMP_NUM_THREADS=1 .venv/bin/pytest tests/batch tests/service

lint: .venv/.dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: .venv/.dev
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

# The site, in docs/_build: open docs/_build/index.html. A warning is an error.
docs: .venv/.docs
	.venv/bin/sphinx-build -W --keep-going -q -b html docs docs/_build
	@echo "The site is docs/_build/index.html"

# Wheel and sdist, and whether they work outside of the checkout.
package: .venv/.dev
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv/bin/python -m build --outdir dist
	.venv/bin/python tests/packages.py dist

# The second, larger model as a release, from the weights that are kept: minutes, without a GPU.
rooms-model: .venv/.rooms
	.venv/bin/python recipes/rooms restore
	.venv/bin/python recipes/rooms assemble
	.venv/bin/python recipes/rooms release

# The same trained anew: an NVIDIA GPU, 52 GB of disk for clips. ROOMS are options of its longest stage.
rooms-train: .venv/.rooms
	.venv/bin/python recipes/rooms data --count 8000
	.venv/bin/python recipes/rooms text
	.venv/bin/python recipes/rooms vae --init src/heterostep/tiny/weights/vae --seconds 600
	.venv/bin/python recipes/rooms encode --clips runs/rooms/clips --statistics
	.venv/bin/python recipes/rooms train $(ROOMS)
	.venv/bin/python recipes/rooms assemble
	.venv/bin/python recipes/rooms check
	.venv/bin/python recipes/rooms release

clean:
	rm -rf .venv .venv-diffusers demo report dist docs/_build .mypy_cache .pytest_cache .ruff_cache

# What a target needs, and no more: a demo can do without the tests' tools.
.venv/.library: EXTRA =
.venv/.compare: EXTRA = [compare]
.venv/.dev: EXTRA = [dev]
.venv/.docs: EXTRA = [docs]
.venv/.rooms: EXTRA = [rooms]
# What is not imported need not be compiled: that would take half of the install.
.venv/.library .venv/.compare .venv/.dev .venv/.docs .venv/.rooms: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --no-compile -c constraints.txt -e ".$(EXTRA)"
	touch $@
