"""Long work of rank 0 alone, while all ranks stay in touch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from trainer.distributed.interrupt import HEARTBEAT
from trainer.distributed.ranks import Dist

T = TypeVar("T")


def on_main(dist: Dist, work: Callable[[], T]) -> T | None:
    """work() on rank 0, None on the others (collective).

    All ranks stay in touch meanwhile: an upload, or a fit on many images, may outlast the time after which a waiting
    rank takes the others for dead, or itself for hung.
    """
    outcome: Future[T] = Future()

    def body() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    if dist.main:
        threading.Thread(target=body, daemon=True, name="main rank").start()  # daemon: Ctrl-C need not wait for it
    while not dist.gather(dist.main and bool(wait([outcome], timeout=1.0).done))[0]:
        HEARTBEAT.beat()
    with dist.together():
        return outcome.result() if dist.main else None
