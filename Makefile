# `make` alone lists what there is. Everything is installed into .venv; only ci-deps, chromium and npm need root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
SANDBOX_PORT ?= 9100
MINUTES ?= 10

.DEFAULT_GOAL := help
.PHONY: help demo run test test-all format bench scale soak bench-stream bench-page stream-soak drill
.PHONY: screenshots ci-deps chromium npm clean test-pythons

help: ## Show what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo ## Run it with sandbox exchanges and an embedded Valkey server; Ctrl-C stops everything
	@$(BIN)/python -m src.sandbox.demo --host $(HOST) --port $(PORT) --sandbox-port $(SANDBOX_PORT)

# As in the image, which says why.
SOCKETS := --ws-max-size 65536 --ws-ping-interval 20 --ws-ping-timeout 20 --ws-per-message-deflate false
run: $(VENV)/.runtime ## Run it against the live exchanges, with the settings of the environment and .env
	@$(BIN)/uvicorn src.api:app --host $(HOST) --port $(PORT) --no-proxy-headers $(SOCKETS)

# Half of a test's time is waiting, so there are two workers for each core. Tests marked with the same xdist_group share
# servers that take long to start, and run in one worker.
WORKERS ?= 4
PYTEST := $(BIN)/pytest -r fEs --durations 10
PARALLEL := --numprocesses $(WORKERS) --dist loadgroup

# The tests of the page need packages of npm; where these cannot be had, all others run, and those say what they miss.
# COVERAGE=1, as in CI, measures which lines are tested; it takes a quarter more time.
test: $(VENV)/.dev ## Check formatting, lint and types, and run all tests but the long ones
	@$(MAKE) --silent $(VENV)/.page >/dev/null 2>&1 || echo "npm ci --prefix tests/page did not work: its tests are skipped"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) $(PARALLEL) -m "not full" $(if $(COVERAGE),--cov --cov-report=term)

# Soaks, measured benchmarks, deployments, browsers, generated clients. Tools that are missing are named; with
# VIRTUOSO_ALL_TOOLS=1 they are failures. `make ci-deps` installs them.
test-all: $(VENV)/.dev ## Run the tests that `make test` leaves out, which need more time and more tools
	@$(MAKE) --silent $(VENV)/.page >/dev/null 2>&1 || echo "npm ci --prefix tests/page did not work: its tests are skipped"
	$(PYTEST) --numprocesses 2 --dist loadgroup -m full

# Of the committed code. PYTHONS_ARGS: releases of Debian, --tests="arguments for pytest"; --help explains them.
test-pythons: ## Run demo and tests on fresh Debian systems with newer Pythons (as root, 1 GB of disk)
	@command -v debootstrap >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends debootstrap)
	@$(PYTHON) -m tests.deployment.pythons $(PYTHONS_ARGS)

format: $(VENV)/.dev ## Format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.demo ## Measure the gateway beside other designs, in some minutes; writes benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks.bench

scale: $(VENV)/.demo ## Compare one gateway with two replicas behind nginx, in some four minutes
	@$(BIN)/python -m benchmarks.scale

soak: $(VENV)/.demo ## Watch the memory under a mixed load for MINUTES (10); writes benchmarks/SOAK.md
	@$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

bench-stream: $(VENV)/.demo ## Measure what is pushed beside a bare relay, in some six minutes; writes benchmarks/STREAM.md
	@$(BIN)/python -m benchmarks.stream

bench-page: $(VENV)/.dev ## Measure what the page costs a browser, for MINUTES (10) per load; writes benchmarks/PAGE.md
	@$(BIN)/python -m benchmarks.page --minutes $(MINUTES)

stream-soak: $(VENV)/.dev ## Let clients watch for five minutes while all that can fail does; no update may be lost
	VIRTUOSO_SOAK_SECONDS=300 $(PYTEST) -s tests/streams/test_stream_soak.py

drill: $(VENV)/.dev ## Break every part of the deployment under load, and write docs/drills.md
	@$(BIN)/python -m tests.deployment.drills

screenshots: $(VENV)/.dev ## Take the pictures of the page in docs/images, from sandbox exchanges
	@$(BIN)/python -m tests.page.screenshots

# Debian starts some of them as services where its policy allows that; what is here needs only the programs.
ci-deps: chromium npm ## Install the optional system tools (Debian, as root) that benchmarks and tests use
	apt-get update -qq && apt-get install -y -qq --no-install-recommends \
		wrk nginx-light shellcheck systemd prometheus prometheus-alertmanager prometheus-redis-exporter openssl redis-server

# Chrome does as well: where that is, as on Ubuntu, which has no such package, nothing is installed.
chromium:
	@command -v chromium || command -v google-chrome || command -v chromium-browser \
		|| (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium)

npm:
	@command -v npm || (apt-get update -qq && apt-get install -y -qq --no-install-recommends npm)

clean: ## Remove what was installed and cached
	rm -rf $(VENV) tests/page/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "virtuoso needs Python 3.11 or newer")'
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Install the packages that a requirements file and the files it includes pin; the prerequisites are these files.
# Wheels are kept in $(WHEELS), so that the next installation needs no network and takes seconds: looking up every package
# in the index takes most of the time. --no-deps: the files pin everything. --only-binary: nothing is compiled, on no
# machine. --no-compile: Python compiles a module when it is first imported, and compiling all of ccxt takes longer than
# installing all packages.
WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/virtuoso/wheels
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PACKAGES := --no-deps --only-binary :all:
PIP_INSTALL = $(PIP) install --no-index --find-links "$(WHEELS)" $(PACKAGES) --no-compile -r $<
define install
	@echo "Installing the packages of $< into $(VENV)"; begin=$$(date +%s); \
	$(PIP_INSTALL) 2>/dev/null \
		|| { echo "Downloading them into $(WHEELS)" && $(PIP) download $(PACKAGES) --dest "$(WHEELS)" -r $< && $(PIP_INSTALL); } \
		&& echo "Installed in $$(($$(date +%s) - begin)) s"
endef

# A service may not be allowed to write compiled modules into the installation. Files that are no code do not compile.
$(VENV)/.runtime: requirements.txt | $(BIN)/python
	$(install)
	@echo "Compiling them"; $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

$(VENV)/.demo: requirements-demo.txt requirements.txt | $(BIN)/python
	$(install)
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-demo.txt requirements.txt | $(BIN)/python
	$(install)
	@touch $@ $(VENV)/.demo

# Nothing of them is run on installing; what cannot be fetched is not waited for long.
$(VENV)/.page: tests/page/package-lock.json | $(BIN)/python
	npm ci --prefix tests/page --silent --no-audit --no-fund --ignore-scripts --fetch-retries=1 --fetch-timeout=60000
	@touch $@
