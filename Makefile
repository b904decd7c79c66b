# Every target does everything it needs on a machine that has Python 3.11 with pip, gcc, make and git.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find src -type f -not -path '*/__pycache__/*' 2>/dev/null)
# The bundled pip of a fresh virtual environment reads this for every install below.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export BENTOML_DO_NOT_TRACK := True
# One thread a test process: two processes share two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: help setup demo test chromium test-fast test-gpu check bench format train-demo clean

help:
	@echo "make demo       save, load and run the demo model; writes demo.png"
	@echo "make test       all tests, against the installed wheel"
	@echo "make test-fast  tests/unit and tests/security, those without servers: less than a minute"
	@echo "make test-gpu   the tests that need a GPU"
	@echo "make check      ruff, mypy, import contracts"
	@echo "make bench      the benchmarks that the documents quote"
	@echo "make setup      only install"

setup: .venv/.wheel

.venv/.dependencies: constraints.txt pyproject.toml tools/install_detectron2.py
	@echo "== Creating .venv (about three minutes; PyTorch is 5 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== Installing PyTorch"
	@$(BIN)/pip install --quiet torch torchvision setuptools
	@echo "== Installing the package's dependencies and the tools"
	@$(BIN)/pip install --quiet hatchling
	@$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/dependencies .
	@$(BIN)/pip install --quiet "$$(ls -t build/dependencies/bentoml_detectron-*.whl | head -1)[dev]"
	@echo "== Installing Detectron2"
	@$(BIN)/python tools/install_detectron2.py
	@touch $@

.venv/.wheel: .venv/.dependencies $(SOURCES) README.md LICENSE
	@echo "== Installing this package's wheel"
	@rm -rf build/wheel
	@$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	@$(BIN)/pip uninstall --quiet --yes bentoml-detectron
	@$(BIN)/pip install --quiet --no-deps build/wheel/*.whl
	@touch $@

demo: .venv/.wheel
	@echo "== Saving, loading and running the demo model"
	@$(BIN)/bentoml detectron demo --output demo.png

test: .venv/.wheel chromium
	@echo "== Running all tests"
	@$(PYTEST) tests

# For the tests of the page, which are skipped where there is none.
chromium:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && echo "== Installing Chromium" \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1; } \
		|| echo "== No Chromium can be installed here: the tests of the page are skipped"

test-fast: .venv/.wheel
	@echo "== Running the fast tests"
	@$(PYTEST) -m "not slow" tests/unit tests/security

# Their own process and no hidden devices: for a machine with a GPU.
test-gpu: .venv/.wheel
	@CUDA_VISIBLE_DEVICES=0 $(BIN)/pytest -m gpu tests

check: .venv/.wheel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.wheel
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.wheel
	$(BIN)/pip install --quiet "$$(ls -t build/wheel/bentoml_detectron-*.whl | head -1)[bench]"
	$(BIN)/python benchmarks/bench_load.py
	$(BIN)/python benchmarks/bench_save.py
	$(BIN)/python benchmarks/bench_import.py
	$(BIN)/python benchmarks/bench_predictor.py
	$(BIN)/python benchmarks/bench_masks.py
	$(BIN)/python benchmarks/bench_results.py
	$(BIN)/python benchmarks/bench_draw.py
	$(BIN)/python benchmarks/bench_speed.py
	$(BIN)/python benchmarks/bench_openvino.py
	$(BIN)/python benchmarks/bench_steps.py
	$(BIN)/python benchmarks/bench_profile.py
	$(BIN)/python benchmarks/bench_winograd.py
	$(BIN)/python benchmarks/bench_precision.py
	$(BIN)/python benchmarks/bench_rounding.py
	$(BIN)/python benchmarks/bench_dataset.py
	$(BIN)/python benchmarks/bench_ray.py
	$(BIN)/python benchmarks/bench_overload.py
	$(BIN)/python benchmarks/bench_evaluate.py
	$(BIN)/python benchmarks/bench_service_cost.py
	@# Apart: they bring uvloop, on which this package's service would run too.
	$(BIN)/pip install --quiet --target build/rivals fastapi litserve python-multipart uvicorn
	$(BIN)/python benchmarks/bench_serve.py --rivals build/rivals

train-demo: .venv/.wheel
	$(BIN)/python -W ignore tools/train_demo.py

clean:
	rm -rf .venv build dist output demo.png
