# make demo    train a one-step generator of MNIST digits on this CPU   (FAST=1: 8x8 digits, a minute)
# make test    lint, format, types, tests   (make test-slow: the long ones)
# make test-sanitized   the C++ library under AddressSanitizer and UndefinedBehaviorSanitizer (TESTS=file ARGS="-k drift")
# make docs    the site, in build/site
# make gpu     build, test, check and time all GPU kernels (OUT=runs/gpu, WHEELS=folder with wheels of peers)
# make gpu-tests   the GPU tests: on a GPU, else on an interpreter where nvcc is found (tests/ptx/README.md)
# make demo and the tests set up .venv the first time and whenever what they install from has changed.
PYTHON ?= python3
BIN := .venv/bin
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -name '*.[ch]*' -o -name '*.inl')
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

ifdef FAST
DEMO := --data digits --out runs/digits
else
DEMO := --data mnist5k --out runs/mnist5k
endif

CPP_SOURCES = $(shell find csrc tests \( -path tests/ptx/build -o -path tests/ptx/out \) -prune \
  -o \( -name '*.[ch]*' -o -name '*.inl' \) -print)

# Where no .venv was set up, the Python that has torch.
GPU_PYTHON := $(or $(wildcard $(BIN)/python),$(PYTHON))
OUT ?= runs/gpu

# A file's tests stay in one process: they share trained runs, emulators and compiled formulas.
PYTEST := $(BIN)/pytest --doctest-modules --numprocesses logical --dist loadscope
NVCC := $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc $(CUDA_HOME)/bin/nvcc))

.PHONY: demo docs test test-slow test-sanitized lint bench gpu gpu-tests ptx-selftest ptx-fuzz clean

demo: .venv/ready
	$(BIN)/fewstep train wflow $(DEMO) --overwrite

test: .venv/ready lint
	$(PYTEST) -m 'not slow'

test-slow: .venv/ready
	$(PYTEST) -m slow

# A build and a copy of the package of its own, which `make test` does not see.
test-sanitized: .venv/ready
	FEWSTEP_CUDA=0 FEWSTEP_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitized \
	  --build-lib build/sanitized/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  FEWSTEP_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized/lib \
	  $(BIN)/pytest -q -m 'not slow' --numprocesses 1 $(or $(TESTS),tests) $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.table --check

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: .venv/ready
	$(INSTALL) '.[bench]' --no-build-isolation
	for family in sinkhorn trace heun jvp attention; do $(BIN)/python -m benchmarks.run $$family --peers || exit 1; done
	$(BIN)/python -m benchmarks.table
	for family in sinkhorn trace heun jvp attention; do \
	  $(BIN)/python -m benchmarks.targets benchmarks/results/$${family}_cpu.csv || missed=1; \
	done; exit $${missed:-0}

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS))

gpu-tests:
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(GPU_PYTHON) -m pytest -m gpu -q $(or $(TESTS),tests) $(ARGS); \
	elif [ -n "$(NVCC)" ]; then \
	  $(MAKE) -C tests/ptx gpu-tests; \
	else \
	  echo 'gpu-tests: skipped, neither a GPU nor nvcc was found'; \
	fi

ptx-selftest ptx-fuzz:
	$(MAKE) -C tests/ptx $(@:ptx-%=%)

.venv/ready: $(BUILD_INPUTS)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch 'setuptools>=77' wheel pybind11 ninja numpy
	FEWSTEP_CUDA=$${FEWSTEP_CUDA:-auto} $(INSTALL) --no-build-isolation --editable '.[dev,train,triton,keops]'
	$(INSTALL) --no-deps torchcfm  # it would bring torchvision, which does not load beside a CPU's torch
	touch $@

clean:
	rm -rf .venv build dist runs tests/ptx/build tests/ptx/out
