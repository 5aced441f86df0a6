# `make demo` and `make test` set everything up themselves: the first call makes .venv, later calls skip what is done.
SHELL := /bin/bash
BIN := .venv/bin
PYTHON := $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
STAMP := .venv/ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
STORE := $(abspath $(or $(CRANIUM_STORE),cranium-store))
PORT ?= 5000
SOAK := $(CURDIR)/experiments/bench/kills.jsonl
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
QUIET := RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1

.PHONY: help setup demo test test-slow test-all chaos soak test-gpu check mlflow mlflow-postgres clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

setup: $(STAMP)

$(STAMP):
	@[ -n "$(PYTHON)" ] || { echo "error NO_PYTHON: needs Python 3.11 or newer with venv and pip; install it and try again" >&2; exit 2; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[demo,dev]'
	@rm -f .venv/ready-*; touch $@

demo: $(STAMP)  ## the whole flow on simulated cohorts from real heads, then where to look
	@$(QUIET) $(BIN)/cranium demo experiments/demo.yaml store=$(STORE)
	@$(QUIET) $(BIN)/cranium run experiments/demo.yaml store=$(STORE)
	@echo "runs:   make mlflow  (then open http://127.0.0.1:$(PORT))"

test: $(STAMP)  ## unit tier, then the Ray tier on one local cluster
	$(PYTEST) -n auto --maxprocesses 8 --dist loadfile -m "not ray and not flow and not chaos and not gpu"
	$(PYTEST) -m "ray and not flow and not chaos and not gpu"

test-all: test test-slow  ## and the end-to-end and fault tiers

test-slow: $(STAMP)
	$(PYTEST) -m "(flow or chaos) and not gpu" --timeout 1200

chaos: $(STAMP)  ## the fault tier: every named fault, and a few kills at random (about half an hour on two idle cores)
	$(PYTEST) -m "chaos and not gpu" --timeout 1200

soak: $(STAMP)  ## 20 kills at random of each of ingest, pretraining and sweep, logged (KILLS=20 SCANS=2000 SEED=0)
	@rm -f $(SOAK)
	CHAOS_KILLS=$(or $(KILLS),20) CHAOS_SCANS=$(or $(SCANS),2000) CHAOS_SEED=$(or $(SEED),0) CHAOS_LOG=$(SOAK) \
		$(PYTEST) -m chaos --timeout 7200 -s $(addprefix tests/chaos/,test_soak.py test_steps.py test_grid.py)

test-gpu: $(STAMP)  ## what needs a CUDA device
	$(PYTEST) -m gpu --timeout 1200

check: $(STAMP)  ## lint, format, types, layers, every YAML
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/cranium check

mlflow: $(STAMP)  ## the tracking UI, on loopback only (PORT=5000)
	@[ -f $(STORE)/mlflow.db ] || { echo "error NO_RUNS: $(STORE)/mlflow.db does not exist; run make demo first" >&2; exit 2; }
	@$(BIN)/python -c 'import socket; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("127.0.0.1", $(PORT)))' 2>/dev/null \
		|| { echo "error PORT: $(PORT) is in use; try make mlflow PORT=$$(( $(PORT) + 1 ))" >&2; exit 2; }
	@echo "http://127.0.0.1:$(PORT)"
	@cd $(STORE) && $(QUIET) $(CURDIR)/$(BIN)/mlflow server --backend-store-uri sqlite:///$(STORE)/mlflow.db \
		--artifacts-destination $(STORE)/mlflow-artifacts --host 127.0.0.1 --port $(PORT) --workers 1

mlflow-postgres: $(STAMP)  ## MLflow on a real Postgres with a password, on loopback (PORT=5000); see docs/tracking.md
	@PORT=$(PORT) $(BIN)/python deploy/tracking/local.py $(STORE)/tracking

clean:  ## remove caches (not .venv, not the store)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find platform tests -name __pycache__ -type d -prune -exec rm -rf {} +
