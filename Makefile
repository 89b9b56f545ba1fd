PYTHON ?= python3
PROMPT ?= a red circle moving right over blue stripes

COMPARE ?= --count 2 --points 2 --runtimes 1,0.5,0.25 --methods heterostep,steps,easycache,first-block-cache

.PHONY: compare demo test lint format clean

demo: .venv/.installed
	mkdir -p demo
	.venv/bin/heterostep generate "$(PROMPT)" --runtime 0.5 --both --report demo/report.json --out demo/video.mp4
	@echo "The video is demo/video.mp4, the report demo/report.json"

compare: .venv/.installed
	.venv/bin/heterostep compare $(COMPARE) --out report
	@echo "The page is report/index.html, every number report/results.json"

test: lint
	# Two processes of one thread each: threads of several processes would wait for each other.
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2

lint: .venv/.installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: .venv/.installed
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:
	rm -rf .venv demo report .mypy_cache .pytest_cache .ruff_cache

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -c constraints.txt -e ".[dev]"
	touch $@
