#!/usr/bin/env bash
# Hugging Face Llama -> Megatron shards in any tensor x pipeline layout.
#
#   HF_FORMAT_DIR=Llama-2-13b MEGATRON_FORMAT_DIR=llama-13b-tp8 TP=8 bash tools/checkpoint_conversion/hf_to_megatron.sh
#
# Further flags of convert.py may follow, e.g. --dtype bf16 --overwrite.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

HF_FORMAT_DIR=${HF_FORMAT_DIR:-$HERE/assets/tiny-llama}
MEGATRON_FORMAT_DIR=${MEGATRON_FORMAT_DIR:-${RUNS:-$HERE/runs}/parent}
TP=${TP:-} # empty: 2, to show tensor parallelism, or 1 where there is one GPU to train on
PP=${PP:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-1} # processes that share the writing; no GPU is used

SETUP=--or-light
source "$HERE/scripts/common.sh"
[ -n "$TP" ] || TP=$([ "$(count_gpus)" = 1 ] && echo 1 || echo 2)
launch "$GPUS_PER_NODE" "$ROOT/tools/checkpoint_conversion/convert.py" \
    --load "$HF_FORMAT_DIR" --save "$MEGATRON_FORMAT_DIR" --format torch \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" "$@"
