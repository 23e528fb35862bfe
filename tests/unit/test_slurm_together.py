"""A chain is submitted whole or not at all: refusals, signals, dead terminals, a kill, with a stand-in of Slurm."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.slurm_stand_in import stand_in  # noqa: F401
from tests.unit.test_slurm_chain import ROOT, settings_for
from trainer.chain import slurm, submit, together
from trainer.writer_lock import WriterLock

CHAIN = {"101": "Priority", "102": "Dependency", "103": "Dependency", "104": "Dependency", "105": "Dependency"}


def as_a_terminal_does():
    """Signals end a new process, also where the tests themselves run by nohup or behind an `&`."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def as_nohup_does():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def driver(stand_in, out, *words, prepare=as_a_terminal_does, **options):  # noqa: F811
    """The driver's process, as the terminal starts it: a process group of its own."""
    flags = {"--recipe": ROOT / "tests/fixtures/slurm_tiny.yaml", "--ds-config": ROOT / "ds_configs/cpu_debug.json"}
    flags |= {"--out": out, "--gpus-per-node": "1", "--nodes": "2"}
    command = [sys.executable, "-m", "trainer.chain", *words]
    for flag, value in flags.items():
        command += [flag, str(value)]
    environ = os.environ | stand_in.environ | {"PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, env=environ, text=True, start_new_session=True, preexec_fn=prepare, **options)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_first_jobs_are_held_until_the_chain_is_whole(tmp_path, stand_in):  # noqa: F811
    assert submit.submit(settings_for(tmp_path)) == 0
    assert stand_in.queue() == CHAIN
    submitted = [call for call in stand_in.calls("sbatch") if "--test-only" not in call]
    assert ["--hold" in call for call in submitted] == [True, False, False, False, False]
    assert not (tmp_path / "run/slurm/1" / together.MARK).exists()


def test_jobs_that_the_user_holds_stay_held(tmp_path, stand_in):  # noqa: F811
    submit.submit(settings_for(tmp_path, sbatch_args="--hold"))
    assert stand_in.queue()["101"] == "JobHeldUser"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_sbatch_and_the_record_leaves_nothing(tmp_path, stand_in, number):  # noqa: F811
    stand_in.says("slow", "1")
    process = driver(stand_in, tmp_path / "run")
    wait_for(lambda: "102" in stand_in.queue())
    os.killpg(process.pid, number)  # as the terminal sends it: to the whole group
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, out + err
    assert err == f"error: stopped by {number.name}; nothing of this submission is left\n"
    assert stand_in.queue() == {}
    assert {"101", "102"} == {row.job for row in submit.rows(tmp_path / "run")}


def test_an_ignored_hangup_changes_nothing(tmp_path, stand_in):  # noqa: F811
    stand_in.says("slow", "0.3")
    process = driver(stand_in, tmp_path / "run", prepare=as_nohup_does)
    wait_for(lambda: "102" in stand_in.queue())
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 0 and stand_in.queue() == CHAIN


def test_a_reader_that_goes_away_changes_nothing(tmp_path, stand_in):  # noqa: F811
    reader, writer = os.pipe()
    process = driver(stand_in, tmp_path / "run", stdout=writer)
    os.close(writer)
    os.close(reader)  # | head -0
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert stand_in.queue() == CHAIN


def test_a_closed_terminal_does_not_stop_the_clean_up(tmp_path, stand_in):  # noqa: F811
    stand_in.says("slow", "0.5")
    terminal, for_driver = os.openpty()
    process = driver(stand_in, tmp_path / "run", stdout=for_driver, stderr=for_driver)
    os.close(for_driver)
    wait_for(lambda: "102" in stand_in.queue())
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 128 + signal.SIGHUP
    assert stand_in.queue() == {}


def test_a_job_whose_id_sbatch_never_told_is_taken_back(tmp_path, stand_in):  # noqa: F811
    stand_in.says("lost", "103")
    with pytest.raises(slurm.SlurmError, match="Socket timed out"):
        submit.submit(settings_for(tmp_path))
    assert stand_in.queue() == {}


def test_what_a_killed_driver_left_never_runs_and_is_taken_back(tmp_path, stand_in):  # noqa: F811
    stand_in.says("slow", "1")
    process = driver(stand_in, tmp_path / "run")
    wait_for(lambda: "102" in stand_in.queue())
    process.kill()
    process.communicate(timeout=30)
    assert stand_in.queue() == {"101": "JobHeldUser", "102": "Dependency"}
    assert {job.id for job in submit.live_jobs(tmp_path / "run")} == {"101", "102"}  # 102 is recorded nowhere
    (stand_in.folder / "slow").unlink()
    again = driver(stand_in, tmp_path / "run")
    out, err = again.communicate(timeout=30)
    assert again.returncode == 0, err
    assert "submission 1 was killed half-way: taking back its jobs 101, 102" in out
    assert set(stand_in.queue()) == {"103", "104", "105", "106", "107"}


def test_a_chain_killed_after_its_release_is_live(tmp_path, stand_in):  # noqa: F811
    submit.submit(settings_for(tmp_path))
    mark = tmp_path / "run/slurm/1" / together.MARK
    mark.touch()
    with pytest.raises(ValueError, match="still live"):
        submit.submit(settings_for(tmp_path))
    assert stand_in.queue() == CHAIN and not mark.exists()


def test_a_release_that_fails_takes_all_back(tmp_path, stand_in):  # noqa: F811
    program = Path(stand_in.folder / "scontrol")
    program.write_text(program.read_text().replace("release-*)", 'release-*) echo "no permission" >&2; exit 1;'))
    with pytest.raises(slurm.SlurmError, match="scontrol failed: no permission"):
        submit.submit(settings_for(tmp_path))
    assert stand_in.queue() == {}


def test_the_first_stages_wait_for_jobs_of_others(tmp_path, stand_in):  # noqa: F811
    stand_in.says("job-12", "RUNNING")
    stand_in.says("job-13", "COMPLETED")
    assert submit.submit(settings_for(tmp_path, after="12:13")) == 0
    first, second, *_ = [call for call in stand_in.calls("sbatch") if "--test-only" not in call]
    assert "--dependency=afterok:12:13 --kill-on-invalid-dep=yes --hold" in first
    assert "afterok:101 " in second and [row.depends for row in submit.rows(tmp_path / "run")][:2] == ["12:13", "101"]


@pytest.mark.parametrize("state, words", [(None, "which Slurm does not know"), ("FAILED", "which has ended FAILED")])
def test_a_job_that_cannot_be_waited_for_is_refused(tmp_path, stand_in, state, words):  # noqa: F811
    if state:
        stand_in.says("job-12", state)
    with pytest.raises(ValueError, match=f"after names job 12, {words}"):
        submit.submit(settings_for(tmp_path, after="12"))
    assert stand_in.queue() == {}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_flock_has_one_submission_at_a_time_too(tmp_path, stand_in, monkeypatch, number):  # noqa: F811
    def refused(file, operation):
        raise OSError(number, "no flock here")

    monkeypatch.setattr(fcntl, "flock", refused)
    (tmp_path / "run/slurm").mkdir(parents=True)
    other = WriterLock(tmp_path / "run/slurm")
    with pytest.raises(ValueError, match=r"another submission of .* is under way.* pid"):
        submit.submit(settings_for(tmp_path))
    other.release()
    assert submit.submit(settings_for(tmp_path)) == 0 and stand_in.queue() == CHAIN


def test_another_error_of_the_lock_is_told(tmp_path, stand_in, monkeypatch):  # noqa: F811
    def refused(file, operation):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(OSError, match="broken disk"):
        submit.submit(settings_for(tmp_path))
