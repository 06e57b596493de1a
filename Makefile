# make demo    the whole method on real text, in minutes, on this machine
# make test    the tests that take seconds each: six minutes on two cores
# make test-all  those and the slow ones (SLURM, browser, recipes, kills, the demo): twenty minutes
# make check   style, types, shell scripts, docs, tests
# make docs    the pages as a site, in build/docs
# make matrix  every task with every model, as tiny replicas (a quarter of an hour)
# make pythons a short run under every other Python of this machine, in environments made from nothing
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_FLAGS ?= --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all matrix check style types shell docs pythons clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/trace-ds demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" --durations=40 $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow --durations=40 $(PYTEST_FLAGS)

test-all: test test-slow

matrix: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m matrix tests/end_to_end/test_recipe_runs.py

check: style types shell docs test

style: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

shell: $(VENV)/.installed-dev
	$(BIN)/shellcheck -x slurm/*.sh tools/*.sh .ci/run

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pythons: $(VENV)/.installed-dev
	$(BIN)/python tools/try_pythons.py

$(BIN)/python:
	@sh tools/prerequisites.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@sh tools/pip_install.sh $(BIN)/python --editable '.[demo]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@sh tools/pip_install.sh $(BIN)/python --editable '.[demo,dev,docs]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
