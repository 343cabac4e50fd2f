# `make` or `make help` lists what can be made.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
ENGINES = .venv-engines

.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## virtual environment with the tested versions

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: install ## compare the three frameworks on the built-in model and task
	$(BIN)/fedtrio compare

test: install ## the whole test suite, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install ## checks that take longer
	$(BIN)/python -m pytest -m slow

test-faults: install ## kill, damage and fuzz at length
	$(BIN)/python -m pytest -m faults

test-browser: install ## the pages in a headless Chromium (apt-get install chromium)
	$(BIN)/python -m pytest -m browser -rs tests/test_browser.py

test-engines: ## over Ray and Flower, in an environment of its own: Flower wants older versions of what we use
	test -d $(ENGINES) || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install -q -c constraints-engines.txt torch
	$(ENGINES)/bin/python -m pip install -q -c constraints-engines.txt -e '.[dev,flower,ray]'
	PATH="$(CURDIR)/$(ENGINES)/bin:$$PATH" $(ENGINES)/bin/python -m pytest -m engines

lint: install ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs ## the documentation as a site in build/site, warnings as errors
	$(BIN)/python tools/configuration_page.py --check
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs . build/site

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

bench: install ## overhead and memory against a bare PyTorch loop
	$(BIN)/python benchmarks/overhead.py

clean: ## remove what was built
	rm -rf $(VENV) $(ENGINES) dist build .pytest_cache .ruff_cache

.PHONY: help install demo test test-slow test-faults test-browser test-engines lint format docs bench clean
