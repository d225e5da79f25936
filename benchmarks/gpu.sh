#!/usr/bin/env bash
# Everything that needs a GPU, the most wanted first, in at most ten minutes.
#
#   benchmarks/gpu.sh [FOLDER]             on a GPU; FOLDER (docs/runs/gpu) gets a record and a log for each part
#   benchmarks/gpu.sh --dry-run [FOLDER]   every part at its tiny size, on a CPU, in a few minutes
#   benchmarks/gpu.sh --list               the commands of both
#
# A part that fails, or runs past its limit, does not keep the others from running; what it had measured is written.
# parts.jsonl says of each how long it took and how it ended (124: past its limit). PYTHON: which interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

mode=run
case ${1:-} in --dry-run | --list) mode=${1#--} && shift ;; esac
folder=${1:-docs/runs/gpu}
python=${PYTHON:-python}
budget=600 started=$SECONDS failed=0

# part NAME SECONDS "ARGUMENTS ON A GPU" "ARGUMENTS ON A CPU": OUT in them is the part's record.
part() {
    local name=$1 limit=$2 record=$folder/$1.json
    if [ "$mode" = list ]; then
        printf 'python %s\n' "$3" "$4"
        return
    fi
    local left=$((budget - SECONDS + started)) arguments=$3 begun=$SECONDS
    if [ "$mode" = dry-run ]; then arguments=$4; fi
    if [ "$left" -lt "$limit" ]; then limit=$left; fi
    if [ "$limit" -lt 5 ]; then
        echo "{\"part\": \"$name\", \"ended\": \"no time left\"}" >>"$folder/parts.jsonl"
        return
    fi
    echo "== $name: at most $limit seconds"
    # shellcheck disable=SC2086  # arguments are words
    timeout --kill-after=5 "$limit" "$python" ${arguments//OUT/$record} >"$folder/$name.log" 2>&1
    local status=$?
    if [ $status -ne 0 ]; then failed=1 && tail -5 "$folder/$name.log"; fi
    echo "{\"part\": \"$name\", \"seconds\": $((SECONDS - begun)), \"ended\": $status}" | tee -a "$folder/parts.jsonl"
}

if [ "$mode" != list ]; then
    mkdir -p "$folder"
    : >"$folder/parts.jsonl"
fi
if [ "$mode" = run ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: --dry-run tries the parts without one" >&2
    exit 1
fi

part tests 80 "-m pytest -q -p no:cacheprovider tests/test_on_a_gpu.py" \
    "-m pytest -q -p no:cacheprovider tests/test_on_a_gpu.py"
part decode-1b 150 "benchmarks/decode.py OUT --size 1b --repeats 3" "benchmarks/decode.py OUT --size tiny --quick --only plain bare engine"
part training-1b 110 "benchmarks/cost.py OUT --size large --repeats 2" "benchmarks/cost.py OUT --quick --repeats 1"
part decode-135m 100 "benchmarks/decode.py OUT --size 135m --batch 1 32 --repeats 3" \
    "benchmarks/decode.py OUT --size tiny --batch 2 --quick --only plain bare"
part engine 60 "benchmarks/engine.py OUT --size 135m --guided-size 1b --repeats 3" \
    "benchmarks/engine.py OUT --size tiny --guided-size tiny --documents 3 --repeats 1 --no-compile"
part prefix-cache 50 "benchmarks/prefix_cache.py OUT --repeats 3" \
    "benchmarks/prefix_cache.py OUT --size tiny --repeats 1"
part chunked-loss 30 "benchmarks/chunked_loss.py OUT --size 128k --repeats 3" \
    "benchmarks/chunked_loss.py OUT --size tiny --repeats 1"
exit $failed
