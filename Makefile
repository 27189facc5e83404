PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test test-slow test-gpu bench lint format clean

help:
	@echo "make quickstart  install into $(VENV) and run the whole job in miniature"
	@echo "make test        install into $(VENV) and run the tests (under 5 minutes)"
	@echo "make test-slow   the slow tests;  make test-gpu  those that need CUDA"
	@echo "make lint        ruff and mypy;   make format    ruff fixes what it can"
	@echo "make bench       speed and memory beside sentence-transformers, one table (under 10 minutes)"

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: ullme needs Python 3.11 or newer; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: $(VENV)/installed
	$(BIN)/python -m ullme quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

bench: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/bench.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
