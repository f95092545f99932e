# The two commands: `make up` runs a cluster here, `make test` runs every test. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Relative, since make and pip both split paths at spaces.
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check
# What a cluster needs, and all that checking a change needs: `make up` on a new machine waits for the first only.
RUNTIME := $(VENV)/.runtime
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup up test check lint types layers proto docs faults bench image clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## Create .venv and install pinned dependencies

$(RUNTIME): constraints.txt pyproject.toml sdk/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "memshard needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another with make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ./sdk -e '.[local,otlp]'
	@touch $@

$(STAMP): $(RUNTIME)
	$(PIP) -e ./sdk -e '.[local,otlp,dev]'
	@touch $@

up: $(RUNTIME)  ## Start a cluster in the foreground; Ctrl-C stops it (ARGS="--shards 3")
	@$(BIN)/memshard up $(ARGS)

# Tests wait more than they work, so two workers share them; tests/conftest.py says which go together. Fault scenarios
# come first and one by one: each has a load of its own, and what others did at the time would be taken for the fault's.
# Where ARGS names tests of one of the two only, the other has none (pytest's exit code 5).
test: $(STAMP)  ## Run every test (ARGS="-k name")
	$(BIN)/pytest -m 'alone and not slow' $(ARGS) || [ $$? -eq $(if $(ARGS),5,0) ]
	$(BIN)/pytest -m 'not alone and not slow' -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS) || [ $$? -eq $(if $(ARGS),5,0) ]

check: $(STAMP) lint types layers test  ## The gate: lint, types, layers, tests (generated code in sync is one)

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

layers: $(STAMP)  ## import-linter
	$(BIN)/lint-imports --no-cache

proto: $(STAMP)  ## Generate the stubs in sdk/memshard from proto/
	$(BIN)/python sdk/generate_stubs.py

docs: $(STAMP)  ## Generate docs/api.md from the contract's comments, and PrometheusRules from the rules
	$(BIN)/python docs/generate_api.py
	$(BIN)/python deploy/monitoring/generate_kubernetes.py

faults: $(STAMP)  ## The slow fault scenarios; their figures go into docs/reliability.md
	MEMSHARD_FIGURES=1 $(BIN)/pytest -m slow -s tests/faults tests/cluster $(ARGS)

bench: $(STAMP)  ## Side by side with what people use instead; its tables go into docs/performance.md (ARGS="--only search")
	@$(BIN)/python -m loadtest.bench $(ARGS)

image:  ## Build the container image (BASE=image)
	docker build -f deploy/Dockerfile $(if $(BASE),--build-arg BASE=$(BASE)) -t memshard .

clean:  ## Remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
