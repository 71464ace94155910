# Sourced by every script after its settings: the Python to use, and how processes are started.
#
#   PYTHON         an interpreter that has everything (default: .venv, which scripts/setup.sh makes)
#   SETUP          --or-light where a script needs no torch, so that what `setup.sh --light` made will do
#   GPUS_PER_NODE  processes on this machine; NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT as torchrun means them

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    bash "$ROOT/scripts/setup.sh" ${SETUP:+"$SETUP"}
    PYTHON=$ROOT/.venv/bin/python
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

die() {
    echo "error: $*" >&2
    exit 1
}

# Settings of another job in this shell must not leak into what runs several of the scripts.
forget_settings() {
    unset HF_FORMAT_DIR MEGATRON_FORMAT_DIR LOAD_PATH SAVE_PATH CHECKPOINT_PATH DATA_PATH VALID_DATA_PATH SPLIT PP \
        PRUNE_TYPE HIDDEN_SIZE_REMAIN NUM_ATTENTION_HEADS_REMAIN NUM_QUERY_GROUPS_REMAIN FFN_HIDDEN_SIZE_REMAIN \
        DROP_LAYERS TOKENIZER_TYPE TOKENIZER_MODEL TENSORBOARD_PATH GPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR \
        MASTER_PORT TEACHER_LOAD TEACHER_SAVE KD_LOAD KD_TOP_K KD_ALPHA KD_TEMPERATURE DISTRIBUTED_OPTIMIZER DTYPE \
        SEQ_LENGTH MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR LR_WARMUP_ITERS WEIGHT_DECAY CLIP_GRAD SAVE_INTERVAL EVAL_INTERVAL EVAL_ITERS \
        LOG_INTERVAL VERBOSE
}

# words TEXT: set `split` to one prefix or file, which may hold spaces, or to those of "weight prefix weight prefix ...",
# on any number of lines.
words() {
    if [ -f "$1.idx" ] || [ -f "$1" ]; then split=("$1"); else read -rd '' -a split <<<"$1" || :; fi
}

# The number of GPUs that torch can use here; where there are some that it cannot, it says why.
count_gpus() {
    # Asking torch takes seconds, and without a device there is nothing to ask. (In a container nvidia-smi may be missing.)
    compgen -G '/dev/nvidia[0-9]*' >/dev/null || command -v nvidia-smi >/dev/null || { echo 0; return; }
    has_module torch || { echo 0; return; }
    "$PYTHON" -c 'from megatron.pruning.training import cpu_device; print(cpu_device.count_gpus())'
}

has_module() {
    "$PYTHON" -c "from importlib.util import find_spec; raise SystemExit(not find_spec('$1'))"
}

# Whether Megatron finds the fused Adam of TransformerEngine or of NVIDIA's apex.
has_fused_adam() {
    "$PYTHON" -c 'from importlib.util import find_spec as f; raise SystemExit(not (f("transformer_engine") or f("amp_C")))'
}

# launcher PROCESSES SCRIPT ARGS...: set `command` to what starts PROCESSES on each of NNODES machines, through torchrun
# when there is more than one.
launcher() {
    local processes=$1
    shift
    if [ "$processes" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
        command=("$PYTHON" "$@")
        return
    fi
    has_module torch || die "several processes meet through torch, which is not installed: bash scripts/setup.sh, or" \
        "run one process"
    local cores
    cores=$(nproc) # of which each process has its share; torchrun would give it one
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
    local where=(--standalone)
    if [ "${NNODES:-1}" != 1 ]; then
        where=(--node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-localhost}"
            --master_port "${MASTER_PORT:-6000}")
    fi
    command=("$PYTHON" -m torch.distributed.run --nproc_per_node "$processes" --nnodes "${NNODES:-1}" "${where[@]}" "$@")
}

# launch PROCESSES SCRIPT ARGS...: start them.
launch() {
    launcher "$@"
    "${command[@]}"
}
