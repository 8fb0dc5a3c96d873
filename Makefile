# Targets: see `make help`. A fresh clone needs Python and make.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
GPU ?= cuda
BIN := $(VENV)/bin
INSTALL = -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
TESTED := -m pytest -q -n auto --maxprocesses 8 --dist worksteal
# What is no test of the package: it depends least on the versions of JAX and Optax.
APART := $(shell cat tests/apart.txt)
PACKAGE := $(addprefix --ignore=,$(APART))
RECORDS := benchmarks/records/$(shell date -u +%F)
AGAIN := @$(MAKE) --no-print-directory
# What compiles for a TPU and for a GPU without one, each in an environment of its own.
COMPILERS ?= tpu cuda13
BESIDE_JAX := flashoptim-jax==0.1.0 nvidia-cuda-nvdisasm==13.5.37
compiling = @set -e; export ALLOW_MULTIPLE_LIBTPU_LOAD=1; for x in $(COMPILERS); do .venv-$$x/bin/python $(1); done
# Libraries that take an Optax optimizer. JAX 0.12, which they run with, needs Python 3.12.
CLIENTS ?= dm-haiku keras numpyro optimistix jaxopt blackjax flowjax netket penzai
CLIENTS_PYTHON ?= $(or $(shell $(PYTHON) tools/interpreter.py 3.12),$(PYTHON))

.PHONY: help demo bench study records compiled test test-package test-apart test-oldest test-newest test-slow test-programs test-compiled test-clients test-gpu mutants lint format docs check-links wheel release-build release-check test-installed clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s  %s\n", $$1, $$2}' Makefile
	@echo "Variables: PYTHON=python3.13 VENV=.venv313; TESTS='-k NAME'; TEXT=FILE of study; RECORD=FOLDER of"
	@echo "bench and compiled; COMPILERS=tpu; ARGS='--steps 200' of demo, '--size tiny' of bench, --quick of study"

demo: $(VENV)/.examples ## train a language model and a classifier with AdaM3 and AdamW
	@$(BIN)/python examples/char_lm.py $(ARGS)
	@$(if $(filter -h --help,$(ARGS)),,$(BIN)/python examples/rare_classes.py)

bench: RECORD ?= $(RECORDS)_speed
bench: $(VENV)/.bench ## measure time and memory of a step against Optax's (5 minutes)
	@$(BIN)/python benchmarks/step.py --out "$(RECORD)" $(ARGS)
	@$(BIN)/python -m docs.tables --write "$(RECORD)"
study: $(VENV)/.bench ## compare AdaM3 with other optimizers, tuned alike (hours)
	@$(BIN)/python studies/compare.py $(if $(TEXT),--text "$(TEXT)") $(ARGS)
