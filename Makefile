# Each target creates its environment if needed, installs what it needs, and does its job; the second time it installs
# nothing. The environment is .venv, but for `test-lowest`: .venv-lowest.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
LOWEST_VENV := .venv-lowest

# The first Python on this machine that is new enough; `make PYTHON=…` chooses another.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# The oldest Python that we support, or the next one: the lowest versions have no wheels for newer ones.
LOWEST_PYTHON ?= $(shell for p in python3.11 python3.12; do $$p -c '' 2>/dev/null && echo $$p && break; done)

# Of this machine's, those that are used.
CORES := $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))

# Workers and further arguments of pytest: make test PYTEST_ARGS="tests/config -k hash"
# One more than cores: tests of jobs wait for SLURM as much as they compute.
TEST_WORKERS ?= $(shell echo $$(($(CORES) + 1)))
PYTEST_ARGS ?=
# Files go whole to a worker, since their tests share what takes long to set up, and in order: slow ones come first.
DISTRIBUTION := --dist loadfile --no-loadscope-reorder
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(1)/bin/python -m pytest -n $(TEST_WORKERS) $(DISTRIBUTION) \
	--durations=15 $(PYTEST_ARGS)

# What reaches into other libraries' classes: models, adapters, blocks, trainers.
LOWEST_TESTS := $(addprefix tests/,models retention token_selection)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Python compiles what is imported, once; to compile all that is installed takes a minute.
export PIP_COMPILE := 0
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-lowest check
help:
	@echo "make demo         train the embedded default, then compare time and memory with exact training"
	@echo "make test         run all tests"
	@echo "make test-lowest  run what depends most on other libraries with the oldest versions of them that we support"
	@echo "make check        lint, formatting and types"

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

# SLURM comes from the distribution; where it cannot be installed, the tests that need it are skipped.
test: $(VENV)/.installed-dev
	$(BIN)/python tools/slurm_lab.py install --if-possible
	$(call PYTEST,$(VENV))

test-lowest: TEST_WORKERS := $(CORES)
test-lowest: $(LOWEST_VENV)/.installed
	$(call PYTEST,$(LOWEST_VENV)) -m "not slow and not multiprocess" $(LOWEST_TESTS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --num-workers $(CORES)

# $(call create,DIRECTORY,PYTHON,WHAT PYTHON,VARIABLE): an environment, where there is none.
define create
	@[ -n "$(2)" ] || { echo "error: no Python $(3) found; name one with make $(4)=…" >&2; exit 1; }
	@[ -x $(1)/bin/pip ] || $(2) -m venv $(1) || { rm -rf $(1); \
		echo "error: '$(2) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@
endef

$(VENV)/.created:
	$(call create,$(VENV),$(PYTHON),3.11 or newer,PYTHON)

$(LOWEST_VENV)/.created:
	$(call create,$(LOWEST_VENV),$(LOWEST_PYTHON),3.11 or 3.12,LOWEST_PYTHON)

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

# With torch's build for CUDA on x86-64, the only one on PyPI: 3 GB of wheels, which stay out of pip's cache.
$(LOWEST_VENV)/.torch: $(LOWEST_VENV)/.created constraints-lowest.txt
	$(LOWEST_VENV)/bin/pip install --no-cache-dir -c constraints-lowest.txt torch
	@touch $@

$(LOWEST_VENV)/.installed: $(LOWEST_VENV)/.torch constraints-lowest.txt pyproject.toml
	$(LOWEST_VENV)/bin/pip install --no-cache-dir -c constraints-lowest.txt -e '.[test]'
	@touch $@
