# Every command of this repository. Needs git, make and Python >= 3.11, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
RUNS := runs

# The GPU targets install nothing: without a .venv they use the Python that has torch.
PY ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# As many processes as there are cores, each with up to 2 GB. The tests of a file share one, and
# with it what takes long to make: a wheel, a run of the demo, the compiled kernels.
PROCESSES ?= logical
TESTS := $(BIN)/python -m pytest --numprocesses $(PROCESSES) --maxprocesses 8 \
	--dist loadfile --no-loadscope-reorder
# The tests compile more than 3,000 variants of the kernels, a number of processes at a time.
GPU_PARTS := $(addprefix gpu-test-,1 2 3 4 5 6 7 8 9 10 11 12)

# The tensors here are small: on a busy machine of two cores the tests took 2.2 to 3 times as
# long on two threads as on one, and longer still where idle threads spin rather than sleep.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY := PASSIVE

# The tests start a hundred processes, and each would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo check test bench bench-flows bench-exact gpu-test gpu-bench gpu $(GPU_PARTS)

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## make .venv with everything the other targets need

demo: $(INSTALLED) ## train a RevNet beside its ResNet twin, and two flows, on small data
	$(BIN)/python -m benchmarks.demo

check: $(INSTALLED) ## format, lint, doctests and the fast tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(TESTS) -m "not slow"

test: check ## check, then every other test
	$(TESTS) -m slow

bench: $(INSTALLED) ## memory and time of training steps, here and in other libraries
	@mkdir -p $(RUNS)/bench
	$(BIN)/python -m pytest benchmarks -v --benchmark-quiet --benchmark-json=$(RUNS)/bench/own.json
	$(BIN)/python -m benchmarks.peers $(RUNS)/bench/peers
	$(BIN)/python -m revlib.benchmarking $(RUNS)/bench/own.json $(RUNS)/bench/peers/*.json \
		--command "make bench"

bench-flows: $(INSTALLED) ## flows, here and in other libraries: make bench-flows DATA=cifar10.npz
	@test -n "$(DATA)" || { echo "Name a file of images: make $@ DATA=cifar10.npz" >&2; exit 1; }
	$(BIN)/python -m benchmarks.flows "$(DATA)"

bench-exact: $(INSTALLED) ## drift, exact chains and what they cost: make bench-exact DATA=cifar10.npz
	@test -n "$(DATA)" || { echo "Name a file of images: make $@ DATA=cifar10.npz" >&2; exit 1; }
	$(BIN)/python -m benchmarks.exactness "$(DATA)"

# Triton computes on the GPU, and fuses multiplications and additions as users' Triton does.
gpu-test gpu-bench gpu $(GPU_PARTS): export TRITON_INTERPRET := 0
gpu-test gpu-bench gpu $(GPU_PARTS): export TRITON_DEFAULT_FP_FUSION := 1

gpu-test: gpu ## the tests that run on a device, on the GPU
	@$(MAKE) --no-print-directory --keep-going --jobs --output-sync $(GPU_PARTS)

$(GPU_PARTS): gpu-test-%:
	timeout --signal INT 480 $(PY) -m pytest tests --device cuda --part $*/$(words $(GPU_PARTS)) \
		--quiet --continue-on-collection-errors

gpu-bench: gpu ## kernels and steps on the GPU, in 9 minutes; other libraries are compared by bench
	@mkdir -p $(RUNS)/gpu-bench
	@failed=0; \
	$(PY) -m benchmarks.kernels_on_gpu $(RUNS)/gpu-bench --minutes 5 || failed=1; \
	$(PY) -m pytest benchmarks -v --benchmark-quiet --device cuda --minutes 2 \
		--benchmark-json=$(RUNS)/gpu-bench/own.json || failed=1; \
	$(PY) -m revlib.benchmarking $(RUNS)/gpu-bench/own.json --command "make gpu-bench" \
		|| failed=1; \
	exit $$failed

# Kernels lie outside the package's folder: without an installation nobody finds them.
gpu:
	@$(PY) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || \
		{ echo "This target needs a GPU, and torch in $(PY) sees none." >&2; exit 1; }
	@$(PY) -c 'import os, revlib.kernels as k; assert os.path.samefile(*k.__path__, "kernels")' \
		2>/dev/null || $(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .

$(INSTALLED): requirements-dev.txt tests/peers.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "revlib needs Python >= 3.11, and $(PYTHON) is not: try make install PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement requirements-dev.txt
	$(BIN)/python -m pip install --no-deps --requirement tests/peers.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@
