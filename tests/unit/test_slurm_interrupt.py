"""Warning signals become one agreed step; a process in which nothing moves ends itself."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.distributed import interrupt
from trainer.request.job import EXIT_HUNG

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now.seconds)
    monkeypatch.setattr(interrupt, "_warned", interrupt.threading.Event())
    return now


def alone():
    return SimpleNamespace(world=1, device=torch.device("cpu"))


def test_asks_about_once_a_second(clock):
    asked, interruption = [], interrupt.Interruption(alone(), 10)
    for done in range(11, 60):
        clock.seconds += 0.125
        if done == interruption.next:
            asked.append(done)
        assert not interruption.agreed(done)
    assert asked == [11, 19, 27, 35, 43, 51, 59]  # 0.125 s a step: 8 steps a second


def test_slow_steps_are_all_asked_and_fast_ones_never_further_apart_than_100(clock):
    interruption = interrupt.Interruption(alone(), 0)
    clock.seconds += 7.0
    interruption.agreed(1)
    assert interruption.next == 2
    clock.seconds += 1e-5
    interruption.agreed(2)
    assert interruption.next == 102


def test_one_warned_rank_stops_all_after_the_same_step(clock, monkeypatch):
    """Two ranks of different speed in turn: the all-reduce is played by the maximum over both."""
    ranks = [interrupt.Interruption(SimpleNamespace(world=2, device=torch.device("cpu")), 0) for _ in range(2)]
    stopped = []
    for done in range(1, 40):
        # of the other rank: warned during step 9, no failed save, 4 steps a second
        votes = torch.tensor([float(done >= 9), 0.0, 0.25])

        def all_reduce(answer, op, votes=votes):
            answer.copy_(torch.maximum(answer, votes.to(answer)))

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        clock.seconds += 0.1
        assert ranks[0].next == ranks[1].next
        agreed = [rank.agreed(done) for rank in ranks]
        assert agreed[0] == agreed[1]
        if agreed[0]:
            stopped.append(done)
            break
    assert stopped == [9]  # asked after steps 1, 5, 9


def test_a_failed_save_of_one_rank_goes_before_a_warning(clock, monkeypatch):
    def all_reduce(answer, op):
        answer.copy_(torch.maximum(answer, torch.tensor([1.0, 0.0, 0.25]).to(answer)))  # the other rank is warned

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    ranks = SimpleNamespace(world=2, device=torch.device("cpu"))
    for failed, why in ((True, "failed"), (False, "warned")):
        interruption = interrupt.Interruption(ranks, 0)
        clock.seconds += 1
        assert interruption.agreed(1, failed) == why
    assert interrupt.Interruption(alone(), 0).agreed(1, failed=True) == "failed"


def test_signal_is_noted_and_a_second_sigterm_ends_the_process():
    code = (
        "import os, signal\nfrom trainer.distributed import interrupt\ninterrupt.listen()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\nos.kill(os.getpid(), signal.SIGUSR1)\n"
        "assert interrupt._warned.is_set()\nos.kill(os.getpid(), signal.SIGTERM)\nprint('alive', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "alive\n")


def test_a_warning_while_python_ends_does_not_kill_it():
    code = (
        "import os, signal, sys\nfrom trainer.distributed import interrupt\ninterrupt.listen()\n"
        "class Late:\n    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.SIGUSR1):\n"
        "        kill(me, number)\n"
        "sys.modules['late'] = Late()\n{}"  # deleted when python has put the default handlers back
    )
    ends = []
    for last in ("", "interrupt.stop_listening()\n"):
        done = subprocess.run([sys.executable, "-c", code.format(last)], cwd=ROOT, capture_output=True, text=True)
        ends.append(done.returncode)
    assert ends == [-signal.SIGUSR1, 0]


def test_a_second_warning_while_an_interrupted_rank_ends_keeps_its_code():
    """Slurm's body asks again every five seconds, and the end of python and NCCL may take longer."""
    code = (
        "import os, signal, sys\nfrom types import SimpleNamespace\nfrom trainer import api, run\n"
        "from trainer.distributed import interrupt\n"
        "class Late:\n    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.SIGUSR1):\n"
        "        kill(me, number)\n"
        "sys.modules['late'] = Late()\n"
        "def execute(job, begun):\n    raise interrupt.Interrupted('saved')\n"
        "api.execute = execute\nsys.exit(run._train(0, SimpleNamespace(phase='meta'), 0.0))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr


def test_process_without_a_heartbeat_ends_with_its_own_code_and_says_where():
    code = (
        "import time\nfrom trainer.distributed.interrupt import HEARTBEAT\nHEARTBEAT.watch(0.6)\n"
        "for _ in range(10):\n    time.sleep(0.1)\n    HEARTBEAT.beat()\n"
        "print('a second of beats', flush=True)\n"
        "def stuck_in_a_collective():\n    time.sleep(30)\nstuck_in_a_collective()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (EXIT_HUNG, "a second of beats\n")
    assert "run.hang_seconds=0.6" in done.stderr and "stuck_in_a_collective" in done.stderr


def test_process_that_never_lets_go_of_pythons_lock_ends_too():
    code = (
        "import ctypes\nfrom trainer.distributed.interrupt import HEARTBEAT\nHEARTBEAT.watch(0.6)\n"
        "def stuck_with_the_lock():\n    ctypes.PyDLL(None).sleep(15)\nstuck_with_the_lock()\nprint('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, "") and "stuck_with_the_lock" in done.stderr
