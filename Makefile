PYTHON ?= python3
DEVICE ?= auto
RECIPE ?= recipes/sentiment_smollm2.yaml
ARGS ?=
BIN := .venv/bin

.PHONY: help setup demo test lint bench clean

help:
	@echo 'make setup   install everything into .venv (once; PYTHON=... names the interpreter, 3.11 to 3.13; DEVICE=cpu or gpu)'
	@echo 'make demo    set up, then run $(RECIPE)'
	@echo 'make test    set up, then run the tests (ARGS=tests/unit for some of them)'
	@echo 'make lint    ruff check, ruff format --check, mypy'
	@echo 'make bench   run every tests/benchmarks/*.py'
	@echo 'make clean   remove .venv and caches; runs/ stays'

setup:
	@PYTHON='$(PYTHON)' deploy/setup.sh --device '$(DEVICE)'

demo: setup
	$(BIN)/raylign run $(RECIPE) run.name=demo-$$(date +%Y%m%d-%H%M%S) $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	@set -e; found=; for file in tests/benchmarks/*.py; do \
	  case $$file in *'*.py' | */__init__.py) continue ;; esac; \
	  found=yes; echo "bench: $$file"; $(BIN)/python "$$file" $(ARGS); \
	done; \
	[ -n "$$found" ] || echo 'bench: there are none in tests/benchmarks yet'

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache build dist
	find platform actors recipes tests deploy -name __pycache__ -type d -prune -exec rm -rf {} +
