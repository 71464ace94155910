#!/usr/bin/env bash
# Continue pretraining a checkpoint, Megatron's or Hugging Face's, in the stock Megatron loop: on GPUs (nccl, bf16,
# TransformerEngine when it is installed, what Megatron has for many of them) or without (gloo). Run it again to resume
# from SAVE_PATH, with the same order of data.
#
#   LOAD_PATH=llama-7b-tp8 SAVE_PATH=recovered DATA_PATH="0.7 pile_a_text_document 0.3 pile_b_text_document" \
#   GPUS_PER_NODE=8 NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash scripts/check_model.sh
#
# TEACHER_LOAD=llama-13b-hf learns the distribution of that model, of any format, shape and layout, instead. With
# TEACHER_SAVE=answers the same command trains nothing: it has the teacher read the whole text, in any layout, and keeps
# its likeliest tokens; KD_LOAD=answers then learns from them, in any layout, and the teacher takes neither time nor memory.
# Further flags of pretrain_gpt.py (all of Megatron's) may follow and win over those given here.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RUNS=${RUNS:-$HERE/runs}

if [ -z "${LOAD_PATH:-}" ]; then # the embedded model, pruned by scripts/prune_llama.sh
    DATA_PATH=${DATA_PATH:-$RUNS/data/train_text_document}
    VALID_DATA_PATH=${VALID_DATA_PATH:-$RUNS/data/valid_text_document}
    SEQ_LENGTH=${SEQ_LENGTH:-256}
    MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
    GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16}
    TRAIN_ITERS=${TRAIN_ITERS:-200}
    LR=${LR:-2e-3}
    MIN_LR=${MIN_LR:-2e-4}
    LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-$((TRAIN_ITERS / 15))}
    SAVE_INTERVAL=${SAVE_INTERVAL:-100}
    EVAL_INTERVAL=${EVAL_INTERVAL:-50}
    LOG_INTERVAL=${LOG_INTERVAL:-10}
fi
LOAD_PATH=${LOAD_PATH:-$RUNS/pruned}      # the checkpoint to start from, Megatron's or Hugging Face's
SAVE_PATH=${SAVE_PATH:-${CHECKPOINT_PATH:-$RUNS/recovered}} # where training saves, and resumes from
DATA_PATH=${DATA_PATH:-}                       # .bin/.idx prefix, or "weight prefix weight prefix ..."
VALID_DATA_PATH=${VALID_DATA_PATH:-}           # empty: SPLIT of DATA_PATH
SPLIT=${SPLIT:-949,50,1}
TOKENIZER_MODEL=${TOKENIZER_MODEL:-}           # a file or folder; empty: the tokenizer that lies with the checkpoint
TOKENIZER_TYPE=${TOKENIZER_TYPE:-}             # Megatron's name of its kind; empty: by the files
TENSORBOARD_PATH=${TENSORBOARD_PATH-$SAVE_PATH/tensorboard} # empty: no curves are written
VERBOSE=${VERBOSE:-}                           # 1: Megatron's whole output here; empty: it goes to SAVE_PATH/logs
TEACHER_LOAD=${TEACHER_LOAD:-}                 # distillation: the unpruned model, e.g. $RUNS/parent; empty: none
TEACHER_SAVE=${TEACHER_SAVE:-}                 # record the teacher to this directory; empty: train
KD_LOAD=${KD_LOAD:-}                           # learn from what was recorded, instead of TEACHER_LOAD
KD_TOP_K=${KD_TOP_K:-256}                      # tokens of which the recorded probabilities are kept
KD_ALPHA=${KD_ALPHA:-1.0}                      # share of the distillation loss; the rest is the language-model loss
KD_TEMPERATURE=${KD_TEMPERATURE:-}             # divides both models' logits; empty: 1, or what was recorded
DTYPE=${DTYPE:-}                               # bf16, fp16 or fp32; empty: bf16 on GPUs, fp32 without
DISTRIBUTED_OPTIMIZER=${DISTRIBUTED_OPTIMIZER:-auto} # 1 or 0; auto: where GPUs hold several copies and it can resume
# The hyper-parameters of the reference's 13B -> 7B recovery: 4.2M tokens a step, 20B in all.
SEQ_LENGTH=${SEQ_LENGTH:-4096}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-1024}
TRAIN_ITERS=${TRAIN_ITERS:-4800}
LR=${LR:-2.5e-5}
MIN_LR=${MIN_LR:-1e-5}
LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-50}
WEIGHT_DECAY=${WEIGHT_DECAY:-1e-2}
CLIP_GRAD=${CLIP_GRAD:-1.0}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
EVAL_INTERVAL=${EVAL_INTERVAL:-100}
EVAL_ITERS=${EVAL_ITERS:-10}
LOG_INTERVAL=${LOG_INTERVAL:-1}

