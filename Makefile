# make demo | test | check | bench     set themselves up in .venv first (python3 >= 3.10, a C++ compiler)
# make bench-full                      every benchmark but bench.compare_* and bench.accelerate, which need checkouts of
#                                      the originals
# make gpu-check                       on a machine with a GPU: GPU_PYTHON (python3), no network, nine minutes at most;
#                                      ORIGINAL=CHECKOUT also times the original
# Variables: PYTHON (to make .venv with), TORCH (what pip installs, options included), MAX_JOBS (compilers at once);
# see setup.py for more. A torch that is already in .venv is kept.

PYTHON ?= python3
TORCH ?= torch==2.13.0
GPU_PYTHON ?= python3

BIN := .venv/bin
INSTALLED := .venv/installed
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: install demo test check bench bench-full gpu-check clean

install: $(INSTALLED)

# torch first and by itself, so that nothing else chooses its build; then the package with all extras
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet numpy "setuptools>=77" wheel ninja "cmake>=3.22" pybind11
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,embed,interop,test]"
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pytest

check: install
	$(BIN)/scalegmn-fast check

bench: install
	$(BIN)/python -m bench.ops --seconds 0.5
	$(BIN)/python -m bench.identities --config mnist_cls/scalegmn --seconds 10
	$(BIN)/python -m bench.configs --config mnist_cls/scalegmn cifar10/scalegmn_relu --batch 16 --seconds 2
	$(BIN)/python -m bench.scaling --max-edges 1e4 --seconds 1
	$(BIN)/python -m bench.report

bench-full: install
	$(BIN)/python -m bench.ops --rows 1000 10000 100000 1000000 --width 64 128 256
	$(BIN)/python -m bench.identities
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.configs
	$(BIN)/python -m bench.scaling --max-edges 1e7
	$(BIN)/python -m bench.large_networks
	$(BIN)/python -m bench.report

gpu-check:
	$(GPU_PYTHON) -m bench.gpu_check $(if $(ORIGINAL),--original $(ORIGINAL))

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .benchmarks *.egg-info scalegmn_fast/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
