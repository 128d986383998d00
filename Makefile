# On a machine with Python 3.11 or newer and make, `make demo` and `make test` need nothing else: they install what they use into .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The certificates of the system, as pip uses them: a company or a laboratory may have its own.
UV_INSTALL := $(BIN)/uv pip install --system-certs --python $(BIN)/python
# Three test processes keep two cores busy: tests wait for daemons, servers and browsers a third of their time. Tests of one file
# share fixtures, so they run in one process.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo ui explore quick test torture check bench pictures format lock clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-8s %s\n", $$1, $$2 }'

demo: $(INSTALLED) ## Make the demo data set, embed and index it, and search it
	@$(BIN)/synpipe demo

ui: $(INSTALLED) ## Open the asset graph in the browser (Dagster, http://127.0.0.1:3000)
	@$(BIN)/synpipe ui

explore: $(INSTALLED) ## Open the explorer in the browser: similar synapses and the map (http://127.0.0.1:8000)
	@$(BIN)/synpipe explore

quick: check ## Run every check and the fast tests (two minutes)
	@$(PYTEST) -q -m "not slow"

test: check ## Run every check and every test (ten minutes)
	@$(PYTEST)

torture: $(INSTALLED) ## Kill it at every file operation, fill the disk, damage files, race runs (an hour and a half)
	@SYNPIPE_TEST_KILLS=1400 SYNPIPE_TEST_DAMAGE=2000 SYNPIPE_TEST_SEQUENCES=20 SYNPIPE_TEST_VERSIONS=300 $(BIN)/python -m pytest \
		synpipe_tests/end_to_end/test_interrupted.py synpipe_tests/end_to_end/test_damage.py \
		synpipe_tests/end_to_end/test_any_damage.py \
		synpipe_tests/end_to_end/test_stateful.py synpipe_tests/defs/test_locks.py \
		synpipe_tests/index/test_versions.py::test_readers_that_never_stop_while_tables_are_rebuilt_optimised_and_cleaned

check: $(INSTALLED) ## Check lint, formatting, types and the import contracts
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

bench: $(INSTALLED) ## Measure size, speed and memory beside other tools (installs CloudVolume, FAISS and hnswlib; needs a C++ compiler)
	@$(UV_INSTALL) --quiet --constraint requirements.lock --editable '.[bench]'
	@$(BIN)/python -m synpipe_tests.bench $(BENCH)

pictures: $(INSTALLED) ## Take the pictures of the README from the demo again (needs Chromium)
	@$(BIN)/python -m synpipe_tests.support.screenshots

format: $(INSTALLED) ## Fix lint and formatting
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

lock: $(INSTALLED) ## Update requirements.lock to the newest versions that pyproject.toml allows
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-strip-extras --generate-hashes --upgrade \
		--no-annotate --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

clean: ## Remove the environment and the default store
	rm -rf .venv data/store

# The environment holds the exact versions of the lock file. It is updated whenever that file changes.
# pip installs uv; uv installs everything else in parallel and shows its progress. uv does not read pip's settings, so pip takes over where
# only pip knows how to reach a package index.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "synpipe needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	@echo "Installing the dependencies into .venv. This happens once and may take some minutes, because torch is large."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock | $(PIP) install --quiet --require-hashes --no-deps --requirement /dev/stdin
	@$(UV_INSTALL) --require-hashes --requirement requirements.lock || \
		{ echo "uv failed. Installing with pip instead."; $(PIP) install --require-hashes --requirement requirements.lock; }
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
