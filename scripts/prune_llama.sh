#!/usr/bin/env bash
# Prune a Llama to a smaller one. The parent is a Megatron or a Hugging Face checkpoint; no GPU is needed.
#
#   LOAD_PATH=llama-13b-tp8 SAVE_PATH=llama-7b-tp8 TP=8 HIDDEN_SIZE_REMAIN=4096 NUM_ATTENTION_HEADS_REMAIN=32 \
#   FFN_HIDDEN_SIZE_REMAIN=11008 DROP_LAYERS=8,13,18,23,28,31,34,36 bash scripts/prune_llama.sh
#
# With a text the model is scored, what is kept is chosen by that, and what remains is refitted so that it computes what
# the parent computed, without training:
#
#   LOAD_PATH=llama-13b-tp8 SAVE_PATH=llama-7b-tp8 ... DATA_PATH="0.7 web_text_document 0.3 code_text_document" \
#   GPUS_PER_NODE=8 bash scripts/prune_llama.sh
#
# An axis left empty stays as it is. Further flags of prune_llama.py may follow, e.g. --plan-only, --seed 7, --overwrite.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The embedded model to about half its parameters; with a LOAD_PATH of your own, say what remains.
if [ -z "${LOAD_PATH:-}" ] && [[ " $* " != *" --plan "* && " $* " != *" --target"* ]]; then
    HIDDEN_SIZE_REMAIN=${HIDDEN_SIZE_REMAIN-128}
    NUM_ATTENTION_HEADS_REMAIN=${NUM_ATTENTION_HEADS_REMAIN-}
    FFN_HIDDEN_SIZE_REMAIN=${FFN_HIDDEN_SIZE_REMAIN-288}
    DROP_LAYERS=${DROP_LAYERS-3,5}
fi
LOAD_PATH=${LOAD_PATH:-${RUNS:-$HERE/runs}/parent}
SAVE_PATH=${SAVE_PATH:-${RUNS:-$HERE/runs}/pruned}
TP=${TP:-} # layout of the target; empty: the parent's
PP=${PP:-}
PRUNE_TYPE=${PRUNE_TYPE:-} # balance (also when empty) or unbalance
DATA_PATH=${DATA_PATH:-} # text to learn from: .bin/.idx prefix, or "weight prefix weight prefix ..."; empty: only cut
GPUS_PER_NODE=${GPUS_PER_NODE:-} # processes that share the writing, and the text; empty: 1, with a text one a GPU

SETUP=$([ -n "$DATA_PATH" ] || echo --or-light) # who only cuts needs no torch
source "$HERE/scripts/common.sh"
remain=()
[ -n "${HIDDEN_SIZE_REMAIN:-}" ] && remain+=(--hidden_size_remain "$HIDDEN_SIZE_REMAIN")
[ -n "${NUM_ATTENTION_HEADS_REMAIN:-}" ] && remain+=(--num_attention_heads_remain "$NUM_ATTENTION_HEADS_REMAIN")
[ -n "${NUM_QUERY_GROUPS_REMAIN:-}" ] && remain+=(--num_query_groups_remain "$NUM_QUERY_GROUPS_REMAIN")
[ -n "${FFN_HIDDEN_SIZE_REMAIN:-}" ] && remain+=(--ffn_hidden_size_remain "$FFN_HIDDEN_SIZE_REMAIN")
[ -n "${DROP_LAYERS:-}" ] && remain+=(--drop_layers "$DROP_LAYERS")
[ -n "$PRUNE_TYPE" ] && remain+=(--prune_type "$PRUNE_TYPE")
[ -n "$TP" ] && remain+=(--tensor-model-parallel-size "$TP")
[ -n "$PP" ] && remain+=(--pipeline-model-parallel-size "$PP")
if [ -n "$DATA_PATH" ]; then
    [ -n "$GPUS_PER_NODE" ] || GPUS_PER_NODE=$(count_gpus)
    [ "$GPUS_PER_NODE" != 0 ] || GPUS_PER_NODE=1
    words "$DATA_PATH"
    remain+=(--reconstruct --data-path "${split[@]}")
fi

processes=${GPUS_PER_NODE:-1}
[[ " $* " != *" --candidates"* ]] || processes=1 # it starts the steps itself, each with GPUS_PER_NODE processes
launch "$processes" "$ROOT/prune_llama.py" --is_prune "${remain[@]}" \
    --load "$LOAD_PATH" --save "$SAVE_PATH" "$@"
