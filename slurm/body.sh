# Functions of the job body (slurm/phase.sbatch): what Slurm says of this job, its way back into the queue, the check of the
# nodes, and which rank was the first to fail. Sourced, not run.

SRUN_TRIES=4          # starts of one srun, as long as Slurm says what may pass
LOST_SECONDS=120      # from the first rank that has ended badly to the end of all others
ANSWER_SECONDS=1800   # a controller that gives no answer is waited for
ROOM_SECONDS=600      # a disk that is full when the job starts is waited for
ROOM_BYTES=1048576    # with less room than this it is full
BAD_NODES_AT_MOST=3   # restarts that leave out nodes found bad
# what srun says when the step, not what runs in it, has failed; mostly it passes
PASSING='Unable to create step|Invalid generic resource|[Cc]ommunication|Socket timed out|Unable to contact|Unable to confirm|'
PASSING+='step creation|Zero Bytes|Task launch .* failed|Unexpected message|Connection (refused|timed out)|are busy|credential'
NO_ANSWER='Unable to contact|Socket timed out|[Cc]onnection (refused|timed out)|Zero Bytes|^$'
# what a rank says that did not fail by itself
BROKEN='Connection (closed|reset)|Broken pipe|DistBackendError|NCCL|another rank stopped|[Tt]imed out|did not meet the others'
# what passes when somebody makes room, while the job waits for its restart
FULL='No space left|Disk quota exceeded|not enough room|free some space'

# ---- the elements of an array ----

# Those that this job makes, one after another: one, or as many as share it (PER_JOB). Task ids have a limit, elements have
# none. Of a plain job "-".
elements_of_job() {
    local each
    [[ -n $task ]] || echo -
    for each in ${task:+"${ELEMENTS[@]}"}; do
        ((each / PER_JOB == task + OFFSET)) || continue
        ((PER_JOB > 1)) && { choose "$each"; is_complete; } && continue # by an earlier start of this job
        [[ ,${FAILED_ELEMENTS:-}, != *,$each,* ]] || continue # in this start
        echo "$each"
    done
}

