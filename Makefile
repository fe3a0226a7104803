# Each target creates .venv if needed, installs what it needs, and does its job; the second time it installs nothing.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin

# The first Python on this machine that is new enough; `make PYTHON=…` chooses another.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Workers and further arguments of pytest: make test PYTEST_ARGS="tests/config -k hash"
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check
help:
	@echo "make demo   train the embedded default, then compare time and memory with exact training"
	@echo "make test   run all tests"
	@echo "make check  lint, formatting and types"

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --durations=15 $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/.created:
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11 or newer found; name one with make PYTHON=…" >&2; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

# torch comes first and in this very form, so that a machine may serve its own build of this version.
$(VENV)/.torch: $(VENV)/.created
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install torch==2.13.0
	@touch $@

$(VENV)/.installed: $(VENV)/.torch constraints.txt pyproject.toml
	$(BIN)/pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch constraints.txt pyproject.toml
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
