# Targets: see `make help`. A fresh clone needs Python and make.
PYTHON ?= python3
VENV ?= .venv
GPU ?= cuda
BIN := $(VENV)/bin
# The same path with its spaces escaped, for make's rules.
EMPTY :=
STAMPS := $(subst $(EMPTY) ,\ ,$(VENV))
CONSTRAINTS ?= constraints.txt
# What is left out: it takes minutes and depends least on the versions of JAX and Optax.
# A file of pytest's arguments, because tools/release_check.py leaves the same out.
APART := @tests/apart.txt
RECORD ?= benchmarks/records/$(shell date -u +%F)_speed
PIP := "$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

# What compiles for a TPU and for a GPU without one; each in an environment of its own.
COMPILERS ?= tpu cuda13
PEER := flashoptim-jax==0.1.0
cuda13_TOOLS := nvidia-cuda-nvdisasm==13.5.37
COMPILED ?= benchmarks/records/$(shell date -u +%F)_compiled
export ALLOW_MULTIPLE_LIBTPU_LOAD := 1

# Libraries that take an Optax optimizer.
CLIENTS ?= dm-haiku keras numpyro optimistix jaxopt blackjax flowjax netket penzai
CLIENTS_RECORD ?= tests/clients_record.json
# JAX 0.12 needs Python 3.12 or newer.
CLIENTS_PYTHON ?= $(or $(shell $(PYTHON) tools/interpreter.py 3.12),$(PYTHON))

# What `make release-check` installs the release on: one Python, or several.
PYTHONS ?= 3.11 3.12 3.13

.PHONY: help demo bench study records compiled test-compiled test-clients test test-package test-oldest test-newest test-slow test-notebooks test-gpu lint format docs check-links release-build release-check wheel clean

help:
	@echo "make demo      train a language model and a classifier with AdaM3 and AdamW (minutes)"
	@echo "make bench     measure time and memory of a step against Optax's (a quarter hour)"
	@echo "make study     compare AdaM3 with other optimizers, tuned alike (hours; goes on if stopped)"
	@echo "make records   draw the tables and figures of all records again, and those of docs/"
	@echo "make compiled  count what a step moves on a TPU and on an H100, by their compilers, without"
	@echo "               a device (downloads 4 GB; three quarters of an hour; COMPILERS=tpu or"
	@echo "               =cuda13 for one; with REQUIRE=1 none may be missing)"
	@echo "make test      lint, type-check, and run all tests but the slow ones"
	@echo "make test-package run the tests of the package alone, without lint"
	@echo "make test-oldest  the same with the oldest JAX and Optax that are supported (Python 3.11)"
	@echo "make test-newest  the same with the newest ones that can be installed, whatever is pinned"
	@echo "make test-slow run the tests that are too slow for make test (an hour)"
	@echo "make test-notebooks run all notebooks, and compare them with what they show"
	@echo "make test-compiled check the bytes on a TPU and on an H100 (COMPILERS as above)"
	@echo "make test-clients run the optimizer in libraries that take one of Optax's, and record it in"
	@echo "               $(CLIENTS_RECORD) (downloads 2 GB; ten minutes)"
	@echo "make test-gpu  run all tests but the slow ones on a GPU (GPU=cuda, or rocm); skipped where"
	@echo "               there is none"
	@echo "make lint      lint and type-check alone"
	@echo "make format    format the code"
	@echo "make docs      build the site into site/, and check its links"
	@echo "make check-links ask other hosts whether the site's links to them lead somewhere"
	@echo "make release-build  build the release, and check its files (PUBLISH=1: is it ready to publish?)"
	@echo "make release-check  build the release, and test it as installed (PYTHONS=3.11 for one Python)"
	@echo "make wheel     build dist/*.whl"
	@echo "make clean     remove what make made"
	@echo "Variables: PYTHON=python3.13 VENV=.venv313; ARGS for the demo, as ARGS='--steps 200',"
	@echo "  and for bench and study, as ARGS=--quick;"
	@echo "  RECORD, the folder that bench writes to;"
	@echo "  TEXT, a UTF-8 file for the study's language models"

