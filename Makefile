PYTHON ?= python3
PROMPT ?= a red circle moving right over blue stripes

.PHONY: demo test lint format clean

demo: .venv/.installed
	mkdir -p demo
	.venv/bin/heterostep generate "$(PROMPT)" --runtime 0.5 --both --heatmap demo/heatmap.png --report demo/report.json --out demo/video.mp4
	@echo "The video is demo/video.mp4, the heat map demo/heatmap.png, the report demo/report.json"

test: lint
	.venv/bin/pytest

lint: .venv/.installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: .venv/.installed
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:
	rm -rf .venv demo .mypy_cache .pytest_cache .ruff_cache

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -c constraints.txt -e ".[dev]"
	touch $@
