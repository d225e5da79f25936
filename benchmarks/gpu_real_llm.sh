#!/usr/bin/env bash
# The experiment with a real LLM, on a GPU, ten minutes at a time: what is done is not done again, so call it until it says so.
#
#   zipper corpus sentences data/sentences-real --source FOLDER-OF-SENTENCES --shortest 25 --longest 75 --flite --clear --voices 2000   (CPU, before)
#   benchmarks/gpu_real_llm.sh [RUN] [KEY=VALUE ...]       RUN: as of --only; default zipper--10000-pairs--seed1
#
# A run that is cut off goes on from its newest checkpoint, which is made on the signal. Not run on a GPU here.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-zipper--10000-pairs--seed1}
[ $# -eq 0 ] || shift
status=0
timeout --signal=INT --kill-after=45 555 "${PYTHON:-python}" -m zipper_lm experiment experiments/real-llm.yaml \
    --only "$run" training.save_every=200 "training.arguments={bf16: true}" "$@" || status=$?
if [ "$status" -eq 124 ]; then echo "ten minutes are over: call it again to go on" >&2; fi
exit "$status"
