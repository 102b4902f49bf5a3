# Everything is installed into .venv; pip's own settings (index, find-links) come from its environment.
.DEFAULT_GOAL := help
.PHONY: help demo serve packages test lint types wer speed identity hostile constraints clean
.DELETE_ON_ERROR:

# The first of these that is 3.11 or 3.12 and can make environments; `make PYTHON=…` names another.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& { echo $$python; break; }; done)
BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt
# torch's CUDA build asks for just this version; its CPU build would leave it open, and the pin would fit only there.
# NVRTC is not pinned: torch's CUDA build asks for its own version.
CUDA_PINS := torch==2.13.0 triton==3.7.1
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

help:  ## Show this
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.demo  ## Start the application, transcribe the bundled sample over HTTP, end it
	$(BIN)/python -m loadtest.demo

serve: .venv/.demo  ## Start the application and stay up, until Ctrl-C
	$(BIN)/whisper-serve serve

packages:  ## Install the Debian packages that some tests need, where they are missing (as root)
	@command -v promtool >/dev/null || { \
		apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends prometheus; }

test: .venv/.dev  ## Run all tests
	$(BIN)/python -m pytest

lint: .venv/.dev  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev  ## Check types
	$(BIN)/mypy

wer: .venv/.dev  ## Measure word error rates over real speech, beside openai-whisper's
	$(BIN)/python -m loadtest.wer

speed: .venv/.dev  ## Measure speed on the CPU, beside openai-whisper and faster-whisper
	$(BIN)/python -m loadtest.speed

identity: .venv/.dev  ## Compare tokens with openai-whisper's, FP32, in batches of 1 and 8
	$(BIN)/python -m loadtest.identity

hostile: .venv/.dev  ## Send odd, damaged and hostile files, and watch the server
	$(BIN)/python -m loadtest.hostile

constraints:  ## Write constraints.txt anew: what a fresh environment resolves to today
	rm -rf .venv/fresh
	$(PYTHON) -m venv .venv/fresh
	.venv/fresh/bin/python -m pip install --quiet --editable '.[dev]' $(CUDA_PINS)
	echo '# What was tested, for Python 3.11 and 3.12. Written by `make constraints`.' > constraints.txt
	.venv/fresh/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' | grep -v '^nvidia-cuda-nvrtc' >> constraints.txt
	rm -rf .venv/fresh

clean:  ## Remove the environment, caches and builds
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.demo: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[base]'
	touch $@

.venv/.dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	touch $@ .venv/.demo

$(BIN)/python:
	@test -n '$(PYTHON)' || { \
		echo 'whisper-serve needs Python 3.11 or 3.12 with its venv module (on Debian 12: apt install python3-venv),' >&2; \
		echo 'and found neither; name one by: make PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv .venv
