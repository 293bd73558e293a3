# make train | test | bench | lint | gpu; each sets up .venv first if that is not done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_INPUTS := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: setup train test bench lint gpu clean
.DELETE_ON_ERROR:

setup: $(VENV)/.built

$(VENV)/.installed: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 10) else f"Python 3.10 or newer is needed; {sys.executable} is {v}. Try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt setuptools wheel numpy pyarrow click tqdm matplotlib \
		pytest hypothesis scikit-learn rtdl_revisiting_models ruff
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_INPUTS)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

train: setup
	$(BIN)/ctr-train --model ft --recipe demo --out runs/ft-demo --skip-if-done

test: setup
	$(BIN)/python -m pytest

bench: setup
	@for script in $(sort $(wildcard bench/*.py)); do $(BIN)/python $$script || exit 1; done

lint: setup
	$(BIN)/ruff check .

gpu: setup
	$(BIN)/python bench/gpu.py

clean:
	rm -rf $(VENV) build *.egg-info ctr_kernels/*.so