# choose ELEMENT: sets what belongs to it alone.
choose() {
    element=${1#-}
    artifact=${ARTIFACTS[${element:-0}]}
    name=$STAGE-${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${task:-$SLURM_JOB_ID} # as the log of this script
    ((PER_JOB == 1)) || name+=.$element
    codes=$RUN/slurm/events/$artifact.codes
    part=(${element:+--module "$element"})
    ((EXPERTS)) && part=(--module $((element / EXPERTS)) --expert $((element % EXPERTS))) # an array over modules x experts
}

# ---- notes ----

# One line in RUN/slurm/events: status reads it when Slurm has forgotten the job.
event() {
    TZ=UTC printf '%(%Y-%m-%dT%H:%M:%SZ)T\t%s\t%s\t%s\t%s\n' -1 "$me" "${SLURM_RESTART_COUNT:-0}" "$1" \
        "${*:2}" >>"$RUN/slurm/events/$artifact.tsv"
    say "$*"
    [[ -z ${HOOK:-} || ! $1 =~ ^(done|failed|requeued)$ ]] || run_hook "$artifact" "$1" "${*:2}"
}

# The user's command; short, since Slurm may be about to end this script, and whatever it comes to changes nothing.
run_hook() {
    RUN=$RUN timeout 10 bash -c "$HOOK" hook "$@" </dev/null || say "hook: exit code $? (124: not done within 10 s): $HOOK"
}

# Ends the job: fail CODE MESSAGE. On a full disk whatever fails may fail because of it: then the job starts again.
fail() {
    if ! can_write; then
        leave_to "$(who_ends)"
        put_back "$1" "no room in $RUN: ${*:2}" nobody
    fi
    fail_for_good "$@"
}

# The same on any disk. Elements that share the job are still made, by this script from its beginning.
fail_for_good() {
    event failed "${*:2}"
    if ((PER_JOB > 1)) && [[ -z $signalled ]]; then
        export FAILED_ELEMENTS=${FAILED_ELEMENTS:-},$element FAILED_CODE=$1
        exec bash "$0"
    fi
    exit "$1"
}

# Whether the run's folder takes what this script will write. Bytes that compress to nothing would take no room.
can_write() {
    local notes=$RUN/slurm/events/$artifact # of a study's cell a/b/seed0
    local probe=$RUN/logs/$name/writable rc
    mkdir -p "${notes%/*}" "$RUN/logs/$name" && head -c "$ROOM_BYTES" /dev/urandom >"$probe"
    rc=$?
    rm -f "$probe"
    return "$rc"
}

# Until the run's folder can be written to, or a signal comes. After a while the job starts again.
wait_for_room() {
    local left
    for ((left = ROOM_SECONDS; left > 0; left -= 10)); do
        [[ -n $signalled ]] || can_write && return
        say "cannot write to $RUN: trying for $left s more"
        nap 10
    done
    put_back 1 "no room in $RUN for $ROOM_SECONDS s" nobody
}

# Step of the newest complete checkpoint of this stage; "none", or "done" with a result.
saved_step() {
    [[ -s $RUN/$artifact/result.json ]] && { echo done; return; }
    [[ $PHASE == cell ]] && { saved_in_cell; return; }
    step_in "$RUN/$artifact/checkpoints/latest.json" || echo none
}

# The step that a latest.json names. Fails without one.
step_in() { [[ -s $1 ]] && sed -n 's/.*"tag": *"step_0*\([0-9]\+\)".*/\1/p' "$1" | grep .; }

# Of a study's cell, which makes one result after another: how many it has, and the step of each that is begun, as
# "results:3,train:20".
saved_in_cell() {
    local folder=${RUN%/*}/$artifact result latest step count=0 begun=""
    for result in "$folder"/*/result.json; do [[ -s $result ]] && ((count++)); done
    for latest in "$folder"/*/checkpoints/latest.json; do
        result=${latest%/checkpoints/*}
        [[ ! -s $result/result.json ]] && step=$(step_in "$latest") && begun+=,${result##*/}:$step
    done
    echo "results:$count$begun"
}

# Whether the result of this stage is there. push and download look by themselves whether theirs is still right, and an
# evaluation is not when its training is younger. Of a study RUN is the folder of its jobs, where a cell leaves a mark.
is_complete() {
    local input
    [[ $PHASE != push && $PHASE != download && -s $RUN/$artifact/result.json ]] || return
    for input in "${INPUTS[@]}"; do
        [[ ! $RUN/$artifact/result.json -ot $RUN/$input/result.json ]] || return
    done
}

# ---- who ends this job ----

# Sleeps so that a trap runs at once.
nap() { sleep "$1" & wait $!; }

# [days-]hours:minutes:seconds in seconds; nothing for UNLIMITED.
seconds() {
    local days=0 hours minutes rest=$1
    [[ $rest == *:*:* ]] || return
    [[ $rest == *-* ]] && days=${rest%%-*} rest=${rest#*-}
    IFS=: read -r hours minutes rest <<<"$rest"
    echo $((((10#$days * 24 + 10#$hours) * 60 + 10#$minutes) * 60 + 10#$rest))
}

# One field of `scontrol show job -o`.
field() { grep -oE "(^| )$2=[^ ]*" <<<"$1" | head -n1 | cut -d= -f2; }

# Who or what wants this job to end: nobody, limit (time limit is near), preempted, asked (a person's USR1), all of which
# leave it to us to start it again; requeued (Slurm starts it again), expired (Slurm ended it and does not start it again:
# preemption with PreemptMode=CANCEL, or the time limit has passed), person (scancel, `cancel`, a person's TERM or INT),
# unknown (no answer). While the script of a job lives that has ended, Slurm calls it COMPLETING, whoever ended it; once it
# is to start again its restarts are counted already, or it is PENDING.
who_ends() {
    local said state used limit preempted
    [[ -e $RUN/slurm/cancelled/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID} ]] && { echo person; return; }
    said=$(timeout 20 scontrol show job -o "$me" 2>/dev/null) || { echo unknown; return; }
    state=$(field "$said" JobState)
    used=$(seconds "$(field "$said" RunTime)")
    limit=$(seconds "$(field "$said" TimeLimit)")
    preempted=$(field "$said" PreemptTime)
    [[ $preempted == None ]] && preempted=""
    case $state in
        PENDING | REQUEUED) echo requeued ;;
        COMPLETING)
            if (($(field "$said" Restarts) > ${SLURM_RESTART_COUNT:-0})); then
                echo requeued
            elif [[ -n $preempted && $preempted == "$(field "$said" EndTime)" ]]; then # a scancel before has another
                echo expired
            elif [[ -n $limit ]] && ((used >= limit)); then
                echo expired
            else
                echo person
            fi
            ;;
        CANCELLED) echo person ;;
        PREEMPTED | TIMEOUT | NODE_FAIL) echo expired ;;
        *) # RUNNING
            if [[ -n $preempted ]]; then
                echo preempted
            elif [[ $signalled == TERM ]]; then
                echo person
            elif [[ -n $limit ]] && ((used + WARN_SECONDS + 60 >= limit)); then
                echo limit
            elif [[ -n $signalled ]]; then
                echo asked
            else
                echo nobody
            fi
            ;;
    esac
}

# The same, however long the controller is away.
who_ends_at_last() {
    local end=$((SECONDS + ANSWER_SECONDS)) who
    while who=$(who_ends) && [[ $who == unknown ]] && ((SECONDS < end)); do nap 5; done
    echo "$who"
}

# Ends the job when somebody else has decided over it: leave_to WHO
leave_to() {
    case $1 in
        person)
            event cancelled "ended by a person, so it is not started again; saved step: $(saved_step)"
            exit 75
            ;;
        requeued)
            event requeued "by Slurm (preempted, lost a node, or scontrol requeue); saved step: $(saved_step)"
            exit 75
            ;;
    esac
}

