# Every command of this repository. Needs git, make and Python >= 3.11, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
RUNS := runs

# The GPU targets install nothing: without a .venv they use the Python that has torch.
PY ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# The tensors here are small: on a busy machine of two cores the tests took 2.2 to 3 times as
# long on two threads as on one, and longer still where idle threads spin rather than sleep.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo check test bench gpu-test gpu-bench gpu

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## make .venv with everything the other targets need

demo: $(INSTALLED) ## train a RevNet and its ResNet twin on handwritten digits, compare them
	$(BIN)/python -m benchmarks.demo

check: $(INSTALLED) ## format, lint, doctests and the fast tests, in under a minute
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/python -m pytest -m "not slow"

test: check ## check, then every other test
	$(BIN)/python -m pytest -m slow

bench: $(INSTALLED) ## memory and time of training steps, here and in other libraries
	@mkdir -p $(RUNS)/bench
	$(BIN)/python -m pytest benchmarks -v --benchmark-quiet --benchmark-json=$(RUNS)/bench/own.json
	$(BIN)/python -m benchmarks.peers $(RUNS)/bench/peers
	$(BIN)/python -m revlib.benchmarking $(RUNS)/bench/own.json $(RUNS)/bench/peers/*.json \
		--command "make bench"

gpu-test: gpu ## the tests that run on a device, on the GPU
	$(PY) -m pytest tests --device cuda

gpu-bench: gpu ## the benchmarks, on the GPU; other libraries are compared by bench
	@mkdir -p $(RUNS)/gpu-bench
	$(PY) -m pytest benchmarks -v --benchmark-quiet --device cuda \
		--benchmark-json=$(RUNS)/gpu-bench/own.json
	$(PY) -m revlib.benchmarking $(RUNS)/gpu-bench/own.json --command "make gpu-bench"

gpu:
	@$(PY) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || \
		{ echo "This target needs a GPU, and torch in $(PY) sees none." >&2; exit 1; }

$(INSTALLED): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "revlib needs Python >= 3.11, and $(PYTHON) is not: try make install PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement requirements-dev.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@
