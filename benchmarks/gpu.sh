#!/usr/bin/env bash
# What benchmarks/diffusion.py has to say on a CUDA machine, in one command:
#
#     benchmarks/gpu.sh
#
# Installs the package into .venv if it is not there; profiles full-size models with random weights in fp16 and bf16,
# eager and compiled, at batches of 1 to 20, into profiles/<gpu>/<pipeline>-<dtype>-<mode>/; then serves the paper's
# Stable Diffusion workload at 512 px (30 to 50 steps, cv 2, SLO 3) under four policies at three rates, beside the
# simulator, into benchmarks/results/. What is there already is not measured again, so a run that was stopped goes
# on where it was; what fails (a model that does not fit, say) is named at the end. Last, OPT-13B with random weights
# in fp16 under the transformers backend: its steps into profiles/<gpu>/opt_13b/, and the paper's chat workload served;
# and the tiny models of benchmarks/fidelity.py, served beside the simulator.
#
# REQUESTS (200): requests of the served workload. PIPELINES, DTYPES, MODES: fewer of them.
set -euo pipefail
PIPELINES=${PIPELINES:-dit_s2 dit_xl2 sd15_256 sd15_512 sdxl sd3}
DTYPES=${DTYPES:-float16 bfloat16}
MODES=${MODES:-eager compiled}
REQUESTS=${REQUESTS:-200}
PYTHON=.venv/bin/python
export HF_HUB_OFFLINE=1

refuse() {
    echo "benchmarks/gpu.sh: $1" >&2
    exit 1
}

case "${1:-}" in
-h | --help)
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"
    exit
    ;;
?*)
    refuse "$1: it takes no arguments but --help; the variables that it names say what to measure"
    ;;
esac
if ! command -v nvidia-smi >/dev/null || ! nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
    refuse "no CUDA device found (nvidia-smi lists none); this command measures GPUs only"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x "$PYTHON" ]; then
    python3 -m venv .venv
fi
if ! "$PYTHON" -c 'import diffusers, matplotlib, neustream' 2>/dev/null; then
    .venv/bin/pip install -q -e '.[diffusion,llm,analysis]'
fi
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    refuse "there is a GPU, but the torch in .venv finds no CUDA device: install a CUDA build of torch there"

gpu=$("$PYTHON" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_"))')
failed=()

for pipeline in $PIPELINES; do
    for dtype in $DTYPES; do
        for mode in $MODES; do
            folder=profiles/$gpu/$pipeline-$dtype-$mode
            if compgen -G "$folder/*.json" >/dev/null; then
                echo "== $folder: measured before"
                continue
            fi
            echo "== $folder"
            options=()
            if [ "$mode" = compiled ]; then
                options=(--compile)
            fi
            "$PYTHON" benchmarks/diffusion.py --pipeline "$pipeline" --device cuda --dtype "$dtype" "${options[@]}" \
                --max-batch 20 --decode-batch 20 --guidance 7.5 --measure-s 600 \
                --profile-only --out-profiles "$folder" || failed+=("$folder")
        done
    done
done

out=benchmarks/results/diffusion-sd15_512-$gpu.json
echo "== the paper's workload: $out"
"$PYTHON" benchmarks/diffusion.py --pipeline sd15_512 --device cuda --dtype float16 --parts load --no-rivals \
    --steps 30-50 --guidance 7.5 --slo-scale 3 --requests "$REQUESTS" --rates 0.5,0.75,1 \
    --max-batch 15 --policies clockwork,fcfs,neustream,priced --out "$out" || failed+=("$out")

opt=profiles/$gpu/opt_13b
out=benchmarks/results/llm-opt_13b-$gpu
if [ ! -e "$opt/steps.json" ]; then
    echo "== $opt"
    .venv/bin/neustream profile configs/paper/opt_13b_a6000.yaml --device cuda --out "$opt" || failed+=("$opt")
fi
echo "== the paper's chat workload: $out"
.venv/bin/neustream run configs/paper/opt_13b_a6000.yaml --device cuda --set "profiles=$opt" \
    --set "workload.requests=$REQUESTS" --set llm.max_batch=64 -p fcfs -p neustream_llm -p priced \
    --out out/opt_13b --json "$out.json" || failed+=("$out")

out=benchmarks/results/fidelity-$gpu.json
echo "== served beside simulated: $out"
"$PYTHON" benchmarks/fidelity.py --device cuda:0 --only dit sd opt --out "$out" || failed+=("$out")

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
