# Each target sets up what it needs in .venv. `make demo` and `make test` are the two that a new
# machine wants.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# A file's tests stay in one process, which has one core to itself.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
PIP := $(BIN)/pip install -q -c constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*/*) $(wildcard csrc/include/nf4/*)

# nvcc alone is no reason to spend minutes on CUDA kernels: build them where a GPU would run them.
export NF4_BUILD_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0)
export NF4_CUDA_ARCHS ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d . | sed 's/^90$$/90a/')

.PHONY: demo test check bench lint format clean

demo: $(VENV)/.demo
	$(BIN)/nf4 demo

test: $(VENV)/.test lint
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -k "triton and not transformers" tests

check: test
	$(PYTEST) -m check

bench: $(VENV)/.test
	$(BIN)/python benchmarks/run.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# Constraints do not reach pip's isolated builds, so the build requirements come first.
$(VENV)/.build: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel ninja
	touch $@

$(VENV)/.demo: $(VENV)/.build
	$(PIP) --no-build-isolation -e ".[cli]"
	touch $@

$(VENV)/.test: $(VENV)/.build
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf build dist *.egg-info nf4/*.so demo_output
