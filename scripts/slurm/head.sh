# Sourced by the jobs beside it, which are submitted from the top of the repository: one process group over their nodes.
#
#   CONTAINER_IMAGE    image that enroot and pyxis start, e.g. nvcr.io#nvidia/pytorch:26.06-py3; empty: no container
#   CONTAINER_MOUNTS   what it sees of the nodes (default: the repository; add the folders of models and text)
#   GPUS_PER_NODE      processes of a node (default: as many as the GPUs that Slurm gives)
#
# All other settings are those of the script that a job calls; flags after the job's name are passed on to it.
set -euo pipefail

CONTAINER_IMAGE=${CONTAINER_IMAGE:-}
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-$ROOT:$ROOT}
container=()
[ -z "$CONTAINER_IMAGE" ] || container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS"
    --container-workdir="$ROOT")

cd "$ROOT"
export NNODES=${SLURM_JOB_NUM_NODES:-1}
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || { # the first of them
    echo "error: scontrol names no node of $SLURM_JOB_NODELIST" >&2
    exit 1
}
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # jobs that share a node meet at ports of their own
[ -z "${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}" ] || export GPUS_PER_NODE=${GPUS_PER_NODE:-$SLURM_GPUS_ON_NODE}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # which srun does not take from the job by itself

# on_every_node COMMAND ARGS...: run it once on each node, which knows its number; where one fails, all end.
on_every_node() {
    # shellcheck disable=SC2016 # each node fills in its own
    srun --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 "${container[@]}" \
        bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' node "$@"
}

# python_on_every_node SCRIPT ARGS...: start GPUS_PER_NODE processes of a program of the project on each node.
python_on_every_node() {
    # shellcheck disable=SC2016
    on_every_node bash -c 'set -euo pipefail; source scripts/common.sh; launch "${GPUS_PER_NODE:-1}" "$@"' launch "$@"
}
