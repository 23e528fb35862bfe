"""Forks the ranks of a chain on the test cluster, so that a rank starts in a second instead of ten.

The same code runs as in a rank that python starts, and in the same place: with the environment, the folder, the open
files, the network and the host name of its node. Only the imports are shared. Ranks that python itself starts are in
test_submission.py; tests/slurm/warm_rank is the other end.

    python tests/slurm/warm_ranks.py SOCKET         # in the namespaces of the cluster
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.warm_python import import_everything

CLONE_NEWUTS = 0x04000000
CLONE_NEWNET = 0x40000000
NAMESPACES = {"net": CLONE_NEWNET, "uts": CLONE_NEWUTS}
SLOW_STEP = 0.1  # seconds


def serve(place: str) -> None:
    """One fork for each connection, for ever."""
    import_everything()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    server = socket.socket(socket.AF_UNIX)
    server.bind(place + ".new")
    server.listen()
    os.rename(place + ".new", place)  # from now on it can be found
    while True:
        client, _ = server.accept()
        if os.fork() == 0:
            server.close()
            _be_the_rank(client)
        client.close()


def _be_the_rank(client: socket.socket) -> None:
    """Run what the client asks for, tell it the exit code, and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = 1
    try:
        message, files = b"", []
        while not message.endswith(b"\n"):
            part, more, _, _ = socket.recv_fds(client, 1 << 20, 3)
            message += part
            files += more
        asked = json.loads(message)
        for name, kind in NAMESPACES.items():
            _enter(f"/proc/{asked['pid']}/ns/{name}", kind)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["environ"])
        threading.Thread(target=_obey, args=(client,), daemon=True).start()
        _slow_down_while(Path(os.environ["SLOW_WHILE"]))
        from trainer.run import main

        code = main(asked["arguments"]) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.sendall(bytes([code]))
        os._exit(code)


def _obey(client: socket.socket) -> None:
    """Signals that the client got are this process's; when it was killed, so is this."""
    while said := client.recv(1):
        os.kill(os.getpid(), said[0])
    os.kill(os.getpid(), signal.SIGKILL)


def _slow_down_while(place: Path) -> None:
    """Make each optimiser step last SLOW_STEP longer while there is a file `place` (Chain.slowly)."""
    from trainer.distributed.engine import Engine

    step = Engine.step

    def slow_step(engine: Engine, number: int) -> None:
        if place.exists():
            time.sleep(SLOW_STEP)
        step(engine, number)

    Engine.step = slow_step


def _enter(path: str, kind: int) -> None:
    """setns(2), which Python has from 3.12 on."""
    file = os.open(path, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(file, kind):
        raise OSError(ctypes.get_errno(), f"cannot enter {path}")
    os.close(file)


if __name__ == "__main__":
    serve(sys.argv[1])
