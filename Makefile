# make demo | test | lint | format | sanitize | cuda-on-host | gpu-check | gpu-sanitize | clean. The first two need nothing but Python, a
# C++20 compiler and pip: they make .venv, install PyTorch and the extras, and build. PYTHON=... chooses the interpreter, VENV=... the folder.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_FLAGS ?= -n 2
OUT ?= benchmarks/results
GPU_TESTS ?= tests
SANITIZER ?= memcheck
BIN := $(VENV)/bin
LINTERS := $(shell sed -n 's/^dev = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d ,)
CPP := $(shell find csrc tests/sanitize tests/cuda_on_host -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

demo: $(VENV)/.built
	$(BIN)/python examples/demo.py

test: $(VENV)/.built
	$(BIN)/python -m pytest tests $(PYTEST_FLAGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# setuptools and ninja first: --no-build-isolation uses what is there. The editable install builds the extension in place.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q $(TORCH) "setuptools>=77,<82" ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[examples,test]"
	touch $@

# Without PyTorch and the build, which they do not need.
$(VENV)/.linters: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q $(LINTERS)
	touch $@

$(VENV)/.built: setup.py $(shell find csrc -type f) | $(VENV)/.installed
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

sanitize:
	$(MAKE) -C tests/sanitize

# The CUDA kernels compiled for the CPU, against the specification.
cuda-on-host:
	$(MAKE) -C tests/cuda_on_host

# On a machine with a Hopper GPU: builds for it with the active Python's PyTorch, tests, measures. No network. One failure stops nothing
# but the build, since the machine may be lent for this one time; the exit status tells of it.
gpu-build:
	QUANTIZE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 $(PYTHON) setup.py -q build_ext --inplace

gpu-check: gpu-build
	mkdir -p $(OUT)
	status=0; $(PYTHON) -m pytest tests -m gpu --continue-on-collection-errors || status=1; \
	for script in $(wildcard benchmarks/gpu_*.py); do \
	  PYTHONPATH=. $(PYTHON) $$script --output $(OUT)/$$(basename $$script .py).json || status=1; done; \
	exit $$status

# Without the caching allocator's pools, so that an access past a tensor is one past its memory. Calls that fail are left out: libraries
# make some on purpose. It takes long; a part: make gpu-sanitize GPU_TESTS=tests/packed/test_binary_gpu.py SANITIZER=racecheck
gpu-sanitize: gpu-build
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $(SANITIZER) --report-api-errors no --error-exitcode 1 \
	  $(PYTHON) -m pytest $(GPU_TESTS) -m "gpu and not slow"

clean:
	rm -rf build dist *.egg-info quantize/_C*.so $(VENV)/.built

.PHONY: demo test lint format sanitize cuda-on-host gpu-build gpu-check gpu-sanitize clean
