# make demo [CLIP=my.mp4]   a 4D scene from the shipped clip, or from yours; sets everything up the first time
# make test                 the whole suite; make test-fast leaves the slow tests out
# make lint | bench | clean
# make gpu-check            on a machine with a GPU and torch: build, GPU tests, all benchmarks; make gpu-sanitize
#
# Variables: PYTHON (any Python >= 3.11), CXX, U4D_CUDA=0|1, U4D_REQUIRE_KERNELS=0 (go on without a compiler), PIP_ARGS.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
export U4D_REQUIRE_KERNELS ?= 1

KERNEL_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
# Files of tests side by side; a worker takes about 1 GiB.
WORKERS ?= $(shell echo $$(( $(CORES) < 8 ? $(CORES) : 8 )))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: help demo test test-fast lint bench clean setup setup-dev

help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile

demo: setup
	$(BIN)/u4d demo $(if $(CLIP),--clip "$(CLIP)")

test: setup-dev
	$(PYTEST)

test-fast: setup-dev
	$(PYTEST) -m "not slow"

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

bench: setup-dev
	for benchmark in $(BENCHMARKS); do $(BIN)/python $$benchmark --save; done
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) build python/u4d.egg-info u4d.egg-info u4d_fast/_kernels*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up, once: pip runs again when its requirements change, the compiler when its sources do

setup: $(STAMPS)/package
setup-dev: $(STAMPS)/dev $(STAMPS)/package

$(STAMPS)/venv:
	@python=""; \
	for candidate in $${PYTHON:-python3.13 python3.12 python3.11 python3}; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "u4d: no Python >= 3.11 was found: install one, or say where it is: make PYTHON=/path/to/python3.11" >&2; exit 2; \
	fi; \
	echo "making $(VENV) with $$($$python --version)"; \
	"$$python" -m venv $(VENV) || { \
	  echo "u4d: $$python cannot make virtual environments: install its venv package (Debian: python3-venv)" >&2; exit 2; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/runtime: requirements/torch.txt requirements/runtime.txt requirements/build.txt requirements/constraints.txt | $(STAMPS)/venv
	$(PIP) install -q $(PIP_ARGS) -r requirements/torch.txt
	$(PIP) install -q $(PIP_ARGS) -r requirements/runtime.txt -r requirements/build.txt
	@touch $@

$(STAMPS)/dev: requirements/dev.txt $(STAMPS)/runtime
	$(PIP) install -q $(PIP_ARGS) -r requirements/dev.txt
	@touch $@

$(STAMPS)/package: $(STAMPS)/runtime $(KERNEL_SOURCES)
	@if [ "$$U4D_REQUIRE_KERNELS" = 1 ]; then \
	  found=""; for compiler in $${CXX:-c++ g++ clang++}; do ! command -v $$compiler >/dev/null || found=$$compiler; done; \
	  if [ -z "$$found" ]; then \
	    echo "u4d: no C++ compiler was found: install g++ (Debian: build-essential) or clang, or set CXX;" \
	      "or go on without compiled kernels, more slowly: make U4D_REQUIRE_KERNELS=0 ..." >&2; exit 2; \
	  fi; \
	fi
	@echo "building the kernels"
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

# --- a machine with a GPU where torch is already there and nothing can be downloaded
#
# gpu-check runs all parts in under 9 minutes; each also runs alone. GPU_WHEELS: a folder of wheels to install first, such
# as diffusers'. OUT: a folder that gets all results as one results.tar.gz. GPU_DEVICE=cpu: a rehearsal.

GPU_PYTHON ?= python3
GPU_DEVICE ?= cuda
GPU_LIMIT ?= 530
GPU_WHEELS ?= .wheels
GPU_PARTS := build test bench end-to-end peers report

.PHONY: gpu-check gpu-sanitize $(addprefix gpu-,$(GPU_PARTS))

gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check.py --device $(GPU_DEVICE) --limit $(GPU_LIMIT) --wheels $(GPU_WHEELS)

$(addprefix gpu-,$(GPU_PARTS)): gpu-%:
	$(GPU_PYTHON) benchmarks/gpu_check.py $* --device $(GPU_DEVICE) --limit $(GPU_LIMIT) --wheels $(GPU_WHEELS)

GPU_TESTS ?= tests/kernels
GPU_TOOLS ?= memcheck racecheck synccheck

# Graphs can't be recorded without the caching allocator, which would hide what memcheck looks for.
gpu-sanitize:
	U4D_CUDA=1 $(GPU_PYTHON) setup.py -q build_ext --inplace
	for tool in $(GPU_TOOLS); do \
	  PYTHONPATH=.:python PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(GPU_PYTHON) -m pytest -q -m gpu -k "not graph" $(GPU_TESTS); \
	done
