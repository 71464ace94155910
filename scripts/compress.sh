#!/usr/bin/env bash
# From a model and a size to a smaller model, in rounds: shapes measured, pruned and reconstructed, trained on, compared,
# exported, and a report of it all. Ended anywhere, the same command goes on where it was.
#
#   LOAD_PATH=llama-7b SAVE_PATH=small TARGET=3.4B DATA_PATH="0.7 web_text_document 0.3 code_text_document" \
#   VALID_DATA_PATH=held_out_text_document TOKENS=1B,4B ROUNDS=2 TEACHER=parent CANDIDATES=10 bash scripts/compress.sh
#
# The hyper-parameters of the training are the settings of scripts/check_model.sh. Further flags of prune_llama.py may
# follow, e.g. --rotate-hidden, and --dry-run, which prints the steps and stops.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

LOAD_PATH=${LOAD_PATH:-${RUNS:-$HERE/runs}/parent} # the parent, of any format
SAVE_PATH=${SAVE_PATH:-${RUNS:-$HERE/runs}/compressed} # folder of everything that is made
TARGET=${TARGET:-}         # parameters (3.4B), bytes at most (8GB), or a share of the parent's parameters (0.5)
DATA_PATH=${DATA_PATH:-}   # text to reconstruct by and to train on
VALID_DATA_PATH=${VALID_DATA_PATH:-} # text that all models are compared on
TOKENS=${TOKENS:-}         # to train on, for every round or each: 1B,4B
ROUNDS=${ROUNDS:-}         # empty: as many as TOKENS names
TEACHER=${TEACHER:-none}   # parent: learn what the parent would say
CANDIDATES=${CANDIDATES:-} # shapes to measure a round; empty: take the first proposal
MEASURE=${MEASURE:-zero}   # tokens on which the best candidates are trained; zero: none
TP=${TP:-}                 # layout of what is made; empty: the parent's
PP=${PP:-}
export SEQ_LENGTH=${SEQ_LENGTH:-4096} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-1024} # what a step of the training is

source "$HERE/scripts/common.sh"
export PYTHON TP PP
[ -n "$TARGET" ] || die "TARGET is empty: say how large, e.g. TARGET=3.4B"
[ -n "$DATA_PATH" ] || die "DATA_PATH is empty: name the prefix of a .bin and .idx that tools/preprocess_data.py made"
[ -n "$VALID_DATA_PATH" ] || die "VALID_DATA_PATH is empty: name a text that is not trained on"
[ -n "$TOKENS" ] || die "TOKENS is empty: say on how many to train, e.g. TOKENS=1B"
words "$DATA_PATH"
exec "$PYTHON" "$ROOT/tools/compress.py" --load "$LOAD_PATH" --save "$SAVE_PATH" --target "$TARGET" \
    --data-path "${split[@]}" --valid-data-path "$VALID_DATA_PATH" --tokens "$TOKENS" ${ROUNDS:+--rounds "$ROUNDS"} \
    --teacher "$TEACHER" ${CANDIDATES:+--candidates "$CANDIDATES" --measure "$MEASURE"} \
    ${TP:+--tensor-model-parallel-size "$TP"} ${PP:+--pipeline-model-parallel-size "$PP"} "$@"
