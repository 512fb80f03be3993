#!/usr/bin/env bash
# Run a command on two hosts at once: tests/two_hosts.sh tools/dist_train.sh CONFIG GPUS_EACH [train.py args]
# The hosts are network namespaces of this machine with one cable between them and nothing else. Needs root and
# iproute2; ends with 77 where that is not to be had. The command finds NNODES, NODE_RANK, MASTER_ADDR and PORT set.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 COMMAND [arguments]" >&2; exit 2; }
hosts=("volo$$a" "volo$$b")

clean_up() {
    trap - EXIT
    for host in "${hosts[@]}"; do
        ip netns pids "$host" 2>/dev/null | xargs -r kill 2>/dev/null || true
    done
    wait || true
    # The cable goes with its hosts.
    for host in "${hosts[@]}"; do ip netns del "$host" 2>/dev/null || true; done
}
trap clean_up EXIT
trap 'exit 130' INT TERM

join() {
    for host in "${hosts[@]}"; do ip netns add "$host" || return; done
    ip -n "${hosts[0]}" link add cable type veth peer name cable netns "${hosts[1]}" || return
    for rank in 0 1; do
        ip -n "${hosts[rank]}" addr add "10.99.0.$((rank + 1))/24" dev cable || return
        ip -n "${hosts[rank]}" link set lo up || return
        ip -n "${hosts[rank]}" link set cable up || return
    done
}
command -v ip >/dev/null && error=$(join 2>&1) || { echo "no network namespaces here: ${error:-no ip command}" >&2; exit 77; }

for rank in 0 1; do
    NNODES=2 NODE_RANK=$rank MASTER_ADDR=10.99.0.1 PORT="${PORT:-29500}" ip netns exec "${hosts[rank]}" "$@" &
done
# When one host fails the other would wait for it for long.
for _ in 0 1; do wait -n || exit; done
