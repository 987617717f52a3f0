# make demo   install and serve a small real model on the CPU, with progress; results in out/demo
# make test   install and run all tests
# make test-vllm  the same for the vLLM backend, on a real vLLM with a venv of its own
# make check  ruff, mypy and the import rules
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
DEMO := out/demo
export OMP_NUM_THREADS = 1
export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-vllm check bench clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[all,dev]'
	touch $@

demo: $(VENV)/installed
	@mkdir -p $(DEMO)
	@echo "== 1 of 2: measuring how long each stage of a small DiT takes here, over its batch sizes"
	$(BIN)/neustream profile configs/demo/dit_tiny.yaml --out $(DEMO)/profiles
	@echo "== 2 of 2: serving one bursty workload for real under five policies, and simulating the same"
	$(BIN)/neustream run configs/demo/dit_tiny.yaml --out $(DEMO)

test: $(VENV)/installed
	$(BIN)/python -m pytest

$(VLLM)/installed: pyproject.toml tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q --no-deps -r tests/vllm/requirements.txt
	$(VLLM)/bin/pip install -q --no-deps -e .
	touch $@

# vLLM and what it imports warn of things that are theirs.
test-vllm: $(VLLM)/installed
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 $(VLLM)/bin/python -m pytest tests/vllm -o filterwarnings=ignore

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(VENV)/installed
	$(BIN)/python benchmarks/scheduler_overhead.py
	$(BIN)/python benchmarks/paper_diffusion.py

clean:
	rm -rf $(VENV) $(VLLM) out build *.egg-info