source "$HERE/scripts/common.sh"

[ -n "$DATA_PATH" ] || die "DATA_PATH is empty: name the prefix of a .bin and .idx that tools/preprocess_data.py made"
if [ -n "$TEACHER_SAVE" ]; then # the model is the teacher, then
    [ -z "$KD_LOAD" ] || die "TEACHER_SAVE records a teacher and KD_LOAD learns from one: name one of them"
    LOAD_PATH=${TEACHER_LOAD:?TEACHER_SAVE records a teacher: name it in TEACHER_LOAD}
    TEACHER_LOAD=
fi
[ -d "$LOAD_PATH" ] || die "LOAD_PATH $LOAD_PATH: no such directory; scripts/prune_llama.sh makes it"

[ "$LR_WARMUP_ITERS" -lt "$TRAIN_ITERS" ] ||
    die "LR_WARMUP_ITERS $LR_WARMUP_ITERS must be less than TRAIN_ITERS $TRAIN_ITERS"

# The model's own flags, a word a line: Python makes them from the checkpoint, of which nothing is read here.
words=$("$PYTHON" "$ROOT/tools/show_checkpoint.py" "$LOAD_PATH" --megatron-flags \
    ${TP:+--tensor-model-parallel-size "$TP"} ${PP:+--pipeline-model-parallel-size "$PP"})
mapfile -t model <<<"$words"

size_of() { # the value of a flag in the model's own
    local i value=1
    for ((i = 0; i < ${#model[@]}; i++)); do
        if [ "${model[i]}" = "$1" ]; then value=${model[i + 1]:-}; fi
    done
    [[ $value =~ ^[0-9]{1,6}$ ]] || die "$1 $value is not a number"
    echo "$value"
}
tensor=$(size_of --tensor-model-parallel-size)
pipeline=$(size_of --pipeline-model-parallel-size)
context=1
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
    --context-parallel-size) next=$((i + 1)) context=${!next:-} ;;
    --context-parallel-size=*) context=${!i#*=} ;;
    esac
done
[[ $context =~ ^[1-9][0-9]{0,5}$ ]] || die "--context-parallel-size $context is not a number from 1 on"
ranks=$((tensor * pipeline * context))
nodes=${NNODES:-1}
gpus=$(count_gpus)
device=(--ckpt-format torch)
if [ "$gpus" -gt 0 ]; then
    device=(--cross-entropy-loss-fusion --ckpt-format torch_dist) # in which every rank saves what it holds
    [ "$tensor" = 1 ] || device+=(--sequence-parallel)
fi
[ -n "$DTYPE" ] || DTYPE=$([ "$gpus" -gt 0 ] && echo bf16 || echo fp32)
case $DTYPE in
fp32) ;;
bf16 | fp16) device+=("--$DTYPE") ;;
*) die "DTYPE $DTYPE is none of bf16, fp16 and fp32" ;;
esac
if [ -z "${GPUS_PER_NODE:-}" ]; then # as many data-parallel copies as there are GPUs for, and as the batch divides into
    copies=$((gpus * nodes / ranks > 0 ? gpus * nodes / ranks : 1))
    while [ $((GLOBAL_BATCH_SIZE % copies)) != 0 ] || [ $((copies * ranks % nodes)) != 0 ]; do
        [ "$copies" -gt 1 ] || die "the $ranks model ranks of $LOAD_PATH do not divide over $nodes machines"
        copies=$((copies - 1))
    done
    GPUS_PER_NODE=$((copies * ranks / nodes))
    [ "$gpus" = 0 ] || [ "$GPUS_PER_NODE" -le "$gpus" ] || GPUS_PER_NODE=$gpus
