# Two commands do everything:  make quickstart   make test
# They need Python 3.11 or newer and nothing else; what they install goes into .venv.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
CANDIDATES := python3 python3.13 python3.12 python3.11 python
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo $$p; break; }; done)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
RESULTS := results/quickstart

.DEFAULT_GOAL := help
.PHONY: help quickstart test clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|' 2>/dev/null \
		|| grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed ## profile, train, evaluate and ask with the bundled model (7 minutes on 2 cores)
	$(BIN)/budgetvlm quickstart --output_dir $(RESULTS)

test: $(VENV)/.installed-dev ## run every check that continuous integration runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile -m 'not alone'
	$(BIN)/pytest -m alone

clean: ## remove the environment and the caches; results stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find src tests experiments benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make the environment again only when what it is made from has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or newer among: $(CANDIDATES) (python3 here: $$(python3 --version 2>&1 | head -n 1))."; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 quickstart"; exit 2; fi
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); budgetvlm needs Python 3.11 or newer."; \
		echo "Name another one: make PYTHON=/path/to/python3.11 quickstart"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 2; }
