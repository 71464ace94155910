#!/usr/bin/env bash
# Any Megatron checkpoint -> tp1 pp1, or TP= PP= of choice. Uneven shards of an unbalanced pruning are merged or re-split.
#
#   LOAD_PATH=recovered SAVE_PATH=recovered-tp1 bash scripts/transfer.sh
#   LOAD_PATH=recovered SAVE_PATH=recovered-tp4 TP=4 bash scripts/transfer.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

LOAD_PATH=${LOAD_PATH:-${RUNS:-$HERE/runs}/recovered}
SAVE_PATH=${SAVE_PATH:-${RUNS:-$HERE/runs}/recovered-tp1}
TP=${TP:-1}
PP=${PP:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-1} # processes that share the writing; no GPU is used

SETUP=--or-light
source "$HERE/scripts/common.sh"
launch "$GPUS_PER_NODE" "$ROOT/tools/checkpoint_conversion/convert.py" \
    --load "$LOAD_PATH" --save "$SAVE_PATH" --format torch \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" "$@"
