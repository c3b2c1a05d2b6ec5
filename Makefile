# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
#
# `make bench` and `make test` start from a bare machine: Python 3.10 or later with venv and headers, and a C++20
# compiler. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BENCH_ARGS ?=
GPU_ARGS ?=
REPORT_ARGS ?=
TEST_ARGS ?=
# Processes that the tests run in, on simulated GPUs of one thread each: most of the work is Python.
TEST_JOBS ?= 2
# The simulator of tests/gpusim: the GPUs, the PTX built for each of them, the tests' markers, what is looked for,
# and how many GPUs there are.
SIM_DEVICES ?= t4 a100 h100
SIM_ARCHS ?= 7.5+PTX 8.0+PTX 9.0a+PTX
SIM_TESTS ?= cuda
# 1 leaves out the machine code, which only kernel-report and its test read.
SIM_PTX_ONLY ?=
# One case of each kind; tests/conftest.py says what the others are.
QUICK := not slow and not further
FURTHER := slow or further
export GPUSIM_CHECK ?= all
export GPUSIM_DEVICES ?= 2
export RESNET_FUSED_WERROR ?= 1
# The processes that tests start keep the bytecode of what they import.
unexport PYTHONDONTWRITEBYTECODE

# Versions differ in how they format, and in what they infer.
CLANG_FORMAT := 23.1.5
MYPY := 2.4.1
TORCH := torch>=2.11,<2.16
# scikit-learn ships the photographs and digits that examples and benchmarks run on.
PACKAGES := "$(TORCH)" torchvision ninja numpy "setuptools>=64" wheel pytest pytest-xdist pybind11 matplotlib scikit-learn
# Other software that benchmarks can race against.
PEERS := onnx onnxscript onnxruntime openvino
# Tests that want these are skipped, and say so, where they cannot be had.
WANTED := timm onnx onnxscript onnxruntime accelerate lightning torchao

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  ENV := $(shell $(PYTHON) -c 'import sys; print(sys.prefix)')
else
  PY := $(VENV)/bin/python
  VENV_PY := $(PY)
  ENV := $(abspath $(VENV))
endif

# Stamps carry their environment's name, since build/ serves several; a virtual environment holds its own, so
# that both go together.
KEY := $(subst /,_,$(ENV))
INSTALLED := $(if $(strip $(VENV)),$(VENV)/installed,build/make/installed$(KEY))
CONSTRAINTS := build/make/constraints$(KEY)
BUILT := build/make/built$(KEY)
SPACE := $(subst ,, )
SIMULATED := build/make/simulated-$(subst $(SPACE),-,$(strip $(SIM_ARCHS)))$(SIM_PTX_ONLY:1=-ptx)$(KEY)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
# Another torch in this environment needs another build.
TORCH_FILES := $(wildcard $(ENV)/lib/python3*/site-packages/torch/version.py)

# The installation keeps one core busy; another can compile what the simulator needs no torch for, where it will run.
test test-further test-cuda: MEANWHILE = \
  ! command -v nvcc >/dev/null || [ -e /dev/nvidia0 ] || GPUSIM_JOBS=1 tests/gpusim/bin/gpusim-run --interpreter-only &

# Most of what is installed is never imported, and what is compiles itself. (PIP_NO_COMPILE=1 would turn it on.)
INSTALL = $(PY) -m pip install --no-compile --constraint $(CONSTRAINTS)
WHERE := $(PY) tests/gpusim/where.py
IN_PROCESSES := -n $(TEST_JOBS) --dist worksteal
# Processes that import torch.compile start no others to compile for them.
ALONE := TORCHINDUCTOR_COMPILE_THREADS=1
RUN_TESTS := OMP_WAIT_POLICY=PASSIVE $(ALONE) $(PY) -m pytest tests $(IN_PROCESSES)
# Pytest's status 5 is that no test was chosen, which TEST_ARGS may mean.
NONE_IS_FINE = $(if $(strip $(TEST_ARGS)),|| { [ $$? = 5 ] && echo 'TEST_ARGS left none of them.'; })

.DEFAULT_GOAL := help
.PHONY: help bench gpu gpu-simulated bench-peers test test-further test-all test-cuda test-gpusim kernel-report counted-cost simulate where build dist lint clean preflight

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 15
	@echo
	@echo 'PYTHON=python3.12      the interpreter to use'
	@echo 'VENV=                  use the environment of PYTHON, keep its torch; otherwise $(VENV) is made'
	@echo 'TEST_JOBS=4            the processes that tests run in: $(TEST_JOBS)'
	@echo 'BENCH_ARGS, GPU_ARGS, TEST_ARGS  handed on; RESNET_FUSED_WERROR=0 lets warnings pass'
	@echo 'REPORT_ARGS=--write    make the table of main loops anew that kernel-report holds them to'
	@echo 'SIM_DEVICES=h100       the GPUs that test-cuda simulates where there is none: $(SIM_DEVICES)'

