"""The job body slurm/phase.sbatch with a scontrol, srun, sbatch and squeue that say what a real Slurm was seen to say.

What needs the real thing is in tests/slurm.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {
    # what it is asked, line by line; "job" holds what it says of the job, "refuse" why it takes no requeue
    "scontrol": """
        echo "scontrol $*" >>"$FAKE/calls"
        case "$1 $2" in
            "show hostnames") printf 'node1\\nnode2\\n' ;;
            "show job") [[ -s $FAKE/job ]] && cat "$FAKE/job" || exit 1 ;;
            "requeue "*)
                if [[ -s $FAKE/refuse ]]; then
                    cat "$FAKE/refuse" >&2
                    [[ -e $FAKE/refuse_once ]] && rm "$FAKE/refuse"
                    exit 1
                fi
                body=$(cat "$FAKE/body")
                (/bin/sleep 0.1; kill -TERM "$body") >/dev/null 2>&1 & ;;
        esac""",
    # one process per node; "srun_says" is a failure of the step itself, as often as "srun_fails" says
    "srun": """
        echo "srun $*" >>"$FAKE/calls"
        fails=$(cat "$FAKE/srun_fails" 2>/dev/null || echo 0)
        if ((fails)); then
            echo $((fails - 1)) >"$FAKE/srun_fails"
            cat "$FAKE/srun_says" >&2
            exit "$(cat "$FAKE/srun_code")"
        fi
        output="" export=""
        while [[ $1 == --* ]]; do
            [[ $1 == --output=* ]] && output=${1#--output=}
            [[ $1 == --export=* ]] && export=${1#--export=}
            shift
        done
        if [[ ${SLURM_EXPORT_ENV:-} == NONE && $export != ALL ]]; then unset PATH FAKE; fi
        export -n node_report # as an sh wrapper around srun does
        pids=()
        trap 'for pid in "${pids[@]}"; do pkill -USR1 -P "$pid"; done' USR1 # slurmd signals all processes of the step
        for rank in 0 1; do
            node=node$((rank + 1))
            file=${output//%N/$node}
            file=${file//%t/$rank}
            SLURM_PROCID=$rank SLURMD_NODENAME=$node SLURM_STEP_ID=0 "$@" >>"${file:-/dev/stdout}" 2>&1 &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do
            until wait "$pid"; code=$?; [[ ! -d /proc/$pid ]]; do :; done
            ((code > worst)) && worst=$code
        done
        exit "${worst:-0}" """,
    "sbatch": """
        echo "sbatch $*" >>"$FAKE/calls"
        [[ $* == *--test-only* ]] && exit "$(cat "$FAKE/test_only" 2>/dev/null || echo 0)"
        echo 500 """,
    "squeue": """
        echo "squeue $*" >>"$FAKE/calls"
        case "$*" in
            *%K*) cat "$FAKE/elements" ;;
            *) cat "$FAKE/pending" 2>/dev/null ;;
        esac""",
    "sleep": 'exec /bin/sleep "$(awk -v s="$1" \'BEGIN {print s / 200}\')"',
    "nvidia-smi": """
        case "$*" in
            -L) for ((i = 0; i < $(cat "$FAKE/gpus.$SLURMD_NODENAME" 2>/dev/null || echo 1); i++)); do echo GPU; done ;;
            *) echo 0 ;;
        esac""",
}
RUNNING = "JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts=0 RunTime=00:01:00 TimeLimit=01:00:00 "
RUNNING += "EndTime=2026-01-01T01:00:00 PreemptTime=None ExcNodeList=(null)"
COMPLETING = RUNNING.replace("RUNNING", "COMPLETING").replace("EndTime=2026-01-01T01", "EndTime=2026-01-01T00")
DONE = 'echo "{}" >"$RUN/meta/result.json"'
READ_ERROR = "image c2/09.png cannot be read: set data.skip_unreadable=true"


@pytest.fixture
def body(tmp_path, monkeypatch):
    """run(python=..., **settings) runs the body of stage meta; what it asked Slurm is in calls()."""
    fake = tmp_path / "fake"
    out = tmp_path / "run"
    for folder in (fake, out / "teacher", out / "meta"):
        folder.mkdir(parents=True)
    (out / "teacher/result.json").write_text("{}\n")
    (fake / "job").write_text(RUNNING)
    for program, lines in PROGRAMS.items():
        (fake / program).write_text(f"#!/bin/bash\n{lines}\n")
        (fake / program).chmod(0o755)

    def start(python=DONE, environ=None, **settings):
        (fake / "python").write_text(f"#!/bin/bash\n[[ $2 == trainer.report ]] && exit\n{python}\n")
        (fake / "python").chmod(0o755)
        values = {
            "ROOT": ROOT,
            "WORK": ROOT,
            "RUN": out,
            "STAGE": "meta",
            "PHASE": "meta",
            "ENV_FILE": "",
            "PYTHON": "python",
            "EXPERTS": 0,
            "GPUS": 1,
            "OFFSET": 0,
            "PER_JOB": 1,
            "WARN_SECONDS": 600,
            "MAX_REQUEUES": 20,
            "MAX_IDLE_REQUEUES": 1,
            "SCRIPT": out / "slurm/1/meta.sbatch",
        }
        values |= settings
        head = [f'{name}="{value}"' for name, value in values.items()]
        head += ["ARTIFACTS=(meta distill_1 distill_2)", "ELEMENTS=(0 1 2)", "INPUTS=(teacher)"]
        head += ["TRAINER_ARGS=()", "SRUN_ARGS=()"]
        head.append(f"export RUN; echo $$ >{fake}/body")
        script = tmp_path / "script"
        script.write_text("\n".join([*head, (ROOT / "slurm/phase.sbatch").read_text()]))
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "FAKE": str(fake),
               "PATH": f"{fake}:{os.environ['PATH']}"}  # fmt: skip
        return subprocess.Popen(["bash", script], env={**os.environ, **job, **(environ or {})}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip

    def events():
        path = out / "slurm/events/meta.tsv"
        return [" ".join(line.split("\t")[3:]) for line in path.read_text().splitlines()]

    def end(process):
        text, _ = process.communicate(timeout=60)
        return SimpleNamespace(code=process.returncode, text=text, events=events(), last=events()[-1])

    def calls(program):
        path = fake / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix(program + " ") for line in lines if line.startswith(program + " ")]

    def until(condition):
        limit = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < limit
            time.sleep(0.02)

    run = lambda *arguments, **settings: end(start(*arguments, **settings))  # noqa: E731
    return SimpleNamespace(fake=fake, out=out, start=start, end=end, run=run, calls=calls, until=until, events=events)


def requeues(body):
    return [call for call in body.calls("scontrol") if call.startswith("requeue")]


SAVES = f"""
exec {sys.executable} -c '
import os, signal, time
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: os._exit(75))  # at once: more warnings come while python ends
open(os.environ["FAKE"] + "/ranks." + os.environ["SLURM_PROCID"], "w").close()
time.sleep(20)'
"""  # a rank as the trainer's: it ends with 75 when it is warned


def training(body, **settings):
    """A body whose two ranks are at work."""
    process = body.start(SAVES, **settings)
    body.until(lambda: (body.fake / "ranks.0").exists() and (body.fake / "ranks.1").exists())
    return process


def test_an_undisturbed_stage_is_done(body):
    done = body.run()
    assert (done.code, done.last) == (0, "done exit 0"), done.text
    assert requeues(body) == []


# ---- 1: who ends the job ----


@pytest.mark.parametrize(
    "said, number, last",
    [
        # as Slurm 22.05 was seen to say it while the script of the job lived
        (COMPLETING, signal.SIGTERM, "cancelled ended by a person"),
        (COMPLETING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:30:00"), signal.SIGTERM,
         "cancelled ended by a person"),  # scancel in the grace time of a preemption
        (RUNNING, signal.SIGTERM, "cancelled ended by a person"),  # scancel --batch --signal=TERM
        (COMPLETING.replace("Restarts=0", "Restarts=1"), signal.SIGTERM, "requeued by Slurm"),
        (RUNNING.replace("RUNNING", "PENDING"), signal.SIGTERM, "requeued by Slurm"),  # its node was set down
    ],
)  # fmt: skip
def test_what_a_person_or_slurm_has_ended_is_not_requeued(body, said, number, last):
    process = training(body)
    (body.fake / "job").write_text(said)
    process.send_signal(number)
    done = body.end(process)
    assert done.last.startswith(last) and done.code == 75, done.text
    assert requeues(body) == [] and body.calls("sbatch") == []


@pytest.mark.parametrize(
    "said, why",
    [
        (RUNNING, "interrupted after a save"),  # a person's USR1
        (RUNNING.replace("RunTime=00:01", "RunTime=00:51"), "interrupted by the time limit after a save"),
        (RUNNING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:30:00"),
         "interrupted by a preemption after a save"),
    ],
)  # fmt: skip
def test_a_warning_leads_to_a_save_and_a_requeue(body, said, why):
    process = training(body)
    (body.fake / "job").write_text(said)
    process.send_signal(signal.SIGUSR1)
    done = body.end(process)
    assert done.last == f"requeued {why}; saved step: none", done.text
    assert done.code == 75 and requeues(body) == ["requeue 7"]


def test_a_mark_of_cancel_is_enough(body):
    (body.out / "slurm/cancelled").mkdir(parents=True)
    (body.out / "slurm/cancelled/7").touch()
    done = body.run("exit 75")
    assert done.last.startswith("cancelled ended by a person") and requeues(body) == [], done.text


def test_stage_without_its_inputs_fails_before_training(body):
    """afterok on a forgotten id starts at once, so the job body looks at the disk."""
    (body.out / "teacher/result.json").unlink()
    done = body.run()
    assert done.last.startswith(f"failed needs {body.out}/teacher, which is not complete")
    assert done.code == 2 and body.calls("srun") == []


# ---- 2: the node check, what passes, what is complete ----


def test_a_complete_stage_ends_at_once(body):
    (body.out / "meta/result.json").write_text("{}\n")
    done = body.run("exit 1")
    assert (done.code, done.events) == (0, ["done was complete already"])
    assert body.calls("srun") == []


def test_a_result_older_than_its_input_is_not_complete(body):
    (body.out / "meta/result.json").write_text("{}\n")
    os.utime(body.out / "meta/result.json", (5, 5))
    done = body.run()
    assert done.events[0].startswith("started") and done.last == "done exit 0"


def test_a_warning_while_python_ends_is_no_failure(body):
    done = body.run(f"{DONE}; kill -USR1 $$; kill -KILL $$")
    assert done.code == 0 and done.last.startswith("done exit "), done.text
    assert requeues(body) == []


@pytest.mark.parametrize(
    "said, number, last",
    [
        (COMPLETING, signal.SIGTERM, "cancelled ended by a person"),
        (RUNNING, signal.SIGUSR1, "requeued interrupted before training started"),
    ],
)
def test_a_signal_in_the_node_check_accuses_no_node(body, said, number, last):
    (body.fake / "nvidia-smi").write_text('#!/bin/bash\ntouch "$FAKE/checking"\n/bin/sleep 0.5\nexit 1\n')
    process = body.start(GPUS=0)
    body.until(lambda: (body.fake / "checking").exists())
    (body.fake / "job").write_text(said)
    process.send_signal(number)
    done = body.end(process)
    assert done.last.startswith(last), done.text
    assert len(body.calls("srun")) == 1


@pytest.mark.parametrize("fails", [1, 3])
@pytest.mark.parametrize("where", ["check", "ranks"])
def test_what_passes_is_tried_again(body, fails, where):
    words = "srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification"
    (body.fake / "srun_says").write_text(words + "\n")
    (body.fake / "srun_code").write_text("233")
    (body.fake / "srun_fails").write_text(str(fails))
    done = body.run(**{} if where == "check" else {"PHASE": "push"})  # a push is not checked
    assert (done.code, done.last) == (0, "done exit 0"), done.text
    assert words in done.text


@pytest.mark.parametrize("where", ["check", "ranks"])
def test_what_does_not_pass_is_named_and_no_node_accused(body, where):
    words = "srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification"
    (body.fake / "srun_says").write_text(words + "\n")
    (body.fake / "srun_code").write_text("233")
    (body.fake / "srun_fails").write_text("99")
    done = body.run(**{} if where == "check" else {"PHASE": "push"})
    assert done.last.startswith("requeued srun failed 4 times") and words in done.last, done.text
    again = body.run(environ={"SLURM_RESTART_COUNT": "1"}, **{} if where == "check" else {"PHASE": "push"})
    assert again.last.startswith("failed srun failed 4 times") and "nothing was gained" in again.last


def test_a_bad_node_is_left_out(body):
    (body.fake / "gpus.node2").write_text("0")
    done = body.run()
    assert "node check: node2: 0 GPUs seen, 1 expected; starting again without node2" in done.last, done.text
    assert [call for call in body.calls("scontrol") if "update" in call or "requeue" in call] == [
        "requeue 7",
        "update jobid=7 excnodelist=node2",
    ]


def test_nodes_are_left_out_a_few_times_only_and_never_when_there_are_no_others(body):
    (body.fake / "gpus.node2").write_text("0")
    for _ in range(3):
        assert body.run().last.startswith("requeued node check: node2")
    assert body.run().last.startswith("failed node check: node2: 0 GPUs seen, 1 expected; other nodes were left out 3")
    (body.out / "slurm/events/meta.excluded").unlink()
    (body.fake / "test_only").write_text("1")
    assert "and Slurm has no other nodes for this job" in body.run().last


def test_when_all_nodes_are_bad_it_is_a_setting(body):
    done = body.run(GPUS=2)
    words = "node check: node1: 1 GPUs seen, 2 expected; node2: 1 GPUs seen, 2 expected; all nodes of the job are alike"
    assert done.last.startswith(f"failed {words}") and done.code == 3


def test_preemptions_before_the_first_step_do_not_end_the_chain(body):
    (body.fake / "job").write_text(RUNNING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:30:00"))
    for _ in range(3):
        assert body.run("exit 75").last == "requeued interrupted by a preemption after a save; saved step: none"
    (body.fake / "job").write_text(RUNNING)
    assert body.run("kill -KILL $$").last.startswith("requeued a rank was killed")  # the first crash
    assert "nothing was gained" in body.run("kill -KILL $$").last


# ---- 5: Slurm that does not start a job again ----


def test_a_refused_requeue_leads_to_a_successor(body):
    (body.fake / "refuse").write_text("Requested operation is presently disabled for job 7\n")
    (body.fake / "pending").write_text("9|afterok:7(unfulfilled),afterok:3(unfulfilled)\n10|afterok:77(unfulfilled)\n")
    process = training(body)
    process.send_signal(signal.SIGUSR1)
    done = body.end(process)
    assert done.events[-3].startswith("requeued interrupted after a save")
    assert done.events[-2] == "refused scontrol requeue: Requested operation is presently disabled for job 7"
    assert done.last == "successor job 500 takes the place of this one"
    (call,) = body.calls("sbatch")
    assert "--dependency=afterany:7 --export=ALL,LINEAGE=7,RESTARTS_BEFORE=1" in call
    assert call.endswith(f"{body.out}/slurm/1/meta.sbatch") and "--array" not in call
    assert [c for c in body.calls("scontrol") if "update" in c] == ["update jobid=9 dependency=afterok:500,afterok:3"]
    row = (body.out / "jobs.tsv").read_text().splitlines()[-1].split("\t")
    assert row[1:] == ["meta", "-", "500", "7", f"{body.out}/slurm/1/meta.sbatch", "0", "1"]


def test_preempted_for_good_has_a_successor_before_the_ranks_have_saved(body):
    process = training(body)
    (body.fake / "job").write_text(COMPLETING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:00:00"))
    process.send_signal(signal.SIGTERM)
    done = body.end(process)
    assert [event.split()[0] for event in done.events] == ["started", "warned", "successor", "requeued"], done.text
    assert requeues(body) == [] and len(body.calls("sbatch")) == 1


def test_the_successor_of_an_element_stands_for_it_alone(body):
    (body.fake / "refuse").write_text("Requested operation is presently disabled\n")
    (body.fake / "pending").write_text("9|afterok:6_*(unfulfilled),afterok:3(unfulfilled)\n")
    (body.fake / "elements").write_text("0\n1\n2\n")
    environ = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "0", "LINEAGE": "5_0", "RESTARTS_BEFORE": "2"}
    done = body.run("exit 75", environ=environ)
    assert done.last == "successor job 500 takes the place of this one", done.text
    (call,) = body.calls("sbatch")
    assert "--dependency=afterany:6_0 --export=ALL,LINEAGE=5_0,RESTARTS_BEFORE=3 --array=0" in call
    updates = [c for c in body.calls("scontrol") if "update" in c]
    assert updates == ["update jobid=9 dependency=afterok:500:6_1:6_2,afterok:3"]


def test_restarts_of_the_jobs_before_count(body):
    done = body.run("exit 75", environ={"RESTARTS_BEFORE": "19", "SLURM_RESTART_COUNT": "1"})
    assert "started again 20 times already (max_requeues)" in done.last


# ---- several elements in one job ----

SHARED = {"STAGE": "distill", "PHASE": "distill", "PER_JOB": 2, "OFFSET": 0}
TASK_0 = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "0"}  # elements 0 and 1


def kinds(body, artifact):
    lines = (body.out / f"slurm/events/{artifact}.tsv").read_text().splitlines()
    return [line.split("\t")[3] for line in lines]


@pytest.fixture
def shared(body):
    """A job of the elements 0 (meta) and 1 (distill_1), whose results are made but for what `python` says before."""
    (body.out / "distill_1").mkdir()
    made = 'folder=$([[ "$*" == *"--module 1"* ]] && echo distill_1 || echo meta)'

    def run(python="", **environ):
        lines = [made, python, 'echo "{}" >"$RUN/$folder/result.json"']
        process = body.start("\n".join(lines), environ=TASK_0 | environ, **SHARED)
        text, _ = process.communicate(timeout=60)
        return process.returncode, text

    body.run_shared = run
    return body


def test_elements_of_one_job_are_made_one_after_another(shared):
    code, text = shared.run_shared()
    assert code == 0, text
    assert kinds(shared, "meta") == kinds(shared, "distill_1") == ["started", "done"]
    assert {path.name for path in (shared.out / "logs").iterdir()} == {"distill-6_0.0", "distill-6_0.1"}
    code, text = shared.run_shared()
    assert code == 0 and kinds(shared, "meta") == ["started", "done"], "nothing is left to do"


def test_the_others_are_made_where_an_element_of_a_job_fails(shared):
    code, text = shared.run_shared('[[ $folder != meta ]] || { echo "error: bad"; exit 2; }')
    assert code == 2, text
    assert kinds(shared, "meta") == ["started", "failed"] and kinds(shared, "distill_1") == ["started", "done"]


def test_a_requeued_job_of_several_elements_goes_on_with_the_one_it_was_at(shared):
    code, text = shared.run_shared("[[ $folder == meta ]] || exit 75")
    assert code == 75 and requeues(shared) == ["requeue 6_0"], text
    code, text = shared.run_shared(SLURM_RESTART_COUNT="1")
    assert code == 0, text
    assert kinds(shared, "meta") == ["started", "done"]
    assert kinds(shared, "distill_1") == ["started", "requeued", "started", "done"]


def test_a_cancelled_job_of_several_elements_makes_none_of_them(shared):
    (shared.out / "slurm/cancelled").mkdir(parents=True)
    (shared.out / "slurm/cancelled/6").touch()
    code, text = shared.run_shared("exit 75")
    assert code == 75 and requeues(shared) == [] and kinds(shared, "meta")[-1] == "cancelled", text
    assert not (shared.out / "slurm/events/distill_1.tsv").exists()


def test_the_successor_of_a_job_of_several_elements_has_those_that_are_left(shared):
    (shared.fake / "refuse").write_text("Requested operation is presently disabled\n")
    (shared.fake / "elements").write_text("0\n1\n")
    shared.run_shared("[[ $folder == meta ]] || exit 75")
    row = (shared.out / "jobs.tsv").read_text().splitlines()[-1].split("\t")
    assert (row[1], row[2], row[3], row[6:]) == ("distill", "1", "500", ["0", "2"])
    assert (shared.out / "logs/distill-500_0.out").exists()


# ---- 6: environments ----


def test_sbatch_that_exports_nothing(body):
    done = body.run(f"[[ $MASTER_ADDR == node1 ]] && {DONE}", environ={"SLURM_EXPORT_ENV": "NONE"})
    assert (done.code, done.last) == (0, "done exit 0"), done.text


@pytest.mark.parametrize("lines", ["[[ -d /no/such ]] && module load cuda", "[ -d /no/such ] && x", "(( 0 )) && x", ""])
def test_a_false_test_at_the_end_of_env_file_is_no_failure(body, lines):
    (body.fake / "env.sh").write_text(f"export SEEN=1\nset -eu\nset +e\n{lines}\n")
    done = body.run(f"((SEEN)) && {DONE}", ENV_FILE=body.fake / "env.sh")
    assert (done.code, done.last) == (0, "done exit 0"), done.text


@pytest.mark.parametrize(
    "lines, words",
    [
        ("module() { return 1; }\nmodule load cuda", "at: return 1"),
        ("[[ -d /no/such ]] || { echo missing; return 3; }", "with status 3 at: return 3"),
        ("source /no/such/activate", "at: source /no/such/activate"),
        ("no_such_command", "with status 127 at: no_such_command"),
    ],
)
def test_an_env_file_that_fails_is_one(body, lines, words):
    (body.fake / "env.sh").write_text(lines + "\n")
    done = body.run(ENV_FILE=body.fake / "env.sh")
    assert done.last == "failed no environment: see ENV_FILE and PYTHON" and done.code == 2
    assert words in done.text


def test_env_file_without_a_slash_is_not_looked_up_on_path(body, tmp_path):
    (body.fake / "env.sh").write_text("export SEEN=path\n")  # the folder is on PATH
    (tmp_path / "env.sh").write_text("export SEEN=here\n")
    command = (
        f'ENV_FILE=env.sh PYTHON=bash; source {ROOT}/slurm/common.sh; activate_environment; echo "$SEEN $ENV_FILE"'
    )
    environ = {**os.environ, "PATH": f"{body.fake}:{os.environ['PATH']}", "ENV_FILE": "env.sh", "PYTHON": "bash"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout == f"here {tmp_path}/env.sh\n"


# ---- 8: a lost rank ----


def test_a_body_that_lost_a_rank_ends_the_others(body):
    """The controller is away: srun ends nobody, the body does after LOST_SECONDS, and asks until it gets an answer."""
    (body.fake / "refuse").write_text("Unable to contact slurm controller (connect failure)\n")
    (body.fake / "refuse_once").touch()
    begun = time.monotonic()
    done = body.run("((SLURM_PROCID == 1)) && kill -KILL $$; for ((i = 0; i < 600; i++)); do /bin/sleep 0.05; done")
    assert time.monotonic() - begun < 20  # LOST_SECONDS by the quicker sleep, not the ranks' 30 s
    assert done.last.startswith("requeued a rank was killed: rank 1 on node2: killed by signal 9, SIGKILL")
    assert requeues(body) == ["requeue 7", "requeue 7"]


# ---- 9, 10b: what is said of the end ----


@pytest.mark.parametrize(
    "code, words",
    [
        (137, "killed by signal 9, SIGKILL"),
        (143, "killed by signal 15"),
        (233, "ended with code 233, which is no signal"),
    ],
)
def test_exit_codes_are_named_for_what_they_are(code, words):
    command = f"source {ROOT}/slurm/body.sh; ended_with {code}"
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert said.startswith(words)


@pytest.mark.parametrize("first", [0, 1])
def test_the_reason_is_of_the_rank_that_failed_by_itself(body, first):
    """Whichever of the two notes its end first."""
    done = body.run(f"""
        ((SLURM_PROCID == {first})) || /bin/sleep 0.3
        if ((SLURM_PROCID == 1)); then
            echo "a line"; echo "[rank 1] error: {READ_ERROR}" >&2; exit 2
        fi
        echo "error: [gloo/transport/tcp/pair.cc:553] Connection closed by peer" >&2; exit 2""")
    log = body.out / "logs/meta-7/node2-rank1.out"
    assert done.last == f"failed bad input: rank 1 on node2: {READ_ERROR} ({log}:3)", done.text


def test_a_real_error_of_one_rank_is_not_requeued_because_others_lost_it(body):
    done = body.run("""
        ((SLURM_PROCID)) && { echo "[rank 1] error: a column is missing" >&2; exit 1; }
        /bin/sleep 0.3; echo "error: Connection closed by peer" >&2; exit 1""")
    assert done.last.startswith("failed exit 1: rank 1 on node2: a column is missing (") and requeues(body) == []


def test_a_full_disk_is_tried_once_more(body):
    python = 'echo "error: not enough room for checkpoint x: 9 bytes needed, 2 free"; exit 1'
    assert body.run(python).last.startswith("requeued the disk is full: rank ")
    assert "nothing was gained since the last requeue" in body.run(python).last


def test_a_disk_that_is_full_at_the_start_is_waited_for(body):
    (body.out / "slurm").mkdir()
    (body.out / "slurm/events").touch()  # in the way, until somebody makes room
    process = body.start()
    time.sleep(0.5)
    (body.out / "slurm/events").unlink()
    done = body.end(process)
    assert (done.code, done.last) == (0, "done exit 0"), done.text
    assert "cannot write to" in done.text


def test_a_full_disk_on_which_no_rank_could_note_its_end(body):
    full = 'ln -sf /dev/full "$RUN/slurm/events/meta.codes"'
    done = body.run(f'{full}; echo "error: No space left on device"; exit 1')
    assert done.last.startswith("requeued the disk is full: rank "), done.text


def test_a_disk_too_full_for_the_check_of_the_nodes_accuses_none(body):
    """Room for the notes of the body, none for what the nodes write; with room the check is made again."""
    (body.fake / "full").touch()
    awk = body.fake / "awk"  # of node_report.sh
    awk.write_text(f"""#!/bin/bash
        [[ -e $FAKE/full && -n $SLURM_PROCID ]] || exec {shutil.which("awk")} "$@"
        echo "node_report.sh: line 13: echo: write error: No space left on device" >&2
        [[ $SLURM_PROCID == 1 ]] && rm "$FAKE/full" """)
    awk.chmod(0o755)
    done = body.run()
    assert (done.code, done.events) == (0, ["started on node[1-2], saved step: none", "done exit 0"]), done.text
    assert "No space left on device" in done.text


def may_be_full(body):
    """The file "full" means that the disk is: `head` is what tries how much room there is."""
    head = body.fake / "head"
    head.write_text(f"""#!/bin/bash
        [[ $1 == -c && -e $FAKE/full ]] && exit 1
        exec {shutil.which("head")} "$@" """)
    head.chmod(0o755)


def test_what_fails_on_a_full_disk_is_tried_again(body):
    """No log took the rank's words, so nothing but the disk itself tells that it is full."""
    may_be_full(body)
    done = body.run('touch "$FAKE/full"; exit 3')
    assert done.last.startswith(f"requeued no room in {body.out}: exit 3: rank "), done.text
    (body.fake / "full").unlink()
    assert body.run("exit 3").last.startswith("failed exit 3: rank ")


