# make env       the environment .venv, from requirements-cpu.txt
# make lint      ruff, the layers of arc/ (import-linter), types (mypy)
# make check     env, lint and the tests that train nothing (under 90 seconds on two cores)
# make test      env, lint and all tests that need no CUDA
# make test-gpu  the tests that need CUDA, on a box made from requirements.txt with pytest: make test-gpu PYTHON=python
# make settings  docs/settings.md, from the code
# make demo      env, then the three stages on generated data and a tiny model, and their evaluation
# make learn     env, then whether the pipeline teaches: a small Llama through all of it (LEARN_DATASET=folder; one large GPU, 15 minutes)
# make torture   env, then the three stages on a tiny model, killed at 100 random moments (about 10 minutes on 2 cores)
# make fuzz      env, then 100,000 random inputs for the loader and the decoder (about 4 minutes)
# make clean     caches of tools only: no environment, no data, no models
#
# Variables, as in `make env PYTHON=python3.12`:
#   PYTHON       the Python that the environment is made from, 3.11 or later
#   TORCH        the PyTorch to install
#   TORCH_INDEX  where from: empty for pip's default, which on Linux is a CUDA build of several GB; the small one without CUDA:
#                TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
# Named by what was installed: another requirements file or PyTorch is another stamp, whatever the files' times say.
STAMP := $(VENV)/.installed-$(shell { cat requirements-cpu.txt; echo '$(TORCH) $(TORCH_INDEX)'; } | cksum | cut -d' ' -f1)

# Tests: two processes, each file in one of them, so that what its tests share is made once; the order is conftest.py's.
WORKERS ?= 2
PYTEST_FLAGS ?= -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# More threads than cores slow small models down manyfold: with two workers, one each.
TEST_THREADS ?= $(if $(filter 0 1,$(WORKERS)),2,1)

DEMO_DATASET ?= demo_dataset
DEMO_BASE ?= demo/base
# Seven that the base was trained on, though not on these puzzles, and the three last, which are new to it.
DEMO_FAMILIES ?= flip rotate transpose gravity rays translate crop border keep-colour symmetrise
DEMO_OUTPUT ?= demo/output
DEMO_EVALUATION ?= demo/evaluation
# Of all three stages; their small settings stand in demo/*.yaml.
DEMO_FLAGS ?= --dataset_dir $(DEMO_DATASET) --output_dir $(DEMO_OUTPUT)

.DEFAULT_GOAL := help
.PHONY: help env lint check test test-gpu settings demo learn torture fuzz clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

env: $(STAMP)

# PyTorch first and alone, so that no other package picks its build; its line in the file is for those who do without make.
$(STAMP): requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1 || true): Python 3.11 or later is needed; name one: make PYTHON=python3.12" >&2; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	grep -v '^torch==' requirements-cpu.txt > $(VENV)/requirements-without-torch.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements-without-torch.txt
	@rm -f $(VENV)/.installed-*
	@touch $@

lint: env
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check --no-cache .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

TEST_ENVIRONMENT = OMP_NUM_THREADS=$(TEST_THREADS) OPENBLAS_NUM_THREADS=$(TEST_THREADS) MKL_NUM_THREADS=$(TEST_THREADS) \
  TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# Offline: a test that would fetch a model or data fails at once instead of waiting for a network.
test: env lint
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest $(PYTEST_FLAGS)

# Its tests share little that is slow to make, so that a process which is done may take tests of another one's files.
CHECK_FLAGS ?= -q -n $(WORKERS) --dist worksteal
check: env lint
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest $(CHECK_FLAGS) -m "not gpu and not training"

# Only the files with such tests are read: they need pytest alone beside requirements.txt.
test-gpu:
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q -m gpu $(shell grep -rl 'mark.gpu' tests --include='test_*.py')

settings: env
	$(BIN)/python docs/make_settings.py

demo: env
	$(BIN)/python demo/make_dataset.py --out $(DEMO_DATASET) --families $(DEMO_FAMILIES)
	$(BIN)/python base_finetune.py --config demo/demo.yaml $(DEMO_FLAGS) --base_model $(DEMO_BASE)
	$(BIN)/python base_finetune_final.py --config demo/demo.yaml $(DEMO_FLAGS)
	$(BIN)/python train_grpo.py --config demo/demo_grpo.yaml $(DEMO_FLAGS)
	$(BIN)/python evaluate_arc.py --config demo/demo_evaluate.yaml --dataset_dir $(DEMO_DATASET) --output_dir $(DEMO_EVALUATION) \
	  --models $(DEMO_OUTPUT)/Llama-3.2-1B-prepared $(foreach stage,Base Final Final-RL,$(DEMO_OUTPUT)/Llama-3.2-1B-$(stage)-merged)

LEARN_DATASET ?=
LEARN_OUTPUT ?= learn/output
LEARN_PIECES ?= base stage1 stage2 stage3 greedy search
LEARN_FLAGS ?=
# Jobs at a time, of those that need nothing of each other: what follows stage 2 does not fill a large GPU.
LEARN_TOGETHER ?= 5
learn: env
	@test -d '$(LEARN_DATASET)' || { \
	  echo "error: make learn needs a folder of task files: make learn LEARN_DATASET=dataset; to make one:" >&2; \
	  echo "  python demo/make_dataset.py --from_rearc re_arc --out dataset --max_side 10" >&2; \
	  exit 2; }
	$(BIN)/python benchmarks/learn.py --dataset_dir $(LEARN_DATASET) --output_dir $(LEARN_OUTPUT) --pieces $(LEARN_PIECES) \
	  --together $(LEARN_TOGETHER) $(LEARN_FLAGS)

KILLS ?= 100
SEED ?= 0
torture: env
	$(BIN)/python benchmarks/torture.py --kills $(KILLS) --seed $(SEED) --workers $(WORKERS)

FUZZ_EXAMPLES ?= 100000
fuzz: env
	ARC_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q -n 0 tests/puzzles/test_fuzz.py

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis unsloth_compiled_cache
	find . -name .venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
