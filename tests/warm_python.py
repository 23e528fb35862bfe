"""A python that has imported everything once and forks for each piece of work: a launch in 0.1 s instead of 10.

The same code runs as in a launch: the fork sets RANK, WORLD_SIZE, ... as torchrun does and calls trainer.run.main, or a
function of a test module. Only the imports are shared. The launchers themselves are tested in test_launchers.py.

    warm = WarmPython(); code, output = warm.run([*TINY, "--phase", "meta", "--out", out], ranks=2)
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tests.launch import ROOT, Finished, environment, free_port

END = "\n"  # said to the server in the place of a piece of work
GRACE = 20  # seconds the other ranks get to end by themselves once one has failed


class WarmPython:
    """The client: one server process for a whole test session."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment(), start_new_session=True,
        )  # fmt: skip

    def run(self, arguments: list[Any], ranks: int = 1, **options: Any) -> Finished:
        """trainer.run.main(arguments) on that many ranks. Options: see _Work."""
        return self.call("trainer.run:main", list(map(str, arguments)), ranks=ranks, **options)

    def call(self, function: str, *arguments: Any, ranks: int = 1, kill_when: Callable[[], bool] | None = None,
             timeout: float = 120, **options: Any) -> Finished:  # fmt: skip
        """module:function(*arguments) in fresh forks; the code is its return value (None = 0), 1 when it raised.

        Args:
            kill_when: kill -9 all ranks as soon as it holds.
            options: file_limit (bytes a file may grow to), free_bytes (what shutil.disk_usage answers),
                grace (seconds the other ranks get once one has failed).
        """
        self.count += 1
        logs = [str(self.folder / f"call{self.count}_rank{rank}.log") for rank in range(ranks)]
        work = {"function": function, "arguments": arguments, "port": free_port(), "logs": logs, **options}
        self.server.stdin.write(json.dumps(work) + "\n")
        self.server.stdin.flush()
        pids = json.loads(self.server.stdout.readline())
        deadline, done = time.monotonic() + timeout, Path(logs[0] + ".done")
        killed = late = False
        while not done.exists():
            late = time.monotonic() > deadline
            if late or (kill_when and kill_when()):
                killed = True
                for number in (signal.SIGSTOP, signal.SIGKILL):
                    _signal(pids, number)
                break
            time.sleep(0.001 if kill_when else 0.01)
        codes = json.loads(self.server.stdout.readline())
        output = "".join(Path(log).read_text(errors="replace") for log in logs)
        assert not late, f"not finished after {timeout} s:\n{output}"
        assert not kill_when or killed, f"ended before it could be killed:\n{output}"
        return Finished(next((code for code in codes if code), 0), output)

    def close(self) -> None:
        """End the server; said in so many words, as a process that a test left behind may hold its input open."""
        self.server.stdin.write(END)
        self.server.stdin.close()
        self.server.wait(30)


def import_everything() -> None:
    """What a rank imports until it trains."""
    import models  # noqa: F401  first: it mends torchvision beside a CPU torch

    for name in ("datasets", "transformers.models.vit.modeling_vit", "trainer.run", "trainer.report.drawing",
                 "deepspeed.runtime.zero.muon.muon_optimizer"):  # fmt: skip
        importlib.import_module(name)  # the last one is what every deepspeed.initialize imports, 1.5 s of it inductor
    importlib.import_module("deepspeed").ops.__compatible_ops__  # noqa: B018  probed on first use
    for phase in ("teacher", "meta", "distill", "train", "evaluate"):
        importlib.import_module(f"trainer.phases.{phase}")


def serve() -> None:
    """Read one line of JSON per piece of work until END, fork its ranks, answer with their ids and then their codes."""
    import_everything()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, END):
        if not line:  # the client died
            return
        work = json.loads(line)
        pids = [_fork(work, rank) for rank in range(len(work["logs"]))]
        print(json.dumps(pids), file=answers, flush=True)
        codes = _wait(pids, work.get("grace", GRACE))
        Path(work["logs"][0] + ".done").touch()
        print(json.dumps(codes), file=answers, flush=True)


def _fork(work: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(work["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (0, 1, 2):
            os.dup2(log if stream else os.open(os.devnull, os.O_RDONLY), stream)
        world = str(len(work["logs"]))
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": work["port"]}
        _restrict(work)
        module, name = work["function"].split(":")
        code = getattr(importlib.import_module(module), name)(*work["arguments"]) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _restrict(work: dict[str, Any]) -> None:
    if "file_limit" in work:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (work["file_limit"], work["file_limit"]))
    if "free_bytes" in work:
        import shutil

        total = shutil.disk_usage(".").total
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(total, total - work["free_bytes"], work["free_bytes"])


def _wait(pids: list[int], grace: float) -> list[int]:
    """Exit codes (negative = signal), in order; when one fails the others are killed after a while, as launchers do."""
    codes: dict[int, int] = {}
    failed_at = None
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            failed_at = failed_at or (time.monotonic() if codes[pid] else None)
            continue
        if failed_at and time.monotonic() - failed_at > grace:
            _signal([p for p in pids if p not in codes], signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    serve()