# ---- back into the queue ----

# put_back CODE WHY WHO [BAD NODES]: this job starts again, unless that leads nowhere: after a crash without a training step
# gained since the last one, or too often. Ends the job.
put_back() {
    local code=$1 why=$2 who=$3 bad=${4:-} step before idle job end refused record=$RUN/slurm/events/$artifact.requeue
    step=$(saved_step)
    read -r job before idle 2>/dev/null <"$record" || job=
    [[ $job == "$lineage" && $step == "$before" ]] || idle=0
    [[ $who == nobody && -z $bad ]] && ((idle++)) # a crash; the others are not its fault
    ((restarts < MAX_REQUEUES)) ||
        fail_for_good "$code" "$why; started again $restarts times already (max_requeues), stopping"
    ((idle <= MAX_IDLE_REQUEUES)) ||
        fail_for_good "$code" \
            "$why; nothing was gained since the last requeue (saved step: $step), stopping. See the log of the ranks"
    # on a full disk the old one stays
    { echo "$lineage $step $idle" >"$record.new" && mv "$record.new" "$record"; } || rm -f "$record.new"
    trap '' USR1
    trap 'exit "$code"' TERM # from now on it comes from the requeue itself
    event requeued "$why; saved step: $step" # before the requeue, which may end this script at once
    [[ -n $successor ]] && exit "$code"
    if [[ $who == expired ]]; then
        succeed_by || event failed "$why; no job could take its place: $refused"
        exit "$code"
    fi
    end=$((SECONDS + ANSWER_SECONDS))
    [[ -n $bad ]] && trap '' TERM # the nodes are left out in the moment between the requeue and the end of this script
    while ! refused=$(scontrol requeue "$me" 2>&1); do
        [[ $refused == *"pending execution"* ]] && exit "$code" # Slurm did so itself, after a lost node
        if [[ $refused =~ $NO_ANSWER ]] && ((SECONDS < end)); then
            sleep 10
            continue
        fi
        event refused "scontrol requeue: $refused"
        succeed_by "$bad" ||
            event failed "$why; scontrol requeue was refused, and no job could take its place: $refused"
        exit "$code"
    done
    [[ -n $bad ]] && scontrol update "jobid=$me" "excnodelist=$(excluded "$bad")"
    sleep 60 # Slurm ends this script
    exit "$code"
}

# The nodes that this job leaves out already, and these.
excluded() {
    local before
    before=$(field "$(scontrol show job -o "$me" 2>/dev/null)" ExcNodeList)
    [[ $before == "(null)" ]] && before=""
    echo "${before:+$before,}$1"
}

