"""Stop in time: a warning signal becomes a checkpoint and an exit code of its own; a rank that hangs ends itself.

Slurm warns a job before its time limit and before it is preempted (SIGUSR1 through slurm/phase.sbatch, or SIGTERM).
The warning reaches the ranks at different moments, so they agree on the step after which all of them save.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Literal

from trainer.request.job import EXIT_HUNG

if TYPE_CHECKING:
    from trainer.distributed.ranks import Dist

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
ASK_EVERY = 1.0  # seconds between two questions to the other ranks
ASK_AT_MOST = 100  # steps between two questions: on a GPU the first steps are only queued and look fast
_warned = threading.Event()


class Interrupted(Exception):
    """Training was stopped by a warning signal after a checkpoint of all ranks."""


def listen() -> None:
    """Take note of warning signals from now on; call it before the slow imports. A second SIGTERM ends the process."""
    for number in SIGNALS:
        signal.signal(number, _note)


def stop_listening() -> None:
    """Ignore warnings from now on. Call it when the work is done: python's end would put the deadly default back."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Interruption:
    """Asks the other ranks about once a second whether one of them must stop; all ranks ask after the same steps.

    The answer and the distance to the next question come out of one all-reduce, so every rank has the same ones. No
    number of the training is touched and no random number drawn: the weights stay the same bit for bit.
    """

    def __init__(self, dist: Dist, done: int):
        self.dist = dist
        self.last = done  # step after which they asked last
        self.next = done + 1  # step after which they ask next
        self.asked = time.monotonic()  # when they asked last

    def agreed(self, done: int, failed: bool = False) -> Literal["", "warned", "failed"]:
        """Why all ranks stop after step `done`, "" = they go on (collective at some steps, the same on every rank).

        Args:
            failed: this rank's save in the background has failed; goes before a warning.
        """
        if done < self.next:
            return ""
        now = time.monotonic()
        warned = float(_warned.is_set())
        broken = float(failed)
        slowest = (now - self.asked) / (done - self.last)  # seconds per step
        if self.dist.world > 1:  # on a GPU this waits for the queued steps, once a second
            import torch

            answer = torch.tensor([warned, broken, slowest], dtype=torch.float64, device=self.dist.device)
            torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
            warned, broken, slowest = answer.tolist()
        self.last = done
        self.asked = now
        # as many steps as the slowest rank makes in ASK_EVERY seconds
        steps = int(ASK_EVERY / max(slowest, 1e-6))
        self.next = done + max(1, min(ASK_AT_MOST, steps))
        if broken:
            return "failed"
        if warned:
            return "warned"
        return ""


class Heartbeat:
    """Ends this process when nothing has moved for `limit` seconds: a hung collective never returns by itself."""

    def __init__(self):
        self.moved = time.monotonic()
        self.resting = threading.Event()

    def beat(self) -> None:
        """Something moved: a step or a batch of an evaluation."""
        self.moved = time.monotonic()

    def watch(self, limit: float) -> None:
        """Start watching. 0 = never."""
        if limit:
            self.beat()
            self.resting = threading.Event()
            arguments = (limit, self.resting)
            threading.Thread(target=self._watch, args=arguments, daemon=True, name="heartbeat").start()

    def rest(self) -> None:
        """Stop watching: what this process does from here on is not training."""
        self.resting.set()

    def _watch(self, limit: float, resting: threading.Event) -> None:
        while (still := time.monotonic() - self.moved) < limit:
            # should the hung thread never let go of python's lock, this one could not run: then C ends the process
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
            if resting.wait(min(limit - still, limit / 10) + 0.01):
                faulthandler.cancel_dump_traceback_later()
                return
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        print(
            f"error: nothing moved for {still:.0f} s (run.hang_seconds={limit:g}): another rank is gone or stopped, a "
            "collective hangs, or a file or a data loading process does not answer. The stacks are above; the last "
            "checkpoint is complete",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_HUNG)


HEARTBEAT = Heartbeat()


def _note(number: int, _frame: object) -> None:
    _warned.set()
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
    else:
        # it is repeated, and python puts the default back at its end: the next one would kill a rank that has saved
        signal.signal(number, signal.SIG_IGN)
