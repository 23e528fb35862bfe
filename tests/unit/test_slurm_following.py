"""Following a chain: status, logs, wait, the hook and GPU-hours, with a squeue that says what the test wants."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.unit.test_slurm_chain import ROOT, fake, finish, settings_for  # noqa: F401  a fixture
from trainer.chain import __main__ as driver
from trainer.chain import submit
from trainer.chain.following import events, logs, options, snapshot, spent, status, wait
from trainer.chain.following.events import Event
from trainer.chain.following.options import View
from trainer.chain.following.progress import Progress
from trainer.chain.following.reasons import never

NOTHING = "#!/bin/bash\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n"


@pytest.fixture
def submitted(tmp_path, fake, capsys):  # noqa: F811
    """A chain whose teacher (job 101) is done; meta is 102, distill 103, train 104, evaluate 105."""
    settings = settings_for(tmp_path)
    submit.submit(settings)
    finish(settings, "teacher")
    (settings.run / "slurm/events").mkdir()
    capsys.readouterr()
    return settings


def queue(fake, *jobs):  # noqa: F811
    """What squeue tells: (id, state, reason), ids as it writes them."""
    lines = []
    for name, state, reason in jobs:
        array, _, element = name.partition("_")
        lines.append(f"{name}|{array}|{element or 'N/A'}|{state}|{reason}|node1|0:42\n")
    (fake / "queue").write_text("".join(lines))


def note(settings, result, *rows):
    """What the job body notes: (seconds since 1970, job, kind, text)."""
    with (settings.run / f"slurm/events/{result}.tsv").open("a") as file:
        for seconds, job, kind, text in rows:
            clock = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
            file.write(f"{clock}\t{job}\t0\t{kind}\t{text}\n")


def log(settings, name, text, node="node1", rank=0, at=None):
    """The log of a rank, NAME as in meta-102 or distill-103_1."""
    path = settings.run / f"logs/{name}/{node}-rank{rank}.out"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if at:
        os.utime(path, (at, at))
    return path


@pytest.mark.parametrize(
    "reason",
    [
        "PartitionDown",
        "PartitionTimeLimit",
        "PartitionNodeLimit",
        "DependencyNeverSatisfied",
        "BadConstraints",
        "ReqNodeNotAvail, UnavailableNodes:node2",
        "QOSMaxWallDurationPerJobLimit",
        "AssocGrpCPUMinutesLimit",
        "InvalidQOS",
        "JobHeldUser",
        "launch failed requeued held",
        # as slurmctld 22.05 writes them
        "Job's account not known, so it can't use this partition (theirs allows them)",
        "Job's_account_not_permitted_to_use_this_partition_(theirs_allows_them)",
    ],
)
def test_reasons_that_no_waiting_mends(reason):
    assert reason.replace("_", " ") in str(never(reason))


@pytest.mark.parametrize(
    "reason",
    [
        "Resources",
        "Priority",
        "Dependency",
        "BeginTime",
        "None",
        "JobArrayTaskLimit",
        "QOSGrpNodeLimit",
        "AssocGrpGRES",
        "QOSMaxJobsPerUserLimit",
        "ReqNodeNotAvail, Reserved for maintenance",
        "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
    ],
)
def test_reasons_that_pass(reason):
    assert never(reason) is None


def test_status_marks_what_will_never_start_and_its_exit_code_says_so(submitted, fake, capsys):  # noqa: F811
    queue(fake, ("102", "PENDING", "PartitionDown"), ("103_1", "PENDING", "Dependency"))
    assert status.show(submitted) == 4
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "NEVER" in lines["meta"] and "will never start: PartitionDown; sinfo -s" in lines["meta"]
    assert "waits: Dependency" in lines["distill_1"]


def test_no_answer_is_told_from_unknown_to_slurm(submitted, fake, capsys):  # noqa: F811
    note(submitted, "meta", (100, "102", "started", "on node1"))
    assert status.show(submitted) == 1  # squeue answers, and knows none of them
    assert "Slurm does not know this job any more; on node1" in capsys.readouterr().out
    (fake / "squeue").write_text(NOTHING)
    assert status.show(submitted) == 3
    shown = capsys.readouterr().out
    assert "Slurm gives no answer; on node1" in shown and "any more" not in shown
    finish(submitted, "meta", "distill_0", "distill_1", "distill_2", "train", "evaluate")
    assert status.show(submitted) == 0  # the disk is enough


def test_json_has_the_documented_keys(submitted, fake, capsys):  # noqa: F811
    queue(fake, ("102", "RUNNING", "None"), ("103_0", "PENDING", "BadConstraints"))
    log(submitted, "meta-102", "[meta] epoch 2/8 step 3/20 loss 2.1 eta 1 day, 0:00:31\n")
    assert status.show(submitted, View(json=True)) == 4
    told = json.loads(capsys.readouterr().out)
    page = (ROOT / "docs/slurm.md").read_text()
    meta = told["results"][1]
    assert set(meta["progress"]) == {"epoch", "epochs", "step", "steps", "eta"}
    for key in {*told, *meta, *meta["progress"], *told["gpu_hours"]}:
        assert f"`{key}`" in page, f"docs/slurm.md does not list {key}"
    assert (told["state"], told["settled"], told["exit_code"], told["slurm_answers"]) == (
        "will never start",
        False,
        4,
        True,
    )
    assert (meta["result"], meta["state"], meta["job"]) == ("meta", "running", "102")
    assert told["results"][2]["will_never_start"] and told["results"][2]["reason"] == "BadConstraints"


def test_an_eta_of_days_is_seconds():
    assert Progress(eta="0:00:31").eta_seconds == 31
    assert Progress(eta="2 days, 1:00:01").eta_seconds == 49 * 3600 + 1
    assert Progress(eta="?").eta_seconds is None


def test_watch_ends_with_the_chain(submitted, fake, capsys, monkeypatch):  # noqa: F811
    queue(fake, ("102", "RUNNING", "None"))
    failed = ("102", "FAILED", "NonZeroExitCode")
    monkeypatch.setattr(status, "sleep", lambda seconds: queue(fake, failed))
    assert status.show(submitted, View(watch=True)) == 1
    _, first, last = capsys.readouterr().out.split(str(submitted.run))
    assert "RUNNING" in first and "FAILED" in last


# ---- GPU-hours


def events_of(*rows):
    return [Event(float(seconds), job, "0", kind, "") for seconds, job, kind in rows]


def test_nodes_are_held_from_start_to_end_whatever_ends_them():
    notes = events_of(
        (0, "7", "started"), (100, "7", "warned"), (110, "7", "requeued"),
        (300, "7", "started"), (340, "7", "done"),
    )  # fmt: skip
    assert spent.held(notes, [], None) == [("7", 110), ("7", 40)]
    # lost with its node: up to the last step that was logged before the next start
    lost = events_of((0, "7", "started"), (500, "7", "started"), (540, "7", "done"))
    assert spent.held(lost, [50, 90, 510], None) == [("7", 90), ("7", 40)]
    running = events_of((0, "7_1", "started"))
    assert spent.held(running, [5], 60) == [("7", 60)]
    assert spent.held(running, [5], None) == [("7", 5)]  # cancelled before its first word


def test_hours_count_the_ranks_of_each_submission(submitted, fake, capsys):  # noqa: F811
    # 2 ranks of one node for half an hour, then, submitted again, 8 of four nodes for an hour
    note(submitted, "meta", (0, "102", "started", "on"), (1800, "102", "failed", "why"))
    again = settings_for(submitted.run.parent, nodes="4", time="06:00:00")
    submit.submit(again)
    note(submitted, "meta", (4000, "106", "started", "on"), (7600, "106", "done", "exit 0"))
    finish(submitted, "meta")
    meta = snapshot.read(submitted.run).elements[1]
    assert meta.spent == spent.Spent(hours=9.0, starts=2, ranks=8, limit=48.0)
    capsys.readouterr()
    status.show(submitted)
    assert "9 GPU-hours spent (nodes held" in capsys.readouterr().out


def test_what_is_expected_comes_from_the_eta_and_from_finished_siblings(submitted, fake):  # noqa: F811
    now = time.time()
    note(submitted, "distill_0", (now - 7200, "103_0", "started", "on"), (now - 3600, "103_0", "done", "exit 0"))
    finish(submitted, "meta", "distill_0")
    note(submitted, "distill_1", (now - 1800, "103_1", "started", "on"))
    log(submitted, "distill-103_1", "[distill 2/3] epoch 2/8 step 3/20 loss 2.1 eta 0:15:00\n")
    queue(fake, ("103_1", "RUNNING", "None"), ("103_2", "PENDING", "Resources"))
    elements = snapshot.read(submitted.run).elements
    by_name = {each.result: status.expected_hours(each, elements) for each in elements}
    assert by_name["distill_0"] == pytest.approx(2.0)  # 2 ranks, an hour
    assert by_name["distill_1"] == pytest.approx(1.5, abs=0.01)  # half an hour so far, a quarter to come
    assert by_name["distill_2"] == pytest.approx(2.0)  # as its sibling
    assert by_name["train"] is None


# ---- logs


def test_logs_choose_what_tells_most(submitted, fake, capsys):  # noqa: F811
    queue(fake, ("102", "RUNNING", "None"), ("103_0", "FAILED", "None"), ("103_1", "RUNNING", "None"))
    body = submitted.run / "logs/meta-102.out"
    body.write_text("[12:00:00 meta] started\n")
    (submitted.run / "logs/meta-102").mkdir()
    run = ["logs", "--recipe", submitted.recipe, "--ds-config", submitted.ds_config, "--out", submitted.out]

    def told(*words):
        capsys.readouterr()
        code = driver_main(*run, *words)
        return code, capsys.readouterr()

    assert told("meta") == (0, (f"==> {body} <==\n[12:00:00 meta] started\n", ""))  # no rank yet: the node check
    rank = log(submitted, "meta-102", "first\nsecond\nthird\n")
    assert told("meta", "--lines", "2")[1].out == f"==> {rank} <==\nsecond\nthird\n"
    assert "started" in told("meta", "--job-log")[1].out
    other = log(submitted, "meta-102", "of rank 1\n", node="node2", rank=1)
    assert told("meta", "--rank", "1")[1].out == f"==> {other} <==\nof rank 1\n"
    # of an array the element that runs; by its own name any
    log(submitted, "distill-103_0", "zero\n")
    log(submitted, "distill-103_1", "one\n")
    (submitted.run / "logs/distill-103_0.out").write_text("failed: out of luck\n")
    assert "one" in told("distill")[1].out
    code, shown = told("distill_0")
    assert code == 1 and "out of luck" in shown.out  # it has ended: the body tells why
    code, shown = told("train")
    assert code == 2 and "train has no such log" in shown.err
    code, shown = told("nothing")
    assert code == 2 and "expected a stage or a result of this chain: teacher, meta, distill_0" in shown.err


def driver_main(*words):
    """The command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.sys, "argv", ["m2mkd_vmoe.sh", *words])
        return driver.main()


