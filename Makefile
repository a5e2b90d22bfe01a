PYTHON ?= python3
DEVICE ?= auto
RECIPE ?= recipes/sentiment_smollm2.yaml
ARGS ?=
WORKERS ?= 3
MINUTES ?= 60
BIN := .venv/bin
# Without bytecode each of the many processes that a run or a test starts would compile our sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-cluster test-faults fault-table lint bench fuzz clean

help:
	@echo 'make setup   install everything into .venv (once; PYTHON=... names the interpreter, 3.11 to 3.13; DEVICE=cpu or gpu)'
	@echo 'make demo    set up, then run $(RECIPE)'
	@echo 'make test    set up, then run the tests (ARGS=tests/unit for some of them, WORKERS processes at once)'
	@echo 'make test-cluster  run the tests that make three nodes on this machine (as root on Linux, with iproute2; 8 minutes)'
	@echo 'make test-faults   run the tests of faults that take over a minute each; make fault-table writes tests/README.md'
	@echo 'make lint    ruff check, ruff format --check, mypy'
	@echo 'make bench   run the benchmarks of tests/benchmarks in turn, beside TRL (40 minutes on two cores)'
	@echo 'make fuzz    give every format that is read inputs that nobody meant, for an hour (MINUTES=... for less)'
	@echo 'make clean   remove .venv and caches; runs/ stays'

setup:
	@PYTHON='$(PYTHON)' deploy/setup.sh --device '$(DEVICE)'

demo: setup
	$(BIN)/raylign run $(RECIPE) run.name=demo-$$(date +%Y%m%d-%H%M%S) $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15 -m 'not long_fault and not cluster' $(ARGS)

test-cluster: setup
	$(BIN)/python -m pytest --durations 15 -rs -m cluster tests/cluster $(ARGS)

test-faults: setup
	$(BIN)/python -m pytest --durations 15 -m 'long_fault and not cluster' $(ARGS)

fault-table: setup
	rm -rf .cache/faults
	$(BIN)/python -m pytest -m 'fault or long_fault' $(ARGS)
	$(BIN)/python -m tests.faults

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	@missed=; \
	run() { \
	  echo "bench: $$*"; script=$$1; shift; \
	  $(BIN)/python "tests/benchmarks/$$script.py" "$$@" && return; \
	  status=$$?; [ $$status -lt 128 ] || exit $$status; missed="$$missed $$script"; \
	}; \
	run dpo_step; run online_round; run online_round --wall-clock; run scaling; run tracking_overhead; \
	[ -z "$$missed" ] || { echo "bench: missed by$$missed"; exit 1; }

fuzz: setup
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $$(date +%s) $(ARGS)

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache build dist
	find platform actors recipes tests deploy -name __pycache__ -type d -prune -exec rm -rf {} +
