#!/bin/bash
# Starts one node of the test cluster, in a network and with a host name of its own: from cluster_init.sh, and again after
# the node was killed (tests/slurm/cluster.py).
#   cluster_node.sh STATE NUMBER
set -eu
state=$1 i=$2

# slurmd waits for its network: the veth pair needs the pid of the new namespace
unshare --net --uts --mount bash -c '
    hostname "node$1"
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
    ip link set lo up
    ip addr add "10.213.0.$((10 + $1))/24" dev eth0
    ip link set eth0 up
    exec slurmd -D -N "node$1" -f "$SLURM_CONF"' _ "$i" >>"$state/log/node$i.out" 2>&1 &
echo $! >"$state/run/node$i.pid"
outside=$(readlink /proc/self/ns/net)
until inside=$(readlink "/proc/$!/ns/net") && [[ $inside != "$outside" ]]; do sleep 0.02; done # on a busy machine it may fail
ip link add "veth$i" type veth peer name eth0 netns "$!"
ip link set "veth$i" master bridge0 up
