# `make train` and `make test` need Python 3.11 or newer and make, nothing else.
# Another Python: make test PYTHON=python3.12 VENV=.venv-3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# glibc gives large arrays back to the system after every step and takes them again,
# page by page, in the next: a quarter of an optimizer's step on a CPU. So it keeps them.
KEEP_MEMORY := MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=4294967296 \
  MALLOC_TRIM_THRESHOLD_=4294967296
# XLA has threads of its own, and calls a LAPACK of one thread twice at a time.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: train digits test lint bench bench-gpu gpu-compile convergence pods soak clean

train: $(VENV)/.examples ## train a transformer with AdamW and Shampoo side by side
	$(KEEP_MEMORY) $(ONE_THREAD) $(BIN)/python -m examples.train_lm $(ARGS)

digits: $(VENV)/.examples ## the same for a convolutional network, in a minute
	$(KEEP_MEMORY) $(ONE_THREAD) $(BIN)/python -m examples.train_digits $(ARGS)

# One BLAS thread per process: with more, LAPACK on fake devices is 200 times slower.
test: $(VENV)/.test $(VENV)/libtpu ## run the tests
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q \
	  --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.test ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# In about forty minutes, into benchmarks/results/<platform>; ARGS="--only step" and others:
# see ARGS=--help. PyTorch's optimizers join where they can be imported, from .venv or from
# another interpreter: TORCH_PYTHON=path/to/python.
bench: $(VENV)/.bench ## measure roots, step, compile, memory, convergence beside the peers
	$(KEEP_MEMORY) $(ONE_THREAD) $(BIN)/python -m benchmarks $(ARGS)

# One CUDA device or TPU, in under ten minutes; JAX for it has to be in the environment:
# .venv/bin/python -m pip install 'jax[cuda12]'
bench-gpu: $(VENV)/.bench ## roots, the step and a training step on one accelerator
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# What JAX runs on a GPU, for the compiler alone: half a gigabyte.
$(VENV)/cuda: $(VENV)/.bench
	$(PIP) --no-deps --target $@ nvidia-cuda-nvcc-cu12 $$($(BIN)/python -c 'import \
	  jax; print(*("jax-cuda12-%s==%s" % (x, jax.__version__) for x in ("plugin", "pjrt")))')

gpu-compile: $(VENV)/cuda ## compile the roots for a GPU, without one
	PYTHONPATH=$(VENV)/cuda $(BIN)/python -m benchmarks.gpu_compile

pods: $(VENV)/.test $(VENV)/libtpu ## compile the update for TPU pods, without one
	PYTHONPATH=$(VENV)/libtpu $(BIN)/python -m benchmarks.pods $(ARGS)

# The figures of docs/choosing.md, in about an hour; stopped, it goes on where it was.
convergence: $(VENV)/.bench ## steps to AdamW's losses, each optimizer at its best rate
	$(KEEP_MEMORY) $(ONE_THREAD) JAX_PLATFORMS=cpu $(BIN)/python -m \
	  benchmarks.convergence --picture docs/images/choosing.png $(ARGS)

# A hundred kills and a thousand flipped bits, beside the other tests of checkpoints, in
# about half an hour; fills the table of docs/checkpoints.md.
SOAK := benchmarks/results/cpu/soak.jsonl
soak: $(VENV)/.test $(VENV)/libtpu ## kill and damage checkpoints more than the tests do
	rm -f $(SOAK)
	SHAMPOO_OPTAX_KILLS=100 SHAMPOO_OPTAX_FLIPS=1000 SHAMPOO_OPTAX_RESULTS=$(SOAK) \
	  OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q \
	  tests/test_kill.py tests/test_checkpoint.py tests/test_view.py \
	  tests/test_processes.py $(ARGS)
	$(BIN)/python -m benchmarks.checkpoints_table --write

clean: ## remove environments, caches and runs
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.examples $(VENV)/.test $(VENV)/.bench: $(VENV)/.%: pyproject.toml | $(BIN)/python
	@echo "Installing shampoo-optax[$*] into $(VENV) ..."
	$(PIP) --editable '.[$*]'
	@touch $@

# The TPU compiler, apart: JAX would look for a TPU where it could import it. It exists
# for Linux; elsewhere the tests that need it say that they are skipped.
$(VENV)/libtpu: $(VENV)/.test
	$(PIP) --no-deps --target $@ libtpu || mkdir -p $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "shampoo-optax needs Python 3.11 or newer; '$(PYTHON)' is older or missing."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module. On Debian and Ubuntu the package"; \
	  $(PYTHON) -c 'import sys; print("python3.%d-venv" % sys.version_info[1], "brings it.")'; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
