# make demo: set up and run the main experiment.   make test: set up and run the tests.   Both start from bare Python 3.11.
VENV ?= .venv
SEED ?= 0
MODEL ?= qwen_vl
PYTHON := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-all lint format clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: ## make $(VENV) from the pinned list, unless it is there
	@requirements/setup_cpu.sh $(VENV)

demo: setup ## GRPO on a small Qwen2.5-VL, two CPU cores; MODEL=llava for a LLaVA-1.5, SEED=1 for another run
	@$(PYTHON) examples/demo.py SEED=$(SEED) MODEL=$(MODEL)

test: setup ## the tests that need no GPU
	@$(PYTHON) -m pytest -m "not gpu and not slow"

test-all: setup ## also the slow ones
	@$(PYTHON) -m pytest -m "not gpu"

lint: setup ## what CI checks
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

format: setup ## rewrite the files as lint wants them
	@$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .

clean: ## remove what make made, except runs/
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
