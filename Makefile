# make demo | test | lint | format | wheel | clean. A fresh clone needs Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test lint format wheel clean

help:
	@echo "make demo    train a small language model with AdaM3 and with AdamW (minutes)"
	@echo "make test    lint, type-check and run every test"
	@echo "make lint    lint and type-check alone"
	@echo "make format  format the code"
	@echo "make wheel   build dist/*.whl"
	@echo "make clean   remove what make made"
	@echo "Variables: PYTHON=python3.13 VENV=.venv313; ARGS for the demo, as ARGS='--steps 200'"

demo: $(VENV)/.examples
	@$(BIN)/python examples/char_lm.py $(ARGS)

test: lint
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 8
	@$(BIN)/python -c "import jax, platform; print('Passed on Python', \
	  platform.python_version(), 'with jax', jax.__version__ + \
	  ': ruff (lint, format), mypy, and the tests counted above.')"

lint: $(VENV)/.dev
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format

wheel: $(VENV)/.dev
	@$(BIN)/python -m hatchling build -t wheel

clean:
	rm -rf $(VENV) .venv .venv313 build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.python:
	@$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  f'adam3_optax needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}.' \
	  ' Name another one: make PYTHON=python3.13')"
	@echo "Making $(VENV) and installing pinned dependencies (a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.examples: $(VENV)/.python pyproject.toml constraints.txt
	@$(PIP) -e '.[examples]'
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	@$(PIP) -e '.[dev]'
	@touch $@
