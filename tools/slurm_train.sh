#!/usr/bin/env bash
# Train under Slurm: GPUS=8 GPUS_PER_NODE=8 tools/slurm_train.sh PARTITION JOB_NAME CONFIG [train.py args]
# With GPUS_PER_NODE=0, Slurm allocates no GPU, and GPUS processes run on CPUs.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 PARTITION JOB_NAME CONFIG [arguments of train.py]" >&2; exit 2; }
gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
gres=(--gres="gpu:$per_node" --ntasks-per-node="$per_node")
[ "$per_node" != 0 ] || gres=()
# SRUN_ARGS is unquoted because it may hold several arguments.
# shellcheck disable=SC2086
exec srun -p "$1" --job-name="$2" "${gres[@]}" --ntasks="$gpus" --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$3" --launcher slurm "${@:4}"
