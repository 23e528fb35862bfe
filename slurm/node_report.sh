#!/bin/bash
# Runs on every node once before training: writes what the node sees where the job's first node looks for it.
#   node_report.sh FOLDER      leaves FOLDER/NODE: clock in seconds, GPUs, MiB in use on the fullest GPU, MiB of memory free

gpus=0 used=0
if command -v nvidia-smi >/dev/null && listed=$(nvidia-smi -L 2>/dev/null); then
    gpus=$(grep -c . <<<"$listed")
    used=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | sort -n | tail -n1)
elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
fi
free=$(awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
echo "$(date +%s) $gpus $used $free" >"$1/$SLURMD_NODENAME"
