# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
#
# `make bench` and `make test` start from a bare machine: Python 3.10 or later with venv and headers, and a C++20
# compiler. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BENCH_ARGS ?=
TEST_ARGS ?=
export RESNET_FUSED_WERROR ?= 1

TORCH := torch>=2.11,<2.16
# scikit-learn ships the photographs and digits that examples and benchmarks run on.
PACKAGES := "$(TORCH)" torchvision ninja numpy "setuptools>=64" wheel pytest pybind11 matplotlib scikit-learn

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
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
# Another torch in this environment needs another build.
TORCH_FILES := $(wildcard $(ENV)/lib/python3*/site-packages/torch/version.py)

.DEFAULT_GOAL := help
.PHONY: help bench test build lint clean preflight

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10
	@echo
	@echo 'PYTHON=python3.12      the interpreter to use'
	@echo 'VENV=                  use the environment of PYTHON, keep its torch; otherwise $(VENV) is made'
	@echo 'BENCH_ARGS, TEST_ARGS  handed on; RESNET_FUSED_WERROR=0 lets warnings pass'

bench: $(BUILT)  ## build, then run the benchmarks
	$(PY) -m benchmarks $(BENCH_ARGS)

test: $(BUILT)  ## build, then run the tests
	$(PY) -m pytest tests $(TEST_ARGS)

build: $(BUILT)  ## set up the environment and build the extension in place

lint: | $(VENV_PY)  ## check the code's style with ruff and, if present, clang-format
	@$(PY) -m ruff --version >/dev/null 2>&1 || $(PY) -m pip install ruff
	$(PY) -m ruff check .
	@if command -v clang-format >/dev/null; then \
	  find csrc -type f | xargs clang-format --dry-run --Werror && echo 'clang-format: all is well'; \
	else echo 'clang-format: not installed, skipped'; fi

clean:  ## remove what was built, and the environment
	rm -rf build dist *.egg-info resnet_fused/_C.*.so $(if $(filter .venv,$(VENV)),.venv)

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
	$(PY) -m pip install --constraint $(CONSTRAINTS) $(PACKAGES)
	@touch $@

# One environment's build at a time: the extension lies in resnet_fused/, whoever built it. The stamp bears the
# time of the start, so that what is edited meanwhile is built next time.
$(BUILT): $(INSTALLED) $(SOURCES) $(TORCH_FILES)
	@mkdir -p $(@D) && rm -f build/make/built* && touch build/make/started
	$(PY) -m pip install --no-build-isolation --no-deps --editable .
	@mv build/make/started $@
