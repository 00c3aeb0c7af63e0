# One command a job. A CPU build of torch is the default, so that nothing larger is pulled in; choose another with
#   make demo TORCH="torch>=2.9"
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin

.PHONY: demo test bench gpu lint build clean

demo: $(VENV)/.demo
	$(BIN)/tarflow-fast demo $(ARGS)

# two processes of one thread each: two of two would spin against each other (measured: 20 times slower)
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n 2 --dist worksteal $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

# no install: torch, triton, numpy, pytest and safetensors of $(PYTHON), on a machine with a GPU
gpu:
	$(PYTHON) bench/gpu.py $(ARGS)

lint: $(VENV)/.test
	$(BIN)/pip install -q ruff==0.17.6
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

build: $(VENV)/.demo
	$(BIN)/pip install -q "setuptools>=77" ninja
	$(BIN)/python setup.py build_ext --inplace

# torch first and alone: a range resolved together with other packages may pull another build
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	touch $@

SOURCES := pyproject.toml setup.py $(wildcard csrc/*.h csrc/cpu/* csrc/cpu/*/* csrc/cpu/*/*/* csrc/cuda/*)

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q -e ".[demo,test]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build *.egg-info
