#!/usr/bin/env bash
# Everything that a CUDA device can show, in this order: the tests for one, the contract, then speed with the flag off and
# on. Each step is one process of at most nine minutes. Results go to a folder, gpu-results/ or the one given; a rerun
# goes on with the steps that have not ended well.
#
#     bash scripts/gpu.sh [FOLDER] [SHAPE...]
set -uo pipefail
cd "$(dirname "$0")/.."
out="$(realpath -m "${1:-gpu-results}")"
shapes=("${@:2}")
[ ${#shapes[@]} -gt 0 ] || shapes=(Llama-3.1-8B Llama-2-7B Qwen3-8B)
mkdir -p "$out"
failed=0

step() { # name, command...
    local name="$1"
    shift
    [ -e "$out/$name.done" ] && return
    rm -f "$out/$name.jsonl" # of a try that did not end well
    echo "== $name: $*"
    if timeout 540 "$@" >"$out/$name.log" 2>&1; then
        touch "$out/$name.done"
    else
        echo "failed with status $?"
        failed=1
    fi
    tail -n 40 "$out/$name.log"
}

nvidia-smi --query-gpu=name,driver_version --format=csv | tee "$out/device.txt"
python -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' | tee -a "$out/device.txt"
step tests python -m pytest -q -m gpu
for mode in "" int8 int4; do
    step "verify${mode:+-$mode}" python scripts/verify.py --device cuda ${mode:+--quantize $mode}
done
for shape in "${shapes[@]}"; do
    batches=1 contexts=128 prompts=2048
    [ "$shape" = Llama-3.1-8B ] && batches=1,2,4,8,16 contexts=128,2048,8192 prompts=512,2048,8192
    for mode in "" int8 int4; do
        name="$shape-${mode:-bf16}"
        step "$name" python scripts/bench.py --device cuda --compile --deterministic ${mode:+--quantize $mode} \
            --random_weights "scripts/configs/$shape.json" --batches "$batches" --contexts "$contexts" \
            --prompts "$prompts" --output "$out/$name.jsonl"
    done
done
exit $failed
