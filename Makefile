# make setup   the virtual environment .venv, with everything in it
# make test    lint, types and all tests; sets up first where that is missing
# make unit    the fast tests only
# make coverage   the share of lines that tests run, of TESTS=tests; at least 90% of the packages of the method
# make mutations   whether the tests notice small faults in the method; an hour, so by hand
# make docs    the documentation as HTML in site/, with warnings as errors
# make smollm2   SmolLM2-135M as models/smollm2-135m (or $BRIDLE_SMOLLM2), for recipes and tests that need a real model
# make quickstart   sets up where that is missing, and compares seven methods on the embedded world

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# An existing interpreter of another name will do.
ifeq ($(shell command -v $(PYTHON)),)
PYTHON := python3
endif
# Python compiles what it imports, once, and keeps it, whatever the environment says; pip would compile all.
export PYTHONDONTWRITEBYTECODE =
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: setup quickstart smollm2 test unit coverage mutations lint format docs clean

setup: $(VENV)/.ready

# torch comes first, pinned and by pip: left to choose, a package index may serve a build several times as large, and uv
# does not look where pip is configured to. uv installs the rest in less time; where it cannot, pip does.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]' \
		|| $(PIP) --editable '.[dev]'
	$(BIN)/python -c 'import bridle.comparison.compare'
	touch $@

quickstart: setup
	$(BIN)/bridle quickstart

smollm2: setup
	$(BIN)/python -m bridle.quickstart.smollm2 $(or $(BRIDLE_SMOLLM2),models/smollm2-135m)

test: setup lint
	$(BIN)/python -m pytest

unit: setup
	$(BIN)/python -m pytest tests/unit

coverage: setup
	$(BIN)/python -m pytest $(or $(TESTS),tests) --cov --cov-report=
	$(BIN)/coverage report
	$(BIN)/coverage report --include='*/core/*,*/training/*,*/constraints/*,*/models/*' --fail-under=90

mutations: setup
	$(BIN)/python tests/mutations.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
