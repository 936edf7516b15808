# Every target but the GPU's creates and reuses .venv; nothing is installed globally.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# the demo's and the tests' tensors are tiny: a second thread costs more than it brings
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint gpu gpu-test gpu-strategies gpu-bench gpu-profile gpu-sanitize
demo: .venv/ready
	$(BIN)/gvpo fit --config configs/arithmetic.yaml

# two processes, as most tests wait for others of their own; a file's tests stay together, and share what they train
PARALLEL := -n logical --maxprocesses 2 --dist loadfile
test: .venv/ready
	$(BIN)/python -m pytest $(PARALLEL)

test-all: .venv/ready
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu and not vllm"

# On a machine with a GPU, from a source checkout: no .venv and no network, each under 8 minutes. What they measure
# lands in benchmarks/results/ as it comes.
SOURCE := PYTHONPATH=kernels:. timeout --kill-after=5
gpu: gpu-test

gpu-test:
	$(SOURCE) 470 $(PYTHON) -m pytest tests/kernels tests/policy -m gpu

gpu-strategies:
	$(SOURCE) 570 $(PYTHON) -m pytest tests/distributed tests/updates -m gpu

gpu-bench:
	$(SOURCE) 470 $(PYTHON) -m benchmarks.loss --sweep tokens vocabulary groups head

gpu-profile:
	for mode in recompute stash compaction "frozen head"; do \
		$(SOURCE) 110 $(PYTHON) -m benchmarks.profile_loss --mode "$$mode" || exit 1; done

gpu-sanitize:
	$(SOURCE) 470 $(PYTHON) -m benchmarks.sanitize

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned: left to the resolver, another release may be taken
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,quantization]"
	touch $@
