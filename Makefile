# Two commands do everything:   make pretrain   and   make test
#
#   make pretrain [CORPUS=path] [WORKDIR=path] [ARGS="..."]   raw text -> a small BERT, on this machine
#   make test [TESTS="..."]                                   the whole test suite
#   make setup | lint | format | clean
#
# PYTHON   interpreter for .venv (3.10 to 3.12)
# TORCH    what pip installs as torch: "torch==2.13.0" takes the wheel your index offers for it

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKDIR ?= workdir
TESTS ?= tests
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup pretrain test lint format clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 9

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"berth needs Python 3.10 to 3.12, $(PYTHON) is {v[0]}.{v[1]}; pass PYTHON=/path/to/python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "numpy>=2.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo,dev]"
	@touch $@

pretrain: setup
	$(BIN)/python -m berth.quickstart --workdir "$(WORKDIR)" $(if $(CORPUS),--corpus "$(CORPUS)") $(ARGS)

test: setup
	$(BIN)/python -m pytest $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run $(wildcard scripts/*.sh scripts/docker/*.sh slurm/*.sub slurm/*.sh)

format: setup
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