def test_following_goes_over_to_the_log_of_a_restart_and_ends_with_the_stage(submitted, fake, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(logs, "LOOK", 0.02)
    queue(fake, ("102", "RUNNING", "None"))
    first = log(submitted, "meta-102", "".join(f"line {i}\n" for i in range(100)), at=time.time() - 50)
    settings = settings_for(submitted.run.parent, overrides=("meta",))
    codes = []
    view = View(follow=True, lines=2, every=0.1)
    follower = threading.Thread(target=lambda: codes.append(logs.show(settings, view)))
    follower.start()
    shown = []

    def until(text):
        end = time.monotonic() + 20
        while text not in "".join(shown):
            assert time.monotonic() < end, f"no {text!r} in {shown}"
            shown.append(capsys.readouterr().out)
            time.sleep(0.02)

    until("line 99")
    with first.open("a") as file:
        file.write("added\n")
    until("added")
    second = log(submitted, "meta-102", "resumed after step 5\n", node="node2", at=time.time() + 5)
    until(f"==> {second} <==\nresumed after step 5")
    finish(submitted, "meta")
    queue(fake, ("102", "COMPLETED", "None"))
    follower.join(20)
    shown.append(capsys.readouterr().out)
    assert codes == [0]
    assert "".join(shown).count("line ") == 2 and "".join(shown).count("added") == 1


# ---- wait


def test_wait_ends_with_the_reasons_of_what_is_not_done(submitted, fake, capsys):  # noqa: F811
    note(submitted, "meta", (100, "102", "failed", "bad input: no such column"))
    queue(fake, ("102", "FAILED", "None"), *((f"103_{i}", "CANCELLED", "None") for i in range(3)),
          ("104", "CANCELLED", "None"), ("105", "CANCELLED", "None"))  # fmt: skip
    assert wait.show(submitted, View(every=0.01)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6] == "meta: ended without result (bad input: no such column)"


def test_wait_ends_well_when_everything_is_done(submitted, fake, capsys):  # noqa: F811
    finish(submitted, "meta", "distill_0", "distill_1", "distill_2", "train", "evaluate")
    assert wait.show(submitted, View(every=0.01)) == 0
    assert capsys.readouterr().out.count(": done") == 7


def test_wait_does_not_wait_for_what_will_never_start(submitted, fake, capsys, monkeypatch):  # noqa: F811
    clock = [0.0]
    monkeypatch.setattr(wait, "monotonic", lambda: clock[0])

    def sleep(seconds):
        clock[0] += seconds
        assert clock[0] < 200, "still waiting"

    monkeypatch.setattr(wait, "sleep", sleep)
    waiting = [("104", "PENDING", "Dependency"), ("105", "PENDING", "Dependency")]
    waiting += [(f"103_{i}", "PENDING", "Dependency") for i in range(3)]
    queue(fake, ("102", "PENDING", "PartitionTimeLimit"), *waiting)
    assert wait.show(submitted, View(every=10.0)) == 4
    assert 60 <= clock[0] <= 80  # a minute's patience: a partition's limit is seldom raised
    assert "meta: will never start (will never start: PartitionTimeLimit" in capsys.readouterr().out


def test_wait_outlasts_a_controller_that_is_away_and_a_result_that_is_seen_late(submitted, fake, monkeypatch):  # noqa: F811
    finish(submitted, "meta", "distill_0", "distill_1", "distill_2", "train")
    squeue = (fake / "squeue").read_text()
    steps = iter(("away", "ended", "seen"))

    def sleep(seconds):
        step = next(steps)
        if step == "away":
            (fake / "squeue").write_text(NOTHING)
        elif step == "ended":
            (fake / "squeue").write_text(squeue)
            queue(fake, ("105", "COMPLETED", "None"))
        else:
            finish(submitted, "evaluate")

    monkeypatch.setattr(wait, "sleep", sleep)
    queue(fake, ("105", "RUNNING", "None"))
    assert wait.show(submitted, View(every=10.0)) == 0


# ---- options and hook


def test_flags_of_following_are_taken_out_of_the_settings():
    view, rest = options.take(["logs", "distill_1", "-f", "--out", "x", "--every", "2", "a.b=1"])
    assert (view.follow, view.every, rest) == (True, 2.0, ["logs", "distill_1", "--out", "x", "a.b=1"])
    with pytest.raises(ValueError, match="every is 0"):
        options.take(["--every", "0"])


def body_event(run, hook, *words):
    script = f"source {ROOT}/slurm/common.sh; source {ROOT}/slurm/body.sh; event {' '.join(words)}"
    (run / "slurm/events").mkdir(parents=True, exist_ok=True)
    environ = os.environ | {"RUN": str(run), "artifact": "meta", "me": "12", "HOOK": hook}
    return subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=60)