records: $(VENV)/.bench ## draw the tables and figures of all records again
	@set -e; for x in studies/records/*/; do $(BIN)/python studies/compare.py --report $$x >/dev/null; done
	@$(BIN)/python studies/mechanism.py
	@$(BIN)/python -m docs.tables --write studies/records/* benchmarks/records/*
	@$(BIN)/python -m docs.tables.picture
compiled: RECORD ?= $(RECORDS)_compiled
compiled: $(VENV)/.bench $(COMPILERS:%=.venv-%/.compiler) ## count what a step moves on a TPU and an H100 (downloads 4 GB)
	$(call compiling,benchmarks/compiled.py --out "$(RECORD)" $(ARGS))
	@$(BIN)/python -m docs.tables --write "$(RECORD)"

test: lint ## lint, type-check, and run all tests but the slow ones
	@$(BIN)/python $(TESTED) $(TESTS)
test-package: $(VENV)/.test ## run the tests of the package alone, without lint
	@$(BIN)/python $(TESTED) $(PACKAGE) $(TESTS)
test-apart: $(VENV)/.test ## run the others: of studies, examples, documentation and tools
	@$(BIN)/python $(TESTED) $(APART) $(TESTS)
test-oldest: ## test-package with the oldest JAX and Optax that are supported (Python 3.11)
	$(AGAIN) test-package VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
test-newest: ## test-package with the newest ones, whatever is pinned
	$(AGAIN) test-package VENV=.venv-newest CONSTRAINTS=/dev/null
test-slow: $(VENV)/.dev ## run the tests that are too slow for make test (an hour)
	@$(BIN)/python -m pytest -q -n 2 -m "slow or program"
	$(AGAIN) test-compiled COMPILERS=cuda13
test-programs: $(VENV)/.test ## run notebooks, examples and a study as a whole
	@$(BIN)/python -m pytest -q -n 2 -m program
test-compiled: $(COMPILERS:%=.venv-%/.compiler) ## check the bytes that a step moves on a TPU and an H100
	$(call compiling,-m pytest -q -n 2 tests/test_compiled.py $(TESTS))
test-clients: ## run the optimizer in libraries that take Optax's, and record it (2 GB)
	$(AGAIN) .venv-clients/.clients PYTHON="$(CLIENTS_PYTHON)" VENV=.venv-clients CONSTRAINTS=constraints-clients.txt
	@JAX_PLATFORMS=cpu .venv-clients/bin/python -m tests.run_clients tests/clients_record.json $(CLIENTS)
test-gpu: $(VENV)/.dev ## run all tests but the slow ones on a GPU (GPU=cuda, or rocm)
	@if JAX_PLATFORMS=$(GPU) $(BIN)/python -c "import jax; jax.devices()" 2>/dev/null; then \
	  ADAM3_TEST_GPU=$(GPU) XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python $(TESTED) --maxprocesses 4; \
	else echo "make test-gpu: skipped, for JAX finds no GPU=$(GPU)"; ! nvidia-smi -L 2>/dev/null; fi
mutants: $(VENV)/.mutants ## change the package in 200 places, and list what no test sees (hours)
	@mkdir -p out && $(BIN)/cosmic-ray init --force tests/mutation.toml out/mutants.sqlite
	@$(BIN)/python tools/sample_mutants.py out/mutants.sqlite --sample 200
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cosmic-ray exec tests/mutation.toml out/mutants.sqlite
	@$(BIN)/python tools/sample_mutants.py out/mutants.sqlite
lint: $(VENV)/.dev ## lint and type-check alone
	@$(BIN)/ruff check --quiet && $(BIN)/ruff format --check --quiet && $(BIN)/mypy --no-error-summary
	@$(BIN)/zizmor --offline -qq --format github .github
format: $(VENV)/.dev ## format the code
	@$(BIN)/ruff check --fix --quiet; $(BIN)/ruff format
docs: $(VENV)/.docs ## build the site into site/, and check its links
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
check-links: ## build the site, and ask other hosts whether its links to them lead somewhere
	$(AGAIN) docs CHECK_LINKS=true
wheel: $(VENV)/.release ## build dist/*.whl
	@$(BIN)/python -m build --no-isolation --wheel
release-build: $(VENV)/.release ## build the release into dist/, and check its files
	@rm -rf dist && $(BIN)/python -m build --no-isolation
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/check-wheel-contents dist/*.whl
release-check: release-build ## test the release as it is installed, with the oldest and newest JAX
	$(AGAIN) test-installed CONSTRAINTS=constraints-oldest.txt
	$(AGAIN) test-installed CONSTRAINTS=/dev/null
# In a folder without the package, so that the tests see what is installed.
test-installed: ## test dist/*.whl with the dependencies that CONSTRAINTS leaves
	@rm -rf out/installed && mkdir -p out/installed/beside && $(PYTHON) -m venv out/installed/venv
	@cp -r tests docs examples benchmarks tools *.md pyproject.toml out/installed/beside
	@out/installed/venv/bin/python $(INSTALL) "$$(echo dist/*.whl)[test]"
	@cd out/installed/beside && ../venv/bin/python $(TESTED) $(PACKAGE) tests --pyargs adam3_optax

clean: ## remove what make made
	rm -rf $(VENV) .venv .venv313 .venv-* build dist site out .*_cache

$(VENV)/.python:
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'PYTHON must be 3.11 or newer'"
	@echo "Making $(VENV) and installing what it needs (a minute or two) ..."
	@$(PYTHON) -m venv $(VENV) && touch $@

# An environment with the extra of that name; with the clients; with a compiler.
$(VENV)/.%: $(VENV)/.python pyproject.toml $(CONSTRAINTS)
	@$(BIN)/python $(INSTALL) -e '.[$*]' && touch $@
$(VENV)/.clients: $(VENV)/.python pyproject.toml $(CONSTRAINTS)
	@$(BIN)/python $(INSTALL) -e '.[test]' $(CLIENTS) && touch $@
.venv-%/.compiler: pyproject.toml $(CONSTRAINTS)
	$(AGAIN) $(@D)/.python VENV=$(@D)
	@$(@D)/bin/python $(INSTALL) -e '.[test]' 'jax[$*]' $(BESIDE_JAX) && touch $@
