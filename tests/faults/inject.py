"""Does one given harm to a rank while it runs the trainer for real: kills, hangs, disks that fail, bad batches.

Runs inside a forked rank (tests/warm_python.py). Nothing in the product knows of it: the functions a rank goes through
anyway are wrapped for this one process, and the harm is done at the n-th call of one of them.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

# where a fault can strike: moment -> what is wrapped, as module:function or module:class.method
MOMENTS = {
    "step": "trainer.distributed.engine:Engine.step",
    "backward": "trainer.distributed.engine:Engine.backward",
    "save": "trainer.checkpoint.saver:Saver.save",
    "replace": "os:replace",  # every commit of a file: manifest, latest, weights, result, config
    "fsync": "os:fsync",
    "phase": "trainer.context:Run.open",
    "evaluate": "trainer.loop.fit:_Loop._evaluate",
}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}


def main(arguments: list[str], fault: dict[str, Any]) -> int:
    """trainer.run.main(arguments) on this rank, with the fault if it is meant for this rank.

    Args:
        fault: kind; rank; at = a moment of MOMENTS; call = its number, from 1; when = "before" or "after" it;
            delay = seconds to wait after that, which reaches what runs in the background.
    """
    from trainer import run

    if fault["rank"] == int(os.environ["RANK"]):
        _install(fault)
    return run.main(arguments)


def _install(fault: dict[str, Any]) -> None:
    kind = fault["kind"]
    if kind in SIGNALS:
        _at(fault, lambda: os.kill(os.getpid(), SIGNALS[kind]))
    elif kind == "slow disk":
        _at(fault, lambda: time.sleep(0.3), every=True)
    elif kind == "nan":
        _spoil_batch(fault["call"])
    elif kind == "read error":
        _fail_reading(fault["call"])
    elif kind == "dead worker":
        _kill_worker(fault["call"])
    else:
        raise ValueError(f"no fault {kind!r}")


def _at(fault: dict[str, Any], harm: Callable[[], None], every: bool = False) -> None:
    """Do harm around the given call of the fault's moment."""
    calls = 0

    def struck() -> None:
        if fault.get("delay"):
            threading.Timer(fault["delay"], harm).start()
        else:
            harm()

    def wrap(original: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            now = calls == fault["call"] or (every and calls > fault["call"])
            if now and fault["when"] == "before":
                struck()
            result = original(*args, **kwargs)
            if now and fault["when"] == "after":
                struck()
            return result

        return wrapped

    _replace(MOMENTS[fault["at"]], wrap)


def _spoil_batch(number: int) -> None:
    """Not-a-numbers in the pixels of one training micro-batch."""
    calls = 0

    def wrap(original: Callable) -> Callable:
        def wrapped(self: Any, forward: Any, images: Any, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                images = images * float("nan")
            return original(self, forward, images, *args)

        return wrapped

    for name in ("Classify", "MatchTeacher", "Distill"):
        _replace(f"trainer.objectives:{name}.__call__", wrap)


def _fail_reading(number: int) -> None:
    """The n-th image cannot be read: what a disk or a network file system answers when it fails."""
    calls = 0

    def wrap(original: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(5, "Input/output error")
            return original(*args, **kwargs)

        return wrapped

    _replace("trainer.data.base:ImageSource.image", wrap)


def _kill_worker(number: int) -> None:
    """kill -9 of a data loading process before the n-th optimiser step, as an out-of-memory killer does it."""
    import multiprocessing

    def harm() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    _at({"at": "step", "call": number, "when": "before"}, harm)


def _replace(place: str, wrap: Callable[[Callable], Callable]) -> None:
    import importlib

    module, path = place.split(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, wrap(getattr(owner, name)))
