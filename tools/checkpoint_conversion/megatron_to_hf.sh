#!/usr/bin/env bash
# Megatron shards of any layout -> Hugging Face Llama, with the tokenizer that came along.
#
#   MEGATRON_FORMAT_DIR=recovered HF_FORMAT_DIR=Llama-7b-pruned bash tools/checkpoint_conversion/megatron_to_hf.sh
#
# Further flags of convert.py may follow, e.g. --dtype bf16 --overwrite.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

MEGATRON_FORMAT_DIR=${MEGATRON_FORMAT_DIR:-${RUNS:-$HERE/runs}/recovered-tp1}
HF_FORMAT_DIR=${HF_FORMAT_DIR:-${RUNS:-$HERE/runs}/recovered-hf}
GPUS_PER_NODE=${GPUS_PER_NODE:-1} # processes that share the writing; no GPU is used

SETUP=--or-light
source "$HERE/scripts/common.sh"
launch "$GPUS_PER_NODE" "$ROOT/tools/checkpoint_conversion/convert.py" \
    --load "$MEGATRON_FORMAT_DIR" --save "$HF_FORMAT_DIR" --format hf "$@"
