# `make help` lists the targets. Everything happens in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= demo
ARGS ?=
.DEFAULT_GOAL := help

.PHONY: help setup serve test test-all lint proto clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(VENV)/.stamp  ## make .venv and install the package with pinned dependencies

$(VENV)/.stamp: pyproject.toml deploy/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh deploy/setup.sh
	@touch $@

serve: setup  ## serve MODEL (default: the embedded model) on 127.0.0.1:50051
	@exec $(BIN)/cluster serve $(MODEL) $(ARGS)

test: setup  ## every test, with seeded slices of the long ones
	@$(BIN)/python -m pytest $(ARGS)

test-all: setup  ## every test at full length
	@CLUSTER_TEST_FULL=1 $(BIN)/python -m pytest $(ARGS)

lint: setup  ## style, types of the pure layers, import layers, proto drift
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p cluster.core -p cluster.engine -p cluster.sim
	@$(BIN)/lint-imports
	@sh protos/generate.sh --check

proto: setup  ## regenerate cluster/v1 and cluster/kserve from protos/
	@sh protos/generate.sh

clean:  ## remove .venv and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
