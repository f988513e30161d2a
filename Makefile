# make demo      the bundled model answers a question: NumPy only, torch is not installed
# make test      install what development needs, run the tests
# make test-all  the slow tests too, with twenty times as many generated cases
# make test-gpu  kernels, goldens and reference generations on an NVIDIA GPU
# make lint      ruff and mypy
# make mutants   do the tests notice 100 seeded mistakes in kernels? Some 20 minutes (MUTANTS="--seed 2 --count 20")
# make bench     time transformers and the machine's floor (see benchmarks/)
# make clean     remove the environment and every cache
#
# Everything is installed into .venv, which the first target makes. Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

# What `make bench` compares; the first is what the others are compared with.
ENGINES := --engine "transformers=bench_transformers.py" \
	--engine "numpy=bench_deltaloom.py --backend numpy" --engine "torch=bench_deltaloom.py --backend torch"

.PHONY: help demo test test-all test-gpu lint mutants bench clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make /make /p' Makefile

demo: $(VENV)/.core
	@$(BIN)/deltaloom generate --chat "What is the capital of France?"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "" --hypothesis-profile=all

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "gpu or not slow" tests/backends/test_cuda_kernels.py tests/backends/test_cuda_step.py tests/goldens/test_cuda.py

lint: $(VENV)/.dev
	$(BIN)/ruff check --output-format concise .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks $(wildcard examples/*.py)
	$(BIN)/mypy $(dir $(wildcard examples/plugins/*/src/*/__init__.py)) $(wildcard examples/plugins/*/*.py)

mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants.py $(MUTANTS)

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/make_midsize.py next-0.3b benchmarks/out/next-0.3b --dtype float32 --keep
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/compare.py models/tiny_next $(ENGINES)
	$(BIN)/python benchmarks/compare.py benchmarks/out/next-0.3b $(ENGINES)

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache benchmarks/out src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a set-up that is complete and no older than what it was made from is not repeated.

$(VENV)/.made:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "deltaloom needs Python 3.11 or newer, and no '$(PYTHON)' was found. Name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "deltaloom needs Python 3.11 or newer, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)." \
	    "Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make a virtual environment: its venv or ensurepip module is missing." \
	    "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "Installing deltaloom into $(VENV) (once, well under a minute)" >&2
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "Installing deltaloom with torch and the development tools into $(VENV) (once, a minute or two)" >&2
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.core

$(VENV)/.bench: $(VENV)/.dev
	@echo "Installing what the benchmarks compare with into $(VENV)" >&2
	@$(PIP) --editable '.[bench]'
	@touch $@