demo: $(STAMPS)/.examples
	@"$(BIN)/python" examples/char_lm.py $(ARGS)
ifeq ($(filter -h --help,$(ARGS)),)
	@echo "Next: a small classifier with rare classes, on which the third moment acts."
	@"$(BIN)/python" examples/rare_classes.py
endif

bench: $(STAMPS)/.bench
	@"$(BIN)/python" benchmarks/step_time.py --out "$(RECORD)" $(ARGS)
	@"$(BIN)/python" benchmarks/memory.py --out "$(RECORD)" $(ARGS)
	@"$(BIN)/python" benchmarks/figures.py "$(RECORD)"

study: $(STAMPS)/.bench
	@"$(BIN)/python" studies/compare.py $(if $(TEXT),--text "$(TEXT)") $(ARGS)

records: $(STAMPS)/.bench
	@for record in studies/records/*/; do \
	  "$(BIN)/python" studies/compare.py --report "$$record" >/dev/null || exit 1; done
	@for lines in benchmarks/records/*/results.jsonl; do \
	  "$(BIN)/python" benchmarks/figures.py "$${lines%/*}" || exit 1; done
	@"$(BIN)/python" -m docs.tables --write studies/records/* benchmarks/records/*

# For each compiler that can be installed, runs $(1); says so in one line for the others.
# With REQUIRE=1 that line is an error, so that CI does not pass with nothing run.
define with_compilers
@for compiler in $(COMPILERS); do \
  if $(MAKE) --no-print-directory ".venv-$$compiler/.compiler" COMPILER=$$compiler \
      VENV=.venv-$$compiler; \
  then ".venv-$$compiler/bin/python" $(1) || exit 1; \
  else echo "make: jax[$$compiler] cannot be installed here, so nothing is counted for it"; \
    $(if $(REQUIRE),exit 1,true); fi; \
done
endef

compiled: $(STAMPS)/.bench
	$(call with_compilers,benchmarks/compiled.py --out "$(COMPILED)" $(ARGS))
	$(call with_compilers,benchmarks/instructions.py --out "$(COMPILED)")
	@"$(BIN)/python" benchmarks/figures.py "$(COMPILED)"
	@"$(BIN)/python" -m docs.tables "$(COMPILED)"

test-compiled:
	$(call with_compilers,-m pytest -q -n 2 tests/test_compiled.py $(TESTS))

test-clients:
	@$(MAKE) --no-print-directory run-clients PYTHON="$(CLIENTS_PYTHON)" VENV=.venv-clients \
	  CONSTRAINTS=constraints-clients.txt

.PHONY: run-clients
run-clients: $(STAMPS)/.clients
	@JAX_PLATFORMS=cpu "$(BIN)/python" -m tests.run_clients "$(CLIENTS_RECORD)" $(CLIENTS)

test: lint
	@"$(BIN)/python" -m pytest -q -n auto --maxprocesses 8 --dist worksteal $(TESTS)
	@"$(BIN)/python" -c "import jax, platform; print('Passed on Python', \
	  platform.python_version(), 'with jax', jax.__version__ + \
	  ': ruff (lint, format), mypy, and the tests counted above.')"

test-package: $(STAMPS)/.test
	@"$(BIN)/python" -m pytest -q -n auto --maxprocesses 8 $(APART) $(TESTS)
	@"$(BIN)/python" -c "import jax, optax, platform; print('Passed on Python', \
	  platform.python_version(), 'with jax', jax.__version__, 'and optax', optax.__version__)"

test-oldest:
	@$(MAKE) --no-print-directory test-package VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# Without constraints, in an environment of its own.
test-newest:
	@$(MAKE) --no-print-directory test-package VENV=.venv-newest CONSTRAINTS=/dev/null

test-slow: $(STAMPS)/.dev
	@"$(BIN)/python" -m pytest -q -n 2 -m slow
	@$(MAKE) --no-print-directory test-compiled COMPILERS=cuda13

test-notebooks: $(STAMPS)/.dev
	@"$(BIN)/python" -m pytest -q -m slow tests/test_notebook.py

# Skipped (status 0) without a GPU; status 1 where there is one that JAX cannot use.
test-gpu: $(STAMPS)/.dev
	@if JAX_PLATFORMS=$(GPU) "$(BIN)/python" -c "import jax; jax.devices()" 2>/dev/null; then \
	  ADAM3_TEST_GPU=$(GPU) XLA_PYTHON_CLIENT_PREALLOCATE=false \
	    "$(BIN)/python" -m pytest -q -n auto --maxprocesses 4; \
	elif nvidia-smi -L >/dev/null 2>&1 || rocminfo >/dev/null 2>&1; then \
	  echo "make test-gpu: there is a GPU, but JAX cannot use it as GPU=$(GPU). For CUDA, try"; \
	  echo "  '$(BIN)/python' -m pip install -c constraints.txt 'jax[cuda13]'"; exit 1; \
	else \
	  echo "make test-gpu: skipped, for neither JAX, nvidia-smi nor rocminfo finds a GPU"; \
	fi

lint: $(STAMPS)/.dev
	@"$(BIN)/ruff" check --quiet
	@"$(BIN)/ruff" format --check --quiet
	@"$(BIN)/mypy" --no-error-summary
	@"$(BIN)/zizmor" --offline -qq --format github .github

format: $(STAMPS)/.dev
	@"$(BIN)/ruff" check --fix --quiet
	@"$(BIN)/ruff" format

docs: $(STAMPS)/.docs
	@NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build --strict
	@"$(BIN)/python" tools/check_site.py site

check-links: docs
	@"$(BIN)/python" tools/check_links.py site

release-build: $(STAMPS)/.release
	@"$(BIN)/python" tools/release_build.py $(if $(PUBLISH),--publish)

release-check: release-build
	@"$(BIN)/python" tools/release_check.py --pythons $(PYTHONS) $(ARGS)

wheel: $(STAMPS)/.dev
	@"$(BIN)/python" -m hatchling build -t wheel

clean:
	rm -rf "$(VENV)" .venv .venv313 .venv-oldest .venv-newest .venv-tpu .venv-cuda13 .venv-clients build dist site out .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMPS)/.python:
	@$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  f'adam3_optax needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}.' \
	  ' Name another one: make PYTHON=python3.13')"
	@echo "Making $(VENV) and installing pinned dependencies (a minute or two) ..."
	@$(PYTHON) -m venv "$(VENV)"
	@touch "$@"

$(STAMPS)/.examples: $(STAMPS)/.python pyproject.toml $(CONSTRAINTS)
	@$(PIP) -e '.[examples]'
	@touch "$@"

$(STAMPS)/.compiler: $(STAMPS)/.python pyproject.toml $(CONSTRAINTS)
	@$(PIP) -e '.[test]' 'jax[$(COMPILER)]' $(PEER) $($(COMPILER)_TOOLS)
	@touch "$@"

$(STAMPS)/.clients: $(STAMPS)/.python pyproject.toml $(CONSTRAINTS)
	@$(PIP) -e '.[test]' $(CLIENTS)
	@touch "$@"

$(STAMPS)/.bench: $(STAMPS)/.python pyproject.toml $(CONSTRAINTS)
	@$(PIP) -e '.[bench]'
	@touch "$@"

$(STAMPS)/.test: $(STAMPS)/.python pyproject.toml $(CONSTRAINTS)
	@$(PIP) -e '.[test]'
	@touch "$@"

$(STAMPS)/.docs: $(STAMPS)/.python pyproject.toml $(CONSTRAINTS)
	@$(PIP) -e '.[docs]'
	@touch "$@"

$(STAMPS)/.release: $(STAMPS)/.python pyproject.toml $(CONSTRAINTS)
	@"$(BIN)/python" -c "import tomllib; print(*tomllib.load(open('pyproject.toml', \
	  'rb'))['project']['optional-dependencies']['release'], sep='\n')" | xargs $(PIP)
	@touch "$@"

$(STAMPS)/.dev: $(STAMPS)/.python pyproject.toml $(CONSTRAINTS)
	@$(PIP) -e '.[dev]'
	@touch "$@"
