# Everything runs from a virtual environment of its own, which is made when it is missing.
#
#   make quickstart    train the embedded model: no GPU, no network but the package registry
#   make test          ruff, mypy and pytest: what CI runs
#   make lint          ruff and mypy alone; `make format` mends what can be mended
#   make docs          write the pages that follow from the code: knobs, commands, Python
#   make site          the pages of docs/ as a web site, build/docs/site: reads from a folder, without a network
#   make bench         compare with TRL on this machine
#   make prove         the tests that take minutes; without the network: make prove MINIGRPO_NETWORK=
#   make release-check build wheel and sdist, install each in a clean environment, run its commands
#   make setup         only the environment
#
# To override:  make setup PYTHON=python3.12 VENV=~/envs/minigrpo
#               make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
#               make quickstart ARGS="--seed 1 --run runs/second"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
TORCH ?=
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
MINIGRPO_NETWORK ?= 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := $(VENV)/.minigrpo-setup
TOOLS := $(VENV)/.minigrpo-tools
TESTED := $(VENV)/minigrpo-constraints.txt
TESTED_TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help setup quickstart test lint format docs site bench prove release-check clean

help:
	@sed -n '3,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(SETUP)

# A torch that is there already is left alone, whatever its version: only the other packages are held to the tested
# ones. Without an NVIDIA GPU a CPU build is looked for, because the default one for Linux carries gigabytes of CUDA:
# first where pip is configured to find wheels, then on PyTorch's own index. An index out of reach is passed over
# (hence --no-deps: pip would wait for it once per package).
$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if $(PIP) show --quiet torch 2>/dev/null; then echo "torch is there already: left as it is"; \
	elif [ -n "$(TORCH)" ]; then $(PIP) install $(TORCH); \
	elif nvidia-smi >/dev/null 2>&1 || [ "$$(uname)" = Darwin ]; then $(PIP) install $(TESTED_TORCH); \
	elif $(PIP) install --quiet --no-deps --no-index $(TESTED_TORCH) 2>/dev/null; then echo "torch: a local wheel"; \
	else $(PIP) install --no-deps --timeout 15 --retries 2 --extra-index-url $(CPU_INDEX) $(TESTED_TORCH); fi
	grep -v '^torch==' constraints.txt > $(TESTED)
	@echo "installing minigrpo and the tested versions of what it needs into $(VENV): about a minute"
	$(PIP) install --quiet --constraint $(TESTED) --editable '.[gguf]'
	@touch $@

$(TOOLS): $(SETUP)
	$(PIP) install --quiet --constraint $(TESTED) --editable '.[dev]'
	@touch $@

quickstart: $(SETUP)
	$(BIN)/minigrpo quickstart $(ARGS)

test: lint
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile $(ARGS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(SETUP)
	$(BIN)/python docs/generate.py

site: $(TOOLS)
	$(BIN)/python docs/build_site.py

bench: $(TOOLS)
	$(BIN)/python -m benchmarks $(ARGS)

prove: $(TOOLS)
	MINIGRPO_NETWORK=$(MINIGRPO_NETWORK) $(BIN)/python -m pytest -m long $(ARGS)

release-check:
	$(PYTHON) -m tests.helpers.release

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
