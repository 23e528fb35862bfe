"""`cancel` marks what it cancels, sees it end, and says so when it does not."""

import pytest

from trainer.chain import cancel as module
from trainer.chain import slurm, submit
from trainer.chain.cancel import cancel
from trainer.chain.slurm import Job

HEAD = "\t".join(submit.COLUMNS)


class Queue:
    """Jobs of a run by id, and what scancel does to each: how many calls it takes, and who takes its place."""

    def __init__(self, run, monkeypatch):
        self.run, self.calls, self.patience, self.successor = run, [], {}, {}
        (run / "slurm").mkdir(parents=True)
        (run / "jobs.tsv").write_text(HEAD + "\n")
        monkeypatch.setattr(slurm, "jobs", self.jobs)
        monkeypatch.setattr(slurm, "jobs_below", lambda folder: [])
        monkeypatch.setattr(slurm, "cancel", self.cancel)
        monkeypatch.setattr(module, "AGAIN", 0.0)
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    def add(self, job, patience=1):
        with (self.run / "jobs.tsv").open("a") as f:
            f.write(f"t\tmeta\t-\t{job}\t-\ts\n")
        self.patience[job] = patience

    def jobs(self, ids):
        return [Job(i, i, None, "RUNNING", "None", "node1", "0:10") for i in ids if self.patience[i] > 0]

    def cancel(self, ids):
        marks = sorted(path.name for path in (self.run / "slurm/cancelled").iterdir())
        self.calls.append((list(ids), marks))
        for job in ids:
            self.patience[job] -= 1
            if job in self.successor:
                self.add(self.successor.pop(job))


@pytest.fixture
def queue(tmp_path, monkeypatch):
    return Queue(tmp_path / "run", monkeypatch)


def test_every_job_is_marked_before_it_is_cancelled_and_the_marks_go_with_them(queue, capsys):
    queue.add("7")
    queue.add("8")
    assert cancel(queue.run) == 0
    assert queue.calls == [(["7", "8"], ["7", "8"])]
    assert "cancelled 7, 8;" in capsys.readouterr().out and not (queue.run / "slurm/cancelled").exists()
    assert cancel(queue.run) == 0
    assert "no live jobs" in capsys.readouterr().out


def test_what_took_the_place_of_a_job_meanwhile_is_cancelled_too(queue):
    queue.add("7")
    queue.successor["7"] = "9"
    assert cancel(queue.run) == 0
    assert queue.calls == [(["7"], ["7"]), (["9"], ["7", "9"])]


def test_a_job_that_comes_back_is_cancelled_again(queue):
    queue.add("7", patience=3)
    assert cancel(queue.run) == 0
    assert len(queue.calls) == 3


def test_what_is_still_alive_is_named_and_no_success(queue, capsys):
    queue.add("7", patience=10**9)
    assert cancel(queue.run, wait=0.2) == 1
    assert "still alive 0 s after scancel: 7 RUNNING" in capsys.readouterr().out
    assert (queue.run / "slurm/cancelled/7").exists()  # its body must not start it again later