fi
processes=$((GPUS_PER_NODE * nodes))
[ $((processes % ranks)) = 0 ] ||
    die "$LOAD_PATH is cut for $ranks model ranks, but there are $processes processes: re-cut it with scripts/transfer.sh"
copies=$((processes / ranks))
[ $((GLOBAL_BATCH_SIZE % copies)) = 0 ] ||
    die "GLOBAL_BATCH_SIZE $GLOBAL_BATCH_SIZE is not a multiple of the $copies data-parallel copies"
if [ "$gpus" -gt 0 ] && [ "$copies" -gt 1 ] && [ "$DISTRIBUTED_OPTIMIZER" = auto ]; then
    has_fused_adam && DISTRIBUTED_OPTIMIZER=1
fi
[ "$DISTRIBUTED_OPTIMIZER" != 1 ] || device+=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
[ "$((tensor * context))" = 1 ] ||
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron asks for it, before Blackwell
[ $((MICRO_BATCH_SIZE * copies)) -le "$GLOBAL_BATCH_SIZE" ] || MICRO_BATCH_SIZE=$((GLOBAL_BATCH_SIZE / copies))

words "$DATA_PATH"
if [ -n "$VALID_DATA_PATH" ]; then
    data=(--train-data-path "${split[@]}")
    words "$VALID_DATA_PATH"
    data+=(--valid-data-path "${split[@]}")
else
    data=(--data-path "${split[@]}" --split "$SPLIT")
fi

tokenizer=()
[ -z "$TOKENIZER_TYPE" ] || tokenizer+=(--tokenizer-type "$TOKENIZER_TYPE")
[ -z "$TOKENIZER_MODEL" ] || tokenizer+=(--tokenizer-model "$TOKENIZER_MODEL")

teacher=()
[ -z "$TEACHER_LOAD" ] || teacher+=(--teacher-load "$TEACHER_LOAD")
[ -z "$KD_LOAD" ] || teacher+=(--kd-load "$KD_LOAD")
[ -z "$TEACHER_LOAD$KD_LOAD" ] || teacher+=(--kd-alpha "$KD_ALPHA")
[ -z "$KD_TEMPERATURE" ] || [ -z "$TEACHER_LOAD$KD_LOAD$TEACHER_SAVE" ] || teacher+=(--kd-temperature "$KD_TEMPERATURE")
where=(--load "$SAVE_PATH" --save "$SAVE_PATH" ${TENSORBOARD_PATH:+--tensorboard-dir "$TENSORBOARD_PATH"})
what="training of $LOAD_PATH" saves="saves every $SAVE_INTERVAL steps to $SAVE_PATH" logs=$SAVE_PATH/logs
if [ -n "$TEACHER_SAVE" ]; then
    teacher+=(--kd-save "$TEACHER_SAVE" --kd-top-k "$KD_TOP_K")
    where=() what="recording of $LOAD_PATH" saves="keeps its answers in $TEACHER_SAVE" logs=$TEACHER_SAVE/logs
fi

launcher "$GPUS_PER_NODE" "$ROOT/pretrain_gpt.py" "${model[@]}" "${device[@]}" "${data[@]}" "${teacher[@]}" \
    "${tokenizer[@]}" "${where[@]}" --pretrained-checkpoint "$LOAD_PATH" \
    --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" \
    --train-iters "$TRAIN_ITERS" --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine \
    --lr-warmup-iters "$LR_WARMUP_ITERS" --weight-decay "$WEIGHT_DECAY" --clip-grad "$CLIP_GRAD" \
    --adam-beta1 0.9 --adam-beta2 0.95 --calculate-per-token-loss \
    --save-interval "$SAVE_INTERVAL" --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" \
    --log-interval "$LOG_INTERVAL" "$@"
[ -z "$VERBOSE" ] || exec "${command[@]}"
echo "$what by $processes process$([ "$processes" = 1 ] || echo es); $saves"
exec "$PYTHON" "$ROOT/tools/watch_training.py" --log "$logs/node-${NODE_RANK:-0}.log" -- "${command[@]}"
