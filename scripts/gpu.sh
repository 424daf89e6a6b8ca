#!/usr/bin/env bash
# Everything that a CUDA device can show, what matters most first: its memory, the bits, the logits,
# the speed.
#
#     bash scripts/gpu.sh [--minutes N] [FOLDER [STEP...]]   all steps, or those named
#     bash scripts/gpu.sh --dry-run [FOLDER [STEP...]]       small, on a CPU: whether the steps work
#
# A step is one command under a time limit of its own, and none depends on another. FOLDER
# (gpu-results) gets a log of each, lines of JSON, and results.jsonl, which tells how each ended. A
# rerun goes on with the steps that have not ended well. With --minutes, a step that would begin
# later waits for that: all of them take two calls with --minutes 9.
set -uo pipefail
cd "$(dirname "$0")/.."

dry="" minutes=""
while [[ "${1:-}" == --* ]]; do
    case "$1" in
    --dry-run) dry=1 ;;
    --minutes)
        minutes="${2:?expected a number after --minutes}"
        shift
        ;;
    *)
        echo "error: $1: expected --dry-run or --minutes N" >&2
        exit 2
        ;;
    esac
    shift
done
default=gpu-results
[ -n "$dry" ] && default=gpu-results/dry-run
out="$(realpath -m "${1:-$default}")"
chosen=("${@:2}")

python="${PYTHON:-}"
for candidate in .venv/bin/python python3 python; do
    [ -z "$python" ] && command -v "$candidate" >/dev/null && python="$candidate"
done
mkdir -p "$out"

