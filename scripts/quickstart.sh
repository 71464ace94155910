#!/usr/bin/env bash
# The main job on the embedded model, start to end: convert, prune to half and reconstruct, train on, merge, export,
# generate, compare.
# Every step is one of the project's scripts with its defaults. A few minutes on two CPU cores; run it again to start over.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Everything lands here. Not in RUNS, where the other scripts have a user's own runs: it starts by removing what is there.
RUNS=${QUICKSTART_RUNS:-$HERE/runs/quickstart}
SEQUENCES=${SEQUENCES:-128}         # sequences of text to reconstruct by
TRAIN_ITERS=${TRAIN_ITERS:-80}      # steps of continued pretraining
TRAIN_FILES=${TRAIN_FILES:-1000}    # files of the text that training learns from; it has fewer
VALID_FILES=${VALID_FILES:-8}       # files of the text that training validates on, and all models are compared on
TP=${TP:-} # empty: 2, or 1 where there is one GPU

source "$HERE/scripts/common.sh"
forget_settings
export RUNS TRAIN_ITERS TP
[ -n "$TP" ] || TP=$([ "$(count_gpus)" = 1 ] && echo 1 || echo 2)
say() { printf '\n== %s\n' "$*"; }

say "1/9 text: Python's standard library as tokens"
"$PYTHON" "$ROOT/assets/make_tiny_llama.py" --data-only "$RUNS/data"
# What is compared at the end are 65,536 tokens, which the first eight files hold.
sed -i "$((VALID_FILES + 1)),\$d" "$RUNS/data/valid.jsonl"
sed -i "$((TRAIN_FILES + 1)),\$d" "$RUNS/data/train.jsonl"
tokenize() {
    "$PYTHON" "$ROOT/tools/preprocess_data.py" --input "$RUNS/data/$1.jsonl" --output-prefix "$RUNS/data/$1" \
        --load "$ROOT/assets/tiny-llama" --append-eod "${@:2}"
}
tokenize valid & # beside the long one, for the program takes longer to start than to read it
valid=$!
trap 'kill "$valid" 2> /dev/null || :' EXIT
tokenize train --workers 2
wait "$valid"
trap - EXIT

say "2/9 convert: Hugging Face -> Megatron, tensor parallel $TP"
bash "$ROOT/tools/checkpoint_conversion/hf_to_megatron.sh" --overwrite

say "3/9 cut: to about half the parameters, at random"
SAVE_PATH="$RUNS/cut" bash "$ROOT/scripts/prune_llama.sh" --overwrite

say "4/9 prune with text: the same shape, what is kept is chosen and refitted by what the model reads"
DATA_PATH="$RUNS/data/train_text_document" DROP_LAYERS='' bash "$ROOT/scripts/prune_llama.sh" --overwrite \
    --num_layers_remain 6 --rotate-hidden --sequences "$SEQUENCES" --sequence-length 256

say "5/9 train on: $TRAIN_ITERS steps of the stock Megatron loop"
rm -rf "$RUNS/recovered"
# There is a validation in the middle, and at the end the loop makes its own. One copy of the model trains, however many
# GPUs there are.
GPUS_PER_NODE=$TP EVAL_INTERVAL=$((TRAIN_ITERS / 2 + 1)) bash "$ROOT/scripts/check_model.sh" --full-validation

say "6/9 transfer: tensor parallel $TP -> 1"
TP=1 bash "$ROOT/scripts/transfer.sh" --overwrite

say "7/9 export: Megatron -> Hugging Face"
bash "$ROOT/tools/checkpoint_conversion/megatron_to_hf.sh" --dtype bf16 --overwrite

say "8/9 generate, with transformers"
"$PYTHON" "$ROOT/tools/generate.py" --load "$RUNS/recovered-hf" --prompt 'def __init__(self, ' --prompt 'import '

say "9/9 compare: validation loss"
"$PYTHON" "$ROOT/tools/evaluate.py" --data "$RUNS/data/valid_text_document" --sequence-length 256 --max-tokens 65536 \
    --load "$ROOT/assets/tiny-llama" --load "$RUNS/cut" --load "$RUNS/pruned" --load "$RUNS/recovered-hf" \
    --json "$RUNS/losses.json"
read -r parent cut pruned recovered < <("$PYTHON" -c "
import json, sys
print(*(f\"{run['loss']:.4f}\" for run in json.load(open(sys.argv[1]))))" "$RUNS/losses.json")
"$PYTHON" "$ROOT/tools/plot_loss.py" --run "recovered=$RUNS/recovered/tensorboard" --smooth 10 --line "parent=$parent" \
    --line "cut at random=$cut" --line "reconstructed=$pruned" --line "recovered=$recovered" \
    --title "tiny-llama, pruned to half and trained on" --output "$RUNS/loss.png"
