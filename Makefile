# Two commands do everything on a machine with Python 3.11+ and make: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
UV_INSTALL := $(BIN)/uv pip install --python $(BIN)/python
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo ui explore test torture check bench pictures format lock clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-8s %s\n", $$1, $$2 }'

demo: $(INSTALLED) ## Make the demo data set, embed it, index it, search in it
	@$(BIN)/synpipe demo

ui: $(INSTALLED) ## Open the asset graph in the browser (Dagster, http://127.0.0.1:3000)
	@$(BIN)/synpipe ui

explore: $(INSTALLED) ## Open the explorer in the browser: similar synapses and the map (http://127.0.0.1:8000)
	@$(BIN)/synpipe explore

test: $(INSTALLED) check ## Run every check and every test
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

torture: $(INSTALLED) ## Kill it at every file operation, fill the disk, damage files, race (half an hour)
	@SYNPIPE_TEST_KILLS=1400 SYNPIPE_TEST_SEQUENCES=20 SYNPIPE_TEST_VERSIONS=300 $(BIN)/python -m pytest \
		synpipe_tests/end_to_end/test_interrupted.py synpipe_tests/end_to_end/test_damage.py synpipe_tests/defs/test_locks.py synpipe_tests/end_to_end/test_stateful.py \
		synpipe_tests/reports/test_versions.py::test_readers_that_never_stop_while_tables_are_rebuilt_optimised_and_cleaned

check: $(INSTALLED) ## Lint, formatting and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: $(INSTALLED) ## Measure size, speed and memory, beside other ways (installs CloudVolume, FAISS and hnswlib for it, which needs a C++ compiler)
	@$(UV_INSTALL) --quiet --constraint requirements.lock --editable '.[bench]'
	@$(BIN)/python -m synpipe_tests.bench $(BENCH)

pictures: $(INSTALLED) ## Make the pictures of the README anew from the demo (needs Chromium)
	@$(BIN)/python -m synpipe_tests.support.screenshots

format: $(INSTALLED) ## Put the code into its standard form
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

lock: $(INSTALLED) ## Write requirements.lock anew from pyproject.toml, with the newest versions
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-strip-extras --generate-hashes --upgrade \
		--no-annotate --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

clean: ## Remove the environment and the default store
	rm -rf .venv data/store

# The environment holds the exact versions of the lock file. It is brought up to date whenever that file changes.
# pip installs uv, and uv installs the rest, in parallel and with its progress on the terminal. uv does not read pip's settings: where only pip
# is configured to reach a package index, pip installs the rest too.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "synpipe needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	@echo "Installing the dependencies into .venv (once; torch is large, so this may take some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock | $(PIP) install --quiet --require-hashes --no-deps --requirement /dev/stdin
	@$(UV_INSTALL) --require-hashes --requirement requirements.lock || \
		{ echo "uv failed, so pip installs the dependencies"; $(PIP) install --require-hashes --requirement requirements.lock; }
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
