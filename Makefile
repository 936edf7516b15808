# Every target creates and reuses .venv; nothing is installed globally.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# the demo's and the tests' tensors are tiny: a second thread costs more than it brings
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint gpu
demo: .venv/ready
	$(BIN)/gvpo fit --config configs/arithmetic.yaml

test: .venv/ready
	$(BIN)/python -m pytest

test-all: .venv/ready
	$(BIN)/python -m pytest -m "not gpu and not vllm"

gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned: left to the resolver, another release may be taken
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,peft]"
	touch $@
