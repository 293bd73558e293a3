# make train | test | campaign | bench | bench-peers | asan | lint | gpu; each but gpu sets up .venv first if that is not done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_INPUTS := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h)

BENCHES := attn ffn layer cross sparse_update step memory data

.PHONY: setup train test campaign bench bench-peers asan lint gpu clean
.DELETE_ON_ERROR:

setup: $(VENV)/.built

$(VENV)/.installed: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 10) else f"Python 3.10 or newer is needed; {sys.executable} is {v}. Try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt setuptools wheel numpy pyarrow click tqdm matplotlib \
		pytest pytest-xdist hypothesis scikit-learn rtdl_revisiting_models ruff mypy "triton; platform_system == 'Linux'"
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_INPUTS)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

train: setup
	$(BIN)/ctr-train --model ft --out runs/ft --skip-if-done

test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

# Random damage, kills, surgeries of modules and lives of optimizers, from seeds that are printed; some minutes.
campaign: setup
	cd tests && ../$(BIN)/python -m campaign

# A table a script, and its rows in out/bench/. Rivals that are no part of the set-up: make bench-peers first.
bench: setup
	@for name in $(BENCHES); do \
		echo "== $$name"; $(BIN)/python bench/$$name.py --json out/bench/$$name.json || exit 1; done

bench-peers: setup
	$(PIP) install -q -c constraints.txt fbgemm-gpu-cpu lightgbm

# The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, through all parity tests.
asan: setup
	CTR_KERNELS_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		PYTHONPATH=build/asan/lib $(BIN)/pytest tests/test_kernel_parity.py

# mypy finds the packages by their folders; build/types has them under the names that are imported.
lint: setup
	$(BIN)/ruff check .
	@mkdir -p build/types && ln -sfn ../../ctr_kernels build/types/ctr_kernels && \
		ln -sfn ../../models build/types/ctr_models && ln -sfn ../../train build/types/ctr_train
	$(BIN)/mypy

# Where torch already sees a GPU its own Python runs everything, so that no network is needed.
gpu:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		$(PYTHON) bench/gpu.py; \
	else \
		$(MAKE) setup && $(BIN)/python bench/gpu.py; \
	fi

clean:
	rm -rf $(VENV) build *.egg-info ctr_kernels/*.so