bench: $(BUILT)  ## build, then run the benchmarks
	$(PY) -m benchmarks $(BENCH_ARGS)

# Nothing is set up: whoever has the GPU for minutes has torch, and perhaps no network.
gpu:  ## build, test, plan and race on the GPU: nine minutes at most, without the network
	$(or $(wildcard $(VENV_PY)),$(PYTHON)) -m benchmarks.gpu $(GPU_ARGS)

gpu-simulated: $(SIMULATED)  ## the same but for the build, in tiny sizes on a simulated A100, to see it work
	@$(ENTER_SIMULATED) && GPUSIM_DEVICE=a100 $(CURDIR)/tests/gpusim/bin/gpusim-run $$python -m benchmarks.gpu \
	  --quick --no-build --minutes 30 --output $(CURDIR)/build/gpu $(GPU_ARGS)

bench-peers: $(BUILT)  ## race ResNet-50 against torch.compile, ONNX Runtime and OpenVINO, which it installs
	$(INSTALL) $(PEERS)
	$(PY) -m benchmarks --networks resnet50 --peers $(BENCH_ARGS)

test: $(BUILT)  ## build, then run one test of each kind; without a GPU, those of the CUDA kernels on a simulated one
	$(RUN_TESTS) -m '$(QUICK)' $(TEST_ARGS) $(NONE_IS_FINE)
	@where=$$($(WHERE)) && case $$where in \
	  gpu) ;; \
	  simulator) $(MAKE) --no-print-directory simulate SIM_DEVICES=a100 SIM_ARCHS=8.0+PTX SIM_PTX_ONLY=1 \
	    SIM_TESTS='cuda and $(QUICK)' ;; \
	  *) echo "The CUDA kernels were not tested: $$where." ;; \
	esac

# Other simulated GPUs have other tiles and instructions, not other logic: a case of each kind meets them.
test-further: $(BUILT)  ## run the tests that `make test` leaves; simulated are an A100, and a case of each kind on others
	$(RUN_TESTS) -m '$(FURTHER)' $(TEST_ARGS) $(NONE_IS_FINE)
	@where=$$($(WHERE)) && case $$where in \
	  gpu) ;; \
	  simulator) $(MAKE) --no-print-directory simulate SIM_DEVICES=a100 SIM_TESTS='cuda and ($(FURTHER))' && \
	    $(MAKE) --no-print-directory simulate SIM_DEVICES='t4 h100' SIM_TESTS='cuda and $(QUICK)' ;; \
	  *) echo "The CUDA kernels were not tested: $$where." ;; \
	esac

test-all:  ## run both
	$(MAKE) --no-print-directory test
	$(MAKE) --no-print-directory test-further

test-cuda: $(BUILT)  ## run all tests of the CUDA kernels on the GPU, or on simulated ones
	@where=$$($(WHERE)) && case $$where in \
	  gpu) $(PY) -m pytest tests -m cuda $(TEST_ARGS) $(NONE_IS_FINE) ;; \
	  simulator) $(MAKE) --no-print-directory simulate ;; \
	  *) echo "The CUDA kernels can't be tested here: $$where." && exit 1 ;; \
	esac

where: $(BUILT)  ## say where the CUDA kernels can be tested: gpu, simulator, or why nowhere
	@$(WHERE)

# The copy of the package comes first on Python's path: by its place, and by the working directory, which
# `python -m` puts in front.
ENTER_SIMULATED = python=$$($(PY) -c 'import sys; print(sys.executable)') && cd build/simulated && \
	export PYTHONPATH="$$PWD:$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"

simulate: $(SIMULATED)
	@$(ENTER_SIMULATED) && \
	for device in $(SIM_DEVICES); do \
	  echo "The CUDA kernels on a simulated $$device ($(SIM_TESTS)):"; \
	  { GPUSIM_DEVICE=$$device GPUSIM_THREADS=1 $(ALONE) $(CURDIR)/tests/gpusim/bin/gpusim-run \
	    $$python -m pytest $(CURDIR)/tests $(IN_PROCESSES) -m '$(SIM_TESTS)' $(TEST_ARGS) $(NONE_IS_FINE); } || exit 1; \
	done

test-gpusim: $(INSTALLED)  ## run the tests of the simulator itself
	GPUSIM_PYTHON=$(PY) tests/gpusim/tests/ptx/run.sh
	GPUSIM_CHECK= GPUSIM_DEVICES= tests/gpusim/bin/gpusim-run \
	  $(PY) -m pytest --confcutdir tests/gpusim/tests tests/gpusim/tests/runtime $(TEST_ARGS)

