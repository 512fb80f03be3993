#!/usr/bin/env bash
# Test on several GPUs, or in several CPU processes if there is no GPU: tools/dist_test.sh CONFIG CHECKPOINT GPUS [test.py args]
# For several nodes, run it on each node with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 CONFIG CHECKPOINT GPUS [arguments of test.py]" >&2; exit 2; }
config=$1 checkpoint=$2 gpus=$3
exec torchrun --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" --nproc-per-node="$gpus" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "${@:4}"