# succeed_by [BAD NODES]: another job of the same script takes the place of this one, and what waits for this one waits for
# it. Where Slurm does not start this job again: no `scontrol requeue`, PreemptMode=CANCEL, a time limit that has passed.
succeed_by() {
    local job flags without all
    flags=(--parsable "--dependency=afterany:$me" "--export=ALL,LINEAGE=$lineage,RESTARTS_BEFORE=$((restarts + 1))")
    [[ -n $task ]] && flags+=("--array=$task")
    without=$(excluded "${1:-}")
    [[ -n $without ]] && flags+=("--exclude=${without%,}")
    job=$(outside_of_job sbatch "${flags[@]}" "$SCRIPT" 2>&1) || { refused+="; $(tail -n1 <<<"$job")"; return 1; }
    job=$(grep -oE '^[0-9]+' <<<"$job" | tail -n1) # behind warnings; "id;cluster" on federations
    all=$(elements_of_job | tr '\n' ',')
    all=${all%,}
    TZ=UTC printf '%(%Y-%m-%dT%H:%M:%SZ)T\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' -1 "$STAGE" "${all:--}" "$job" "$me" "$SCRIPT" \
        "$OFFSET" "$PER_JOB" >>"$RUN/jobs.tsv" # the columns of trainer/chain/submit.py
    : >>"$RUN/logs/$STAGE-$job${task:+_$task}.out" # as trainer/chain/submit.py does: Slurm may not be able to make it
    rehang "$job"
    successor=$job
    event successor "job $job takes the place of this one"
}

# A command without the variables of this job, which a new job would take for its own.
outside_of_job() (
    for name in $(compgen -v | grep -E '^(SLURM_|SLURMD_|SRUN_)'); do
        [[ $name == SLURM_CONF ]] || unset "$name"
    done
    "$@"
)

# rehang JOB: every job of ours that waits for this one waits for JOB. One body at a time: each reads what it changes.
rehang() {
    local lock=$RUN/slurm/rehang.lock dependent needs changed
    for ((t = 0; t < 30; t++)); do
        mkdir "$lock" 2>/dev/null && break
        sleep 1 # a body that was killed in here has left it: then go on after a while
    done
    squeue --me --noheader --states=PENDING --format='%F|%E' | sort -u | while IFS='|' read -r dependent needs; do
        needs=$(sed 's/([^)]*)//g' <<<"$needs") # afterok:12_*(unfulfilled),afterok:13(unfulfilled)
        changed=$(waits_for "$needs" "$1")
        [[ $changed == "$needs" || $dependent == "$1" ]] || scontrol update "jobid=$dependent" "dependency=$changed"
    done
    rmdir "$lock" 2>/dev/null
}

