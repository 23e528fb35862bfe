#!/bin/bash
# First process of the test cluster's own pid, mount, network and host-name namespaces: when it ends, the kernel ends
# everything below it and the networks disappear. Started by tests/slurm/cluster.py.
#   cluster_init.sh STATE NODES
set -eu
state=$1 nodes=$2

mount --make-rprivate /
hostname head
mount --bind "$state/hosts" /etc/hosts
ip link set lo up
ip link add name bridge0 type bridge
ip addr add 10.213.0.1/24 dev bridge0
ip link set bridge0 up

munged --foreground --socket="$state/munge/socket" --key-file="$state/munge/key/munge.key" \
    --log-file="$state/log/munged.log" --pid-file="$state/run/munged.pid" --seed-file="$state/munge/seed" \
    >"$state/log/munged.out" 2>&1 &
until [[ -S $state/munge/socket ]]; do sleep 0.05; done
slurmctld -D -f "$SLURM_CONF" >"$state/log/slurmctld.out" 2>&1 &
echo $! >"$state/run/slurmctld.pid"

here=$(dirname "$0")
for ((i = 1; i <= nodes; i++)); do
    bash "$here/cluster_node.sh" "$state" "$i"
done
touch "$state/run/started"
while true; do sleep 3600 & wait; done # PID 1 also collects the orphans
