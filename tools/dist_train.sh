#!/usr/bin/env bash
# Train on several GPUs, or in several CPU processes if there is no GPU: tools/dist_train.sh CONFIG GPUS [train.py args]
# For several nodes, run it on each node with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [arguments of train.py]" >&2; exit 2; }
config=$1 gpus=$2
# The imports take seconds: until torchrun handles signals, Ctrl-C ends it without a traceback.
launch="import os, runpy, signal
signal.signal(signal.SIGINT, lambda *_: os._exit(130))
runpy.run_module('mmseg_volo.engine.launch', run_name='__main__', alter_sys=True)"
exec python -c "$launch" --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" --nproc-per-node="$gpus" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "${@:3}"
