#!/usr/bin/env bash
# What is measured on a CUDA machine, in one command:
#
#     benchmarks/gpu.sh [options of benchmarks/gpu.py]
#
# Installs the package into .venv if it is not there. First the tests of the backends run with their models on the GPU
# (TESTS=no leaves them out). Then benchmarks/gpu.py measures full-size models of configs/paper/ with random weights
# into profiles/<gpu>/, serves the paper's workloads beside the simulator, and compares with stock libraries. Where vLLM
# is installed in .venv, its tests run there too, and what is measured in it.
set -euo pipefail
PYTHON=.venv/bin/python
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

refuse() {
    echo "benchmarks/gpu.sh: $1" >&2
    exit 1
}

case "${1:-}" in
-h | --help)
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
if ! command -v nvidia-smi >/dev/null || ! nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
    refuse "no CUDA device found (nvidia-smi lists none); this command measures GPUs only"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x "$PYTHON" ]; then
    python3 -m venv .venv
fi
if ! "$PYTHON" -c 'import diffusers, matplotlib, neustream, pytest' 2>/dev/null; then
    .venv/bin/pip install -q -e '.[all,dev]'
fi
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    refuse "there is a GPU, but the torch in .venv finds no CUDA device: install a CUDA build of torch there"

if [ "${TESTS:-yes}" = yes ]; then
    NEUSTREAM_TEST_DEVICE=cuda "$PYTHON" -m pytest -q -n 4 --dist loadfile tests/backends || echo "some tests failed" >&2
    if "$PYTHON" -c 'import vllm' 2>/dev/null; then
        NEUSTREAM_TEST_DEVICE=cuda "$PYTHON" -m pytest -q tests/vllm -o filterwarnings=ignore || echo "some tests failed" >&2
    else
        echo "tests/vllm are left out: the package vllm is not installed in .venv" >&2
    fi
fi
exec "$PYTHON" benchmarks/gpu.py "$@"
