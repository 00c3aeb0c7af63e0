# There is one command for each job. The default is a CPU build of torch, because it is the smallest; choose another
# with make demo TORCH="torch>=2.9"
PYTHON  ?= python3
TORCH   ?= torch==2.13.0
VENV    ?= .venv
ARGS    ?=
RESULTS ?= bench/.cache
BIN     := $(VENV)/bin

.PHONY: demo test test-avx2 bench readme-table gpu gpu-proof lint build clean

demo: $(VENV)/.demo
	$(BIN)/tarflow-fast demo $(ARGS)

# The tests run in two processes with one thread each. With two threads each, the threads would spin while they wait for
# one another's cores; that was measured to be 20 times slower.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n 2 --dist worksteal $(ARGS)

# The error rule measures this engine's errors by PyTorch's, and both change with the instruction set. So whatever uses
# the rule runs again with every library held to AVX2, natively and through Triton's interpreter. That is the machine most
# unlike one with AVX-512. Tests of bits alone prove nothing new there.
AVX2   := OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 TARFLOW_CPU_ISA=avx2
JUDGED  = $(shell grep -lE "assert_accurate|Judged|error_and_bound|within_rule|verify_layer" tests/test_*.py)

test-avx2: $(VENV)/.test
	$(AVX2) $(BIN)/python -m pytest $(JUDGED) -q -n 2 --dist worksteal -k "not bits and not thousand" $(ARGS)
	$(AVX2) TRITON_INTERPRET=1 $(BIN)/python -m pytest $(JUDGED) -q -n 2 --dist worksteal -m interpreter -k "not bits" $(ARGS)

# What can be shown of the GPU's kernels without a GPU: every specialization that the published models launch is compiled
# and looked at, and the compiled code is executed at their widths. `make test` takes a sample of it.
gpu-proof: $(VENV)/.test
	TARFLOW_GPU_PROOF=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_step_compile.py \
	    tests/test_training_compile.py tests/test_triton_compile.py tests/gpu -q -n 2 --dist worksteal $(ARGS)

# The suites, at most 300 seconds of them, and then a page of what they measured; its path is the last line. Where a result
# was wrong, the page holds the others, and make fails. ARGS="--save" keeps the results in bench/results/<machine>/.
bench: $(VENV)/.test
	@rm -f $(RESULTS)/results.json
	@$(BIN)/python -m pytest bench --benchmark-only --results $(RESULTS)/results.json $(ARGS); code=$$?; \
	test ! -f $(RESULTS)/results.json || $(BIN)/tarflow-fast report $(RESULTS)/results.json -o $(RESULTS)/report; exit $$code

# The tables of speed in README.md and docs/speed.md, from the newest results in bench/results/<machine>/.
readme-table: $(VENV)/.test
	$(BIN)/python bench/history.py

# For a machine with a GPU. It installs nothing and uses $(PYTHON)'s torch, triton, numpy, pytest and safetensors.
gpu:
	$(PYTHON) bench/gpu.py $(ARGS)

lint: $(VENV)/.test
	$(BIN)/pip install -q ruff==0.17.6
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

build: $(VENV)/.demo
	$(BIN)/pip install -q "setuptools>=77" ninja
	$(BIN)/python setup.py build_ext --inplace

# torch is installed first and alone, because pip may choose another build when it resolves other packages with it.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	touch $@

SOURCES := pyproject.toml setup.py $(wildcard csrc/*.h csrc/cpu/* csrc/cpu/*/* csrc/cpu/*/*/* csrc/cuda/*)

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q -e ".[demo,test,made]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build *.egg-info
