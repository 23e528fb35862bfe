# Functions of the chain driver and of the job body (slurm/phase.sbatch). Sourced, not run.

say() { printf '[%(%H:%M:%S)T %s] %s\n' -1 "${STAGE:-chain}${element:+ $element}" "$*"; }

# Sources ENV_FILE and makes sure that there is a python.
activate_environment() {
    if [[ -n ${ENV_FILE:-} ]]; then
        [[ -r $ENV_FILE ]] || { echo "error: ENV_FILE $ENV_FILE cannot be read" >&2; return 2; }
        # shellcheck disable=SC1090
        source "$ENV_FILE" || { echo "error: sourcing ENV_FILE $ENV_FILE failed" >&2; return 2; }
    fi
    command -v "$PYTHON" >/dev/null && return
    echo "error: no $PYTHON on $(hostname): set PYTHON, or ENV_FILE to a file that activates the environment" >&2
    return 2
}

# One line in RUN/slurm/events: status reads it when Slurm has forgotten the job.
event() {
    TZ=UTC printf '%(%Y-%m-%dT%H:%M:%SZ)T\t%s\t%s\t%s\t%s\n' -1 "$me" "${SLURM_RESTART_COUNT:-0}" "$1" \
        "${*:2}" >>"$RUN/slurm/events/$artifact.tsv"
    say "$*"
}

# Ends the job: fail CODE MESSAGE
fail() {
    event failed "${*:2}"
    exit "$1"
}

# Step of the newest complete checkpoint of this stage; "none", or "done" with a result.
saved_step() {
    local latest=$RUN/$artifact/checkpoints/latest.json
    [[ -s $RUN/$artifact/result.json ]] && { echo done; return; }
    [[ -s $latest ]] && sed -n 's/.*"tag": *"step_0*\([0-9]\+\)".*/\1/p' "$latest" | grep . || echo none
}

job_state() {
    scontrol show job -o "$me" 2>/dev/null | grep -o 'JobState=[A-Z_]*' | head -n1 | cut -d= -f2
}

# Runs on every node once: writes what the node sees where the first node looks for it.
node_report() {
    local gpus=0 used=0
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        gpus=$(nvidia-smi -L | wc -l)
        used=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | sort -n | tail -n1)
    elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    fi
    local free
    free=$(awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
    echo "$(date +%s) $gpus $used $free" >"$1/$SLURMD_NODENAME"
}

# Checks every node before training: GPUs seen and empty, free memory, shared folder, clock. Ends the job when one is bad.
check_nodes() {
    local folder=$RUN/slurm/nodes-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} problems="" node
    mkdir -p "$folder" || fail 3 "cannot write $RUN from $(hostname): is it on a shared file system?"
    export -f node_report
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        bash -c 'node_report "$1"' _ "$folder" || problems=" a node cannot write $folder (not shared?);"
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        local clock gpus used free skew
        if ! read -r clock gpus used free 2>/dev/null <"$folder/$node"; then
            problems+=" $node: nothing written to $folder (not shared, or full?);"
            continue
        fi
        skew=$(($(date +%s) - clock))
        ((gpus >= GPUS)) || problems+=" $node: $gpus GPUs seen, $GPUS expected;"
        ((GPUS == 0 || used < 2000)) || problems+=" $node: a GPU has $used MiB in use by another process;"
        ((free >= 500)) || problems+=" $node: $free MiB of memory free;"
        ((skew < 60 && skew > -60)) || problems+=" $node: its clock is $skew s off;"
    done
    rm -rf "$folder"
    [[ -z $problems ]] || fail 3 "node check:$problems exclude the node (--exclude NAME) and submit again"
}

# After an interruption or a crash: requeue_or_fail CODE WHY puts this job back into the queue, unless that leads nowhere.
requeue_or_fail() {
    local code=$1 why=$2 step before idle job refused record=$RUN/slurm/events/$artifact.requeue
    local restarts=${SLURM_RESTART_COUNT:-0}
    [[ $(job_state) != CANCELLED ]] || fail "$code" "$why; cancelled, so it is not started again"
    step=$(saved_step)
    read -r job before idle 2>/dev/null <"$record" || job=
    if [[ $job == "$me" && $step == "$before" ]]; then idle=$((idle + 1)); else idle=0; fi
    ((restarts < MAX_REQUEUES)) || fail "$code" "$why; started again $restarts times already (max_requeues), stopping"
    ((idle < MAX_IDLE_REQUEUES)) ||
        fail "$code" "$why; nothing was gained since the last requeue (saved step: $step), stopping. See the log of the ranks"
    echo "$me $step $idle" >"$record"
    trap '' USR1
    trap 'exit "$code"' TERM # from now on it comes from the requeue itself
    event requeued "$why; saved step: $step" # before the requeue, which may end this script at once
    if ! refused=$(scontrol requeue "$me" 2>&1) && [[ $refused != *"pending execution"* ]]; then
        fail "$code" "$why; scontrol requeue was refused: $refused" # pending: Slurm did so itself, after a lost node
    fi
    sleep 60 # Slurm ends this script
    exit "$code"
}