def test_what_a_person_has_ended_is_not_tried_again_on_a_full_disk(body):
    may_be_full(body)
    (body.fake / "env.sh").write_text('touch "$FAKE/full"; false\n')
    (body.fake / "job").write_text(COMPLETING)
    done = body.run(ENV_FILE=body.fake / "env.sh")
    assert done.last.startswith("cancelled ended by a person") and requeues(body) == [], done.text


def test_an_error_without_a_word_is_tried_once_more(body):
    """The disk may have been full for a moment."""
    assert body.run("exit 1").last.startswith("requeued a rank ended without a word: rank ")
    assert body.run("exit 1").last.startswith("failed a rank ended without a word: rank ")


def test_an_assertion_without_a_text_is_a_word(body):
    assert body.run("echo AssertionError; exit 1").last.startswith("failed exit 1: rank ")


def test_a_disk_that_stays_full_leads_back_into_the_queue(body):
    (body.out / "slurm").mkdir()
    (body.out / "slurm/events").touch()  # in the way
    process = body.start()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and requeues(body) == ["requeue 7"], text
    assert "trying for 10 s more" in text and "no room in" in text


def test_an_error_of_an_earlier_start_is_not_shown_again(body):
    folder = body.out / "logs/meta-7"
    folder.mkdir(parents=True)
    (folder / "node2-rank1.out").write_text("== rank 1 on node2\n[rank 1] error: of yesterday\n")
    done = body.run('((SLURM_PROCID)) && exit 5; /bin/sleep 0.3; echo "error: Broken pipe"; exit 1')
    assert done.last.startswith("failed exit 5: rank 1 on node2: ended with code 5 ("), done.text


def test_only_broken_connections_are_requeued(body):
    done = body.run('echo "[rank $SLURM_PROCID] error: Connection reset by peer"; exit 1')
    assert done.last.startswith("requeued lost another rank: rank "), done.text


def test_ranks_that_end_well_without_a_result_are_no_success(body):
    done = body.run("exit 0")
    assert done.last == f"failed the ranks ended well but left no {body.out}/meta/result.json"
