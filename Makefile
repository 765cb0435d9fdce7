# `make` without a target lists all targets. Packages are installed into .venv. Only ci-deps,
# chromium, npm and test-pythons need root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
SANDBOX_PORT ?= 9100
MINUTES ?= 10
SOAK_SECONDS ?= 900

.DEFAULT_GOAL := help
.PHONY: help demo run test test-all format docs bench scale soak bench-stream bench-page stream-soak truth-soak drill
.PHONY: screenshots ci-deps chromium npm clean test-pythons

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo ## Run the gateway with simulated exchanges and a Valkey server; Ctrl-C stops all
	@$(BIN)/python -m src.sandbox.demo --host $(HOST) --port $(PORT) --sandbox-port $(SANDBOX_PORT)

# Same options as in the Dockerfile, which explains them.
SOCKETS := --ws-max-size 65536 --ws-ping-interval 20 --ws-ping-timeout 20 --ws-per-message-deflate false
run: $(VENV)/.runtime ## Run the gateway with the live exchanges and the settings of the environment and .env
	@$(BIN)/uvicorn src.api:app --host $(HOST) --port $(PORT) --no-proxy-headers $(SOCKETS)

# Tests spend half of their time waiting, so there are two workers per core (4 on 2 cores). Tests
# with the same xdist_group share servers that start slowly, and run in one worker.
WORKERS ?= 4
PYTEST := $(BIN)/pytest -r fEs --durations 10
PARALLEL := --numprocesses $(WORKERS) --dist loadgroup

# The tests of the page need npm packages. If npm is not available, these tests are skipped.
# COVERAGE=1 measures line coverage, as in CI, and takes 25 % more time.
test: $(VENV)/.dev ## Check formatting, lint and types, and run all tests except the long ones
	@$(MAKE) --silent $(VENV)/.page >/dev/null 2>&1 || echo "npm ci --prefix tests/page failed: the tests of the page are skipped"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) $(PARALLEL) -m "not full" $(if $(COVERAGE),--cov --cov-report=term)

# Soak tests, measured benchmarks, deployments, browser tests and generated clients. Tests with
# missing tools are skipped and name the tool; with VIRTUOSO_ALL_TOOLS=1 they fail. `make ci-deps`
# installs the tools.
test-all: $(VENV)/.dev ## Run the long tests that `make test` leaves out
	@$(MAKE) --silent $(VENV)/.page >/dev/null 2>&1 || echo "npm ci --prefix tests/page failed: the tests of the page are skipped"
	TRUTH_SOAK_SECONDS=$(SOAK_SECONDS) $(PYTEST) --numprocesses 2 --dist loadgroup -m full

# Tests the committed code. PYTHONS_ARGS are Debian releases and --tests="arguments for pytest"; see
# --help.
test-pythons: ## Run the demo and tests on new Debian systems with newer Pythons (root, 1 GB of disk)
	@command -v debootstrap >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends debootstrap)
	@$(PYTHON) -m tests.deployment.pythons $(PYTHONS_ARGS)

format: $(VENV)/.dev ## Format the code and fix lint errors
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.runtime ## Write the tables of docs/settings.md and docs/metrics.md from the code
	@$(BIN)/python -m docs.generate

bench: $(VENV)/.demo ## Compare the gateway with other designs (6 minutes); writes benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks.bench

scale: $(VENV)/.demo ## Compare one gateway with two replicas behind nginx (4 minutes)
	@$(BIN)/python -m benchmarks.scale

soak: $(VENV)/.demo ## Measure memory under mixed load for MINUTES (10); writes benchmarks/SOAK.md
	@$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

bench-stream: $(VENV)/.demo ## Compare streaming with a bare relay (6 minutes); writes benchmarks/STREAM.md
	@$(BIN)/python -m benchmarks.stream

bench-page: $(VENV)/.dev ## Measure the page in a browser for MINUTES (10) per load; writes benchmarks/PAGE.md
	@$(BIN)/python -m benchmarks.page --minutes $(MINUTES)

stream-soak: $(VENV)/.dev ## Stream for five minutes while everything fails in turn; no update may be lost
	VIRTUOSO_SOAK_SECONDS=300 $(PYTEST) -s tests/streams/test_stream_soak.py

truth-soak: SOAK_SECONDS := 3600
truth-soak: $(VENV)/.dev ## Compare every served number with the simulated market for an hour of random trouble
	TRUTH_SOAK_SECONDS=$(SOAK_SECONDS) $(PYTEST) -s -m full tests/streams/test_truth_soak.py

drill: $(VENV)/.dev ## Break every part of the deployment under load; writes docs/drills.md
	@$(BIN)/python -m tests.deployment.drills

screenshots: $(VENV)/.dev ## Take the screenshots in docs/images, with simulated exchanges
	@$(BIN)/python -m tests.page.screenshots

# Debian may start some of these packages as services. The tests need only the programs.
ci-deps: chromium npm ## Install the optional tools of tests and benchmarks (Debian, root)
	apt-get update -qq && apt-get install -y -qq --no-install-recommends \
		wrk nginx-light shellcheck systemd prometheus prometheus-alertmanager prometheus-redis-exporter openssl redis-server

# Chrome is sufficient. Ubuntu has no Chromium package, so nothing is installed where Chrome exists.
chromium:
	@command -v chromium || command -v google-chrome || command -v chromium-browser \
		|| (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium)

npm:
	@command -v npm || (apt-get update -qq && apt-get install -y -qq --no-install-recommends npm)

clean: ## Remove installed packages and caches
	rm -rf $(VENV) tests/page/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "virtuoso requires Python 3.11 or newer")'
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Install the packages of a requirements file and the files that it includes. Wheels are kept in
# $(WHEELS), so that the next installation needs no network and takes seconds; index lookups take
# most of the time. --no-deps: the files pin all packages. --only-binary: no package needs a
# compiler. --no-compile: Python compiles modules on first import; compiling all of ccxt takes
# longer than the installation.
WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/virtuoso/wheels
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PACKAGES := --no-deps --only-binary :all:
PIP_INSTALL = $(PIP) install --no-index --find-links "$(WHEELS)" $(PACKAGES) --no-compile -r $<
define install
	@echo "Installing the packages of $< into $(VENV)"; begin=$$(date +%s); \
	$(PIP_INSTALL) 2>/dev/null \
		|| { echo "Downloading packages to $(WHEELS)" && $(PIP) download $(PACKAGES) --dest "$(WHEELS)" -r $< && $(PIP_INSTALL); } \
		&& echo "Installed in $$(($$(date +%s) - begin)) s"
endef

# A service may not have write access for compiled modules, so they are compiled here. Errors of
# files that are not valid code are ignored.
$(VENV)/.runtime: requirements.txt | $(BIN)/python
	$(install)
	@echo "Compiling the packages"; $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

$(VENV)/.demo: requirements-demo.txt requirements.txt | $(BIN)/python
	$(install)
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-demo.txt requirements.txt | $(BIN)/python
	$(install)
	@touch $@ $(VENV)/.demo

# No install scripts run, and downloads have a short timeout.
$(VENV)/.page: tests/page/package-lock.json | $(BIN)/python
	npm ci --prefix tests/page --silent --no-audit --no-fund --ignore-scripts --fetch-retries=1 --fetch-timeout=60000
	@touch $@