kernel-report: $(BUILT)  ## say what nvcc made of the CUDA kernels; spills, narrow accesses, slower main loops are errors
	@where=$$($(WHERE)) && case $$where in \
	  gpu) $(PY) -m benchmarks.kernel_report $(REPORT_ARGS) ;; \
	  simulator) $(MAKE) --no-print-directory $(SIMULATED) && \
	    $(PY) -m benchmarks.kernel_report --library build/simulated/resnet_fused/_C.*.so $(REPORT_ARGS) ;; \
	  *) echo "The CUDA kernels can't be compiled here: $$where." && exit 1 ;; \
	esac

counted-cost: $(BUILT)  ## count what the CUDA kernels move and multiply, on a simulated A100
	@where=$$($(WHERE)) && case $$where in \
	  simulator) $(MAKE) --no-print-directory $(SIMULATED) && $(ENTER_SIMULATED) && \
	    GPUSIM_DEVICE=a100 $(CURDIR)/tests/gpusim/bin/gpusim-run $$python -m benchmarks.counted_cost ;; \
	  *) echo "This is for the simulator, which is used where there is no GPU: $$where." && exit 1 ;; \
	esac

build: $(BUILT)  ## set up the environment and build the extension in place

lint: | $(INSTALLED)  ## check style and types with ruff, clang-format and mypy
	@$(PY) -c 'from importlib.metadata import version as v; v("ruff"); \
	    assert (v("clang-format"), v("mypy")) == ("$(CLANG_FORMAT)", "$(MYPY)")' 2>/dev/null || \
	  $(PY) -m pip install ruff clang-format==$(CLANG_FORMAT) mypy==$(MYPY)
	$(PY) -m ruff check .
	$(PY) -m mypy
	git ls-files csrc | grep -E '\.(cpp|h|inl|cu|cuh)$$' | \
	  xargs $(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run --Werror

dist: $(BUILT)  ## build the sdist, and from it a wheel for this torch, into dist/
	@$(PY) -m build --version >/dev/null 2>&1 || $(PY) -m pip install build  # `import build` finds the folder
	$(PY) -m build --no-isolation --skip-dependency-check --outdir dist .

clean:  ## remove what was built, and the environment
	rm -rf build dist *.egg-info resnet_fused/_C.*.so resnet_fused/built_against.txt $(if $(filter .venv,$(VENV)),.venv)

# Said at once, not after a long download.
preflight:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'resnet_fused: $(PYTHON) is not Python 3.10 or later; name one: make PYTHON=python3.12'; exit 1; }
	@$(if $(strip $(VENV)),$(PYTHON) -c 'import ensurepip; import venv' 2>/dev/null || { \
	  echo 'resnet_fused: $(PYTHON) has no venv (Debian, Ubuntu: apt-get install python3-venv)'; exit 1; })
	@$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || { \
	  echo 'resnet_fused: $(PYTHON) has no headers (Debian, Ubuntu: apt-get install python3-dev)'; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo 'resnet_fused: no C++ compiler (Debian, Ubuntu: apt-get install g++)'; exit 1; }

ifdef VENV_PY
$(VENV_PY): | preflight
	$(PYTHON) -m venv $(VENV)
endif

# A torch that is there already is pinned while the rest is installed.
$(INSTALLED): Makefile | preflight $(VENV_PY)
	@mkdir -p $(dir $(CONSTRAINTS))
	@$(PY) -c 'import importlib.metadata as m; [print("torch==" + d.version) for d in m.distributions(name="torch")]' \
	  >$(CONSTRAINTS)
	$(MEANWHILE) $(INSTALL) $(PACKAGES) && { $(INSTALL) $(WANTED) || true; }; installed=$$?; wait; exit $$installed
	@touch $@

# One environment's build at a time: the extension lies in resnet_fused/, whoever built it. The stamp bears the
# time of the start, so that what is edited meanwhile is built next time.
$(BUILT): $(INSTALLED) $(SOURCES) $(TORCH_FILES)
	@mkdir -p $(@D) && rm -f build/make/built* && touch build/make/started
	$(PY) -m pip install --no-build-isolation --no-deps --editable .
	@mv build/make/started $@

# The package once more, with its CUDA kernels, beside the build in resnet_fused/, from which it takes the objects of
# what both compile. The simulator's errors name lines.
$(SIMULATED): $(INSTALLED) $(SOURCES) $(shell find resnet_fused -name '*.py') $(TORCH_FILES)
	@mkdir -p $(@D) && rm -rf build/make/simulated* build/simulated && touch build/make/simulated-started
	FORCE_CUDA=1 RESNET_FUSED_LINEINFO=1 RESNET_FUSED_PTX_ONLY=$(SIM_PTX_ONLY) TORCH_CUDA_ARCH_LIST='$(SIM_ARCHS)' \
	  $(PY) setup.py build_py --build-lib build/simulated build_ext --build-lib build/simulated
	@mv build/make/simulated-started $@