def test_the_hook_gets_result_event_and_text_and_its_failure_changes_nothing(tmp_path):
    hook = f'printf "%s|" "$1" "$2" "$3" "$RUN" >{tmp_path}/told'
    assert body_event(tmp_path, hook, "failed", "bad", "input").returncode == 0
    assert (tmp_path / "told").read_text() == f"meta|failed|bad input|{tmp_path}|"
    (tmp_path / "told").unlink()
    body_event(tmp_path, hook, "started", "on node1")  # not one of the three
    assert not (tmp_path / "told").exists()
    done = body_event(tmp_path, "exit 5", "done", "exit 0")
    assert done.returncode == 0 and "hook: exit code 5" in done.stdout
    assert [event.kind for event in events.read(tmp_path, "meta")] == ["failed", "started", "done"]


def test_the_hook_is_a_setting_of_the_job_script(tmp_path, fake):  # noqa: F811
    hook = """curl -d "$1 it's $2: $3" https://ntfy.example/topic"""
    settings = settings_for(tmp_path, hook=hook)
    submit.submit(settings)
    script = settings.run / "slurm/1/meta.sbatch"
    variables = script.read_text().partition("signalled=")[0]
    shown = subprocess.run(
        ["bash", "-c", f'{variables}\nprintf %s "$HOOK"'], capture_output=True, text=True, check=True
    )
    assert shown.stdout == hook


def test_paths_of_a_run_are_the_submission_s(submitted):
    assert spent.submitted_settings(Path(submitted.run / "slurm/1")) == submitted
    assert spent.submitted_settings(Path(submitted.run / "slurm/9")) is None