# waits_for NEEDS JOB: a dependency as squeue shows it, with JOB in place of this job. Slurm calls a whole array 12_*: it
# becomes its elements one by one, as far as Slurm knows them.
waits_for() {
    local need parts="" array=${SLURM_ARRAY_JOB_ID:-} other
    for need in ${1//,/ }; do
        if [[ ${need#*:} == "$me" ]]; then
            need=${need%%:*}:$2
        elif [[ -n $array && ${need#*:} == "${array}_*" ]]; then
            local others=$2
            for other in $(squeue --noheader --array --states=all --jobs="$array" --format=%K); do
                [[ $other == "$task" ]] || others+=":${array}_$other"
            done
            need=${need%%:*}:$others
        fi
        parts+=${parts:+,}$need
    done
    echo "$parts"
}

# ---- the check of the nodes ----

# check_nodes [TIMES BEFORE]: every node before training: GPUs seen and empty, free memory, shared folder, clock. Bad nodes
# are left out and the job starts again; when all are bad it is a setting, and the job ends.
check_nodes() {
    local folder=$RUN/slurm/nodes-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} nodes node problem said tries
    local problems="" bad="" good=0 written=0 rc
    mkdir -p "$folder" || fail 3 "cannot write $RUN from $(hostname): is it on a shared file system?"
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    for ((tries = 1; tries <= SRUN_TRIES; tries++)); do
        said=$(srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
            --kill-on-bad-exit=0 bash "$ROOT/slurm/node_report.sh" "$folder" 2>&1)
        rc=$?
        [[ -n $said ]] && say "$said"
        [[ -z $signalled && $rc != 0 && $said =~ $PASSING ]] || break
        ((tries == SRUN_TRIES)) || nap $((tries * 5))
    done
    if [[ -n $signalled ]]; then
        rm -rf "$folder"
        return
    fi
    if ((rc)) && [[ $said =~ $PASSING ]]; then
        put_back 1 "srun failed $SRUN_TRIES times before the node check: $(grep -E "$PASSING" <<<"$said" | tail -n1)" nobody
    fi
    for node in $nodes; do
        [[ -s $folder/$node ]] && written=1
        problem=$(problem_of "$folder/$node")
        if [[ -z $problem ]]; then
            good=$((good + 1))
        else
            problems+=" $node: $problem;"
            bad+=${bad:+,}$node
        fi
    done
    if [[ -n $problems ]] && { [[ $said =~ $FULL ]] || ! can_write; }; then # before $folder is gone, which makes room
        ((${1:-0} < SRUN_TRIES)) || put_back 1 "the disk is full: nodes cannot write to $RUN" nobody
        rm -rf "$folder"
        wait_for_room
        check_nodes $((${1:-0} + 1))
        return
    fi
    rm -rf "$folder"
    [[ -n $problems ]] || return
    ((written)) || fail 3 "node check:$problems look at --out${said:+, and at what srun says: $(tail -n1 <<<"$said")}"
    ((good || SLURM_JOB_NUM_NODES == 1)) ||
        fail 3 "node check:$problems all nodes of the job are alike: look at the settings (--gpus-per-node, --mem)"
    leave_out "$bad" "$problems"
}

# What is wrong with a node by the FILE it wrote; nothing when it is well.
problem_of() {
    local clock gpus used free skew
    if ! read -r clock gpus used free 2>/dev/null <"$1"; then
        echo "nothing written to ${1%/*} (not shared, or full?)"
        return
    fi
    skew=$(($(date +%s) - clock))
    if ((gpus < GPUS)); then
        echo "$gpus GPUs seen, $GPUS expected"
    elif ((GPUS && used >= 2000)); then
        echo "a GPU has $used MiB in use by another process"
    elif ((free < 500)); then
        echo "$free MiB of memory free"
    elif ((skew >= 60 || skew <= -60)); then
        echo "its clock is $skew s off"
    fi
}

# leave_out NODES PROBLEMS: start again without these nodes, if there are others. Ends the job.
leave_out() {
    local record=$RUN/slurm/events/$artifact.excluded times=0 job said
    read -r job times 2>/dev/null <"$record"
    [[ $job == "$lineage" ]] || times=0
    ((times < BAD_NODES_AT_MOST)) ||
        fail 3 "node check:$2 other nodes were left out $times times before, stopping: exclude them (--exclude NAME)"
    if ! said=$(outside_of_job sbatch --test-only "--exclude=$(excluded "$1")" ${task:+--array="$task"} "$SCRIPT" 2>&1); then
        fail 3 "node check:$2 and Slurm has no other nodes for this job ($(tail -n1 <<<"$said"))"
    fi
    echo "$lineage $((times + 1))" >"$record"
    put_back 3 "node check:$2 starting again without $1" nobody "$1"
}

# ---- what became of the ranks ----

# run_ranks COMMAND...: one task per rank; sets code, and said to srun's own words. srun in the background: a trap runs only
# when bash is in `wait`.
run_ranks() {
    local words=$RUN/logs/$name/srun.err watcher
    rm -f "$codes"
    srun --export=ALL --kill-on-bad-exit=1 --wait=60 --open-mode=append --output="$RUN/logs/$name/%N-rank%t.out" \
        "${SRUN_ARGS[@]}" bash "$ROOT/slurm/rank.sh" "$codes" "$@" 2>"$words" &
    child=$!
    end_the_others >/dev/null 2>&1 &
    watcher=$!
    while true; do
        woken=0
        wait "$child"
        code=$?
        ((woken)) || break # else the signal ended `wait`, not the ranks
    done
    child=
    kill "$watcher" 2>/dev/null
    [[ -s $codes ]] && read -r code _ <"$codes" # srun's is 0 when all were interrupted
    said=$(<"$words")
    [[ -n $said ]] && say "$said"
}

# A rank that is gone can leave the others waiting for ever. srun ends them, unless the controller is away just then; then
# srun ends here, and the ranks with the job.
end_the_others() {
    until [[ -s $codes ]]; do sleep 5; done
    sleep "$LOST_SECONDS"
    kill -KILL "$child"
}

# Passes a warning on until the ranks have saved and ended; TERM to srun would kill them instead.
warn() {
    woken=1
    [[ $1 == TERM || -z $signalled ]] && signalled=$1
    [[ -n ${child:-} ]] || return # nothing runs
    if ((!warned)); then
        warned=1
        event warned "asking all ranks to save and stop"
        ask_ranks >/dev/null 2>&1 &
    fi
    [[ $1 == TERM ]] || return
    # Slurm kills this script, too, after KillWait seconds: that may be before the ranks have saved
    case $(who_ends) in
        person) event cancelled "ended by a person, so it is not started again; the ranks are asked to save" ;;
        expired) [[ -n $successor ]] || ((restarts >= MAX_REQUEUES)) || succeed_by ;;
    esac
}

ask_ranks() {
    for ((t = 0; t < WARN_SECONDS - 30; t += 5)); do kill -USR1 "$child" 2>/dev/null && sleep 5 || exit; done
    kill -KILL "$child" # not saved in time: the last regular checkpoint has to do
}

# The part of FILE that the newest start of the rank wrote, its lines numbered as in the file.
newest_part() {
    local begin
    begin=$(grep -n '^== rank ' "$1" | tail -n1 | cut -d: -f1)
    awk -v begin="${begin:-1}" 'NR >= begin {print NR ":" $0}' "$1"
}

# Sets cause_code and cause from the first rank that failed by itself: one that says an error of its own, else the first
# that ended. Others only lost their connection to it.
find_cause() {
    local code_of rank node log line number first_code="" first=""
    cause_code=$code cause=""
    [[ -s $codes && $(head -n1 "$codes") == "75 "* ]] && cause_code=75 && return # interrupted, and saved by all
    while read -r code_of rank node; do
        log=$RUN/logs/$name/$node-rank$rank.out
        line=$(newest_part "$log" 2>/dev/null | grep -E '^[0-9]+:(\[rank [0-9]+\] )?error:' | tail -n1)
        [[ -n $line ]] || line=$(newest_part "$log" 2>/dev/null | tail -n40 | grep -iE 'error:' | tail -n1)
        [[ -n $line ]] || line=$(newest_part "$log" 2>/dev/null | tail -n40 | grep -E '(Error|Exception)$' | tail -n1)
        number=${line%%:*}
        line=$(sed -E 's/^[0-9]+:(\[rank [0-9]+\] )?(error: )?//' <<<"$line")
        line="rank $rank on $node: ${line:-$(ended_with "$code_of")} ($log${number:+:$number})"
        if [[ -n $number && $code_of -le 128 ]] && ! [[ $line =~ $BROKEN ]]; then
            cause_code=$code_of cause=$line
            return
        elif [[ -z $first && -s $codes ]]; then
            first_code=$code_of first=$line
        fi
    done < <(ends_of_ranks)
    cause_code=${first_code:-$code} cause=$first
}

# Exit code, rank and node of the ranks that ended badly, the first one first. On a full disk they could not note it: then
# every rank of this start that left a log, with the code of srun.
ends_of_ranks() {
    local log
    if [[ -s $codes ]]; then
        cat "$codes"
        return
    fi
    for log in "$RUN/logs/$name"/*-rank*.out; do
        newest_part "$log" 2>/dev/null | head -n1 | grep -q "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}," || continue
        log=$(basename "$log" .out)
        echo "$code ${log##*-rank} ${log%-rank*}"
    done
}

# What an exit code says. Above 128 it is a signal, if there is one of that number.
ended_with() {
    local number=$(($1 - 128)) signal
    if ((number > 0 && number <= 64)) && signal=$(kill -l "$number" 2>/dev/null); then
        echo "killed by signal $number, SIG$signal$( ((number == 9)) && echo ' (also out of memory)')"
    else
        echo "ended with code $1$( (($1 > 128)) && echo ', which is no signal')"
    fi
}
