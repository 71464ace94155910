# Sourced by every script after its settings: the Python to use, and how processes are started.
#
#   PYTHON         an interpreter that has everything (default: .venv, which scripts/setup.sh makes)
#   GPUS_PER_NODE  processes on this machine; NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT as torchrun means them

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    bash "$ROOT/scripts/setup.sh"
    PYTHON=$ROOT/.venv/bin/python
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron asks for it with tensor parallelism

die() {
    echo "error: $*" >&2
    exit 1
}

# words TEXT: set `split` to one prefix, which may hold spaces, or to those of "weight prefix weight prefix ...".
words() {
    if [ -f "$1.idx" ]; then split=("$1"); else read -ra split <<<"$1"; fi
}

# The number of GPUs that may be used here, 0 without any.
count_gpus() {
    command -v nvidia-smi >/dev/null || { echo 0; return; }
    "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'
}

# launch PROCESSES SCRIPT ARGS...: PROCESSES on each of NNODES machines, through torchrun when there is more than one.
launch() {
    local processes=$1
    shift
    if [ "$processes" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
        "$PYTHON" "$@"
        return
    fi
    local where=(--standalone)
    if [ "${NNODES:-1}" != 1 ]; then
        where=(--node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-localhost}"
            --master_port "${MASTER_PORT:-6000}")
    fi
    "$PYTHON" -m torch.distributed.run --nproc_per_node "$processes" --nnodes "${NNODES:-1}" "${where[@]}" "$@"
}