if [ -n "$dry" ]; then
    rm -f "$out"/*.done "$out"/*.jsonl
    width="$(nproc)" # before the next line, which it would count by
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
    device=cpu shards=2
    # In fp32 the controls of verify.py differ on every CPU. Two ranks can share two KV heads.
    precision=fp32 dim=128 layers=1 heads=4 kv=2 ffn=192 vocab=320
else
    export OMP_NUM_THREADS=4 TORCHINDUCTOR_COMPILE_THREADS=4 # in each of many processes
    device=cuda:0 width=14 shards=8
    # Leaves of 352 numbers, through which blocks of 32 have to go.
    precision=bf16 dim=1024 layers=4 heads=16 kv=8 ffn=2816 vocab=32768
fi
cat >"$out/small.json" <<END
{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": $layers, "hidden_size": $dim,
 "num_attention_heads": $heads, "num_key_value_heads": $kv, "head_dim": 64,
 "intermediate_size": $ffn, "vocab_size": $vocab, "max_position_embeddings": 2700,
 "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": false}
END
small=(--device "$device" --random_weights "$out/small.json")
large=(--device "$device" --random_weights scripts/configs/Llama-3.1-8B.json)
[ -n "$dry" ] && large=("${small[@]}")

record() { # name, how it ended, seconds: a line of JSON, with the last line that the step printed
    local last
    last="$(tail -n 1 "$out/$1.log" 2>/dev/null | tr -d '"\\' | tr '|' ' ' | tr -cd '[:print:]')"
    last="${last:0:110}"
    printf '{"step": "%s", "ended": "%s", "seconds": %d, "last": "%s"}\n' "$1" "$2" "$3" "$last" \
        >>"$out/results.jsonl"
    printf '%-14s %-9s %4d s  %s\n' "$1" "$2" "$3" "$last"
}

left() { # how many seconds there are for a step that begins now
    echo $((${minutes:-1000} * 60 - SECONDS))
}

wanted() { # name: whether it is among the chosen steps and has not ended well before
    local name
    [ -e "$out/$1.done" ] && return 1
    [ ${#chosen[@]} -eq 0 ] && return 0
    for name in "${chosen[@]}"; do
        [[ "$1" == "$name" || "$1" == "$name"-* ]] && return 0
    done
    return 1
}

step() { # name, limit in seconds, command...
    local name="$1" limit="$2" rest began=$SECONDS status
    wanted "$name" || return 0
    rest="$(left)"
    if [ "$rest" -lt 20 ]; then
        record "$name" waits 0
        return
    fi
    limit=$((limit < rest ? limit : rest))
    rm -f "$out/$name.jsonl" # of a try that did not end well
    timeout --kill-after 5 "$limit" "${@:3}" >"$out/$name.log" 2>&1
    status=$?
    # On some CPU a control may do no harm. In a dry run it counts that with the flag, the last
    # column of a promise, nothing differs.
    if [ -n "$dry" ] && [[ "$name" == verify-* ]] && grep -q "rule broken" "$out/$name.log"; then
        grep -Eq '^\| C[0-9].*\| [1-9][0-9]* of [^|]*\|$' "$out/$name.log" || status=0
    fi
    if [ "$status" -eq 0 ]; then
        touch "$out/$name.done"
        record "$name" well $((SECONDS - began))
    elif [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        record "$name" "too late" $((SECONDS - began))
    else
        record "$name" "status $status" $((SECONDS - began))
        tail -n 20 "$out/$name.log" | sed 's/^/    /'
    fi
}

also() { # the same, beside other steps
    while [ "$(jobs -rp | wc -l)" -ge "$width" ]; do
        wait -n
    done
    step "$@" &
}

ask() { # name, limit, processes that torchrun starts or 0, flags...: a question to tests/card.py
    local name="$1" limit="$2" processes="$3" command=("$python")
    [ "$processes" -eq 0 ] ||
        command+=(-m torch.distributed.run --standalone --nproc_per_node "$processes")
    command+=(tests/card.py --what "$name" --output "$out/$name.jsonl" "${@:4}")
    also "$name" "$limit" "${command[@]}"
}

tests() { # those of the kernels, dealt out to several processes; of them a dry run takes some
    local i ids some=() files=(tests/test_gpu.py tests/test_triton.py)
    if ! "$python" -c 'import pytest' 2>"$out/tests.log"; then
        wanted tests && record tests "no pytest" 0
        return
    fi
    [ -n "$dry" ] && some=(-k "test_gpu or fp64 and not attention")
    [ "$(left)" -lt 20 ] ||
        "$python" -m pytest -q --collect-only -m "" "${some[@]}" "${files[@]}" \
            >"$out/tests.log" 2>&1
    for i in $(seq "$shards"); do
        mapfile -t ids < <(grep :: "$out/tests.log" | awk "NR % $shards == $i % $shards")
        also "tests-$i" 200 "$python" -m pytest -q -m "" -p no:cacheprovider \
            "${ids[@]:-nothing was collected}"
    done
}

speed() { # mode, batch, limit: the large shape, flag off and on, beside others that take turns
    local mode="$1" batch="$2" name="speed-$2-$1" flags=(--contexts 128,2048,8192 --prompts 2048)
    [ -n "$dry" ] && batch=2 flags=(--contexts 16,40 --prompts 20 --runs 1)
    [ "$mode" = bf16 ] || flags+=(--quantize "$mode")
    also "$name" "$3" "$python" scripts/bench.py "${large[@]}" --compile --deterministic \
        --batches "$batch" "${flags[@]}" --lock "$out/lock" --output "$out/$name.jsonl"
}

without_compiler() { # 1 or 0: a dry run compiles one model, which takes longer than all else
    [ -z "$dry" ] || export TORCHDYNAMO_DISABLE="$1"
}

apart() { # what follows has the card to itself; a dry run has no use for that
    [ -n "$dry" ] || wait
}

# Memory.
ask device 60 0
wait

# Bits.
ask bits 150 0
tests
without_compiler 1
for mode in bf16 int4; do
    flags=(--quantize "$mode")
    [ "$mode" = bf16 ] && flags=()
    also "verify-$mode" 240 "$python" scripts/verify.py "${small[@]}" --precision "$precision" \
        "${flags[@]}"
done
ask graph 90 1
ask ranks 120 2 "${small[@]}"
ask logits 150 0 "${small[@]}"
apart

# Speed.
without_compiler 0
speed bf16 1 240
without_compiler 1
speed int8 1 240
speed int4 1 240
apart
ask shapes 120 0
apart
for mode in bf16 int8 int4; do
    speed "$mode" 8 200
done
apart

# A second call gets here. One card does not hold three caches of 16 x 8192 tokens and the models
# twice.
speed bf16 16 200
speed int4 16 200
apart
speed int8 16 200
apart
trace() { # mode: where the time of a batch goes
    local mode="$1" flags=(--quantize "$1") trace="$out/trace-$1.json"
    [ "$mode" = bf16 ] && flags=()
    step "trace-$mode" 120 "$python" generate.py "${large[@]}" "${flags[@]}" --compile \
        --deterministic --prompt 128 --num_samples 8 --batch_size 8 --max_new_tokens 6 \
        --ignore_eos --json --profile "$trace"
    [ -e "$trace.gz" ] && [ ! -e "$trace" ] && gunzip "$trace.gz"
    step "kernels-$mode" 60 "$python" tests/card.py --what trace --profile "$trace" \
        --output "$out/kernels-$mode.jsonl"
    [ -e "$trace" ] && gzip -f "$trace"
}

for mode in bf16 int8 int4; do
    trace "$mode" &
    if [ -z "$dry" ] || [ "$(jobs -rp | wc -l)" -ge "$width" ]; then
        wait -n # a card is not shared; a dry run does not wait longer than it has to
    fi
done
wait

echo
"$python" - "$out" "$SECONDS" <<'END'
import json
import sys
from pathlib import Path

out, seconds = Path(sys.argv[1]), sys.argv[2]
steps = {}
for line in (out / "results.jsonl").read_text().splitlines():
    result = json.loads(line)
    steps[result["step"]] = result
print("| step | ended | seconds | last line |\n|---|---|---|---|")
for name, result in steps.items():
    print(f"| {name} | {result['ended']} | {result['seconds']} | {result['last']} |")
rest = [name for name, result in steps.items() if result["ended"] != "well"]
print(f"\n{len(steps) - len(rest)} of {len(steps)} steps ended well; {seconds} s; {out}")
sys.exit(bool(rest))
END
