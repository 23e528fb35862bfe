"""One writer per result: a file OUT/<result>/writer.json says which process writes there, until it is done.

Works on NFS and Lustre without flock: the file is made by hard link, which succeeds for one of several processes, and
kept fresh by a thread. A process of this host is alive when its pid still has the same start time. Of another host its
next sign of life is waited for, by the clock of the file system, so that the hosts' clocks do not matter.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import hashlib
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from trainer.config.load import one_line

log = logging.getLogger(__name__)

NAME = "writer.json"
BEAT = 10.0  # seconds between two signs of life
STALE = 120.0  # seconds without one after which a writer on another host counts as dead
LISTEN = 1.0  # seconds between two looks for a sign of life
TRIES = 5  # to take over what is dead: another process may do so at the same moment

_held: dict[Path, WriterLock] = {}


class WriterLock:
    """The right to write one folder.

    Raises:
        ValueError: another process has it; it is named.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.owner = _this_process()
        self.pid = os.getpid()
        self._ended = threading.Event()
        self._take()
        threading.Thread(target=self._beat, name=f"writer of {folder.name}", daemon=True).start()

    def release(self) -> None:
        """Give the right back; nothing happens when it is not ours any more, nor in a forked child."""
        self._ended.set()
        if os.getpid() == self.pid and _token(_read(self.path)) == self.owner["token"]:
            self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        mine = self.path.with_name(f"{NAME}.{self.owner['token']}")
        mine.write_text(json.dumps(self.owner, indent=1))
        try:
            self._take_file(self.path, mine)
        finally:
            mine.unlink(missing_ok=True)

    def _take_file(self, path: Path, mine: Path) -> None:
        """Make `path` a file of this process, in place of a dead writer's if there is one.

        Only one process may succeed a given dead writer: the one that has the file named after it, which is taken in
        the same way and then becomes the lock by a rename. `path` is never missing in between, so nobody else can
        make it at that moment.
        """
        for _ in range(TRIES):
            if _linked(mine, path):
                return
            there = _read(path)
            if there is None:
                continue  # given back in this moment
            if self._is_alive(path, there, mine):
                raise ValueError(_busy(path, there, _age(path, mine), self.owner))
            age = _age(path, mine)
            succession = _succession(path, _token(there))
            self._take_file(succession, mine)
            now_there = _read(path)
            if now_there is not None and _token(now_there) == _token(there):
                os.rename(succession, path)
                log.warning("%s was left by %s, which is gone: taken over", path, _described(there, age))
                return
            succession.unlink(missing_ok=True)  # another process has succeeded it already
        raise ValueError(f"{path} changes hands all the time: other processes start on this --out; stop them")

    def _is_alive(self, path: Path, there: dict[str, Any], mine: Path) -> bool:
        """Whether a writer still is: told at once on this host and of this very job, else by its next sign of life."""
        same_host = there.get("host") == self.owner["host"] and there.get("system") == self.owner["system"]
        pid = there.get("pid")
        if same_host and isinstance(pid, int) and pid > 0:
            return _start_time(pid) == there.get("started")
        same_job = bool(self.owner["job"]) and there.get("job") == self.owner["job"]
        if same_job and there.get("restarts") != self.owner["restarts"]:
            return False  # Slurm ends a job before it starts it again
        last_sign = _sign_of_life(path)
        has_said = False
        while _age(path, mine) < STALE:
            sign = _sign_of_life(path)
            if sign is None:
                return False  # given back
            if sign != last_sign:
                return True
            if not has_said:
                log.warning("%s: waiting for a sign of life of %s", path, _described(there))
                has_said = True
            time.sleep(LISTEN)
        return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            there = _read(self.path)
            if _token(there) == self.owner["token"]:
                with contextlib.suppress(OSError):  # a file server that is away for a moment; the next beat tells
                    os.utime(self.path)
            elif there is not None and not self._ended.is_set():
                # this process was stopped for longer than STALE, and counted as dead: two writers would ruin both
                print(
                    f"error: {self.path} was taken over by {_described(there, 0)}: stopping",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def hold(folder: Path) -> None:
    """Take the right to write a folder until `release`, or the end of this process; again by the same one is fine.

    Raises:
        ValueError: another process has it; it is named.
        OSError: the folder cannot be written.
    """
    key = folder.resolve()
    held = _held.get(key)
    if held is None or held.pid != os.getpid():
        _held[key] = WriterLock(folder)


def release(folder: Path) -> None:
    """Give the right back, if this process has it."""
    held = _held.pop(folder.resolve(), None)
    if held is not None:
        held.release()


@atexit.register
def release_all() -> None:
    """Give back whatever this process has."""
    for held in list(_held.values()):
        held.release()
    _held.clear()


def _this_process() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "user": _user(),
        "host": socket.gethostname(),
        "system": _system(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return str(os.getuid())


def _system() -> str:
    """What tells two running systems of one host name apart: the boot, and the name space of its pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return ""


def _start_time(pid: int) -> str | None:
    """When a process of this host started, in the kernel's own count; None when there is none, "" when not told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie writes nothing any more
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _busy(path: Path, there: dict[str, Any], age: float, mine: dict[str, Any]) -> str:
    return (
        f"{path.parent} is being written by {_described(there, age)}; this is {_described(mine)}. Wait for it, stop "
        f"it, or use another --out. (One that is gone is noticed at once on its own host, elsewhere after {STALE:.0f} "
        f"s; if you know better, delete {path})"
    )


def _described(owner: dict[str, Any], age: float | None = None) -> str:
    job = f", job {owner['job']}" if owner.get("job") else ""
    seen = "" if age is None else f", since {owner.get('since', 'unknown')}, last sign of life {max(0, age):.0f} s ago"
    who = (
        f"{owner.get('user', 'somebody')} on {owner.get('host', 'an unknown host')}, pid {owner.get('pid', 'unknown')}"
    )
    return one_line(f"{who}{job}{seen}")[:300]


def _linked(mine: Path, path: Path) -> bool:
    """Make `path` of `mine` unless it is there; False when it is."""
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: O_EXCL, which all of those have
        try:
            with path.open("x") as file:
                file.write(mine.read_text())
        except FileExistsError:
            return False
    return True


def _succession(path: Path, token: str) -> Path:
    """The file that says who succeeds one dead writer; a token from a damaged file may be any text."""
    return path.with_name(f"{NAME}.after-{hashlib.sha256(token.encode()).hexdigest()[:16]}")


def _read(path: Path) -> dict[str, Any] | None:
    """What a writer says of itself; {} when it cannot be read, None when there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _token(owner: dict[str, Any] | None) -> str:
    return str((owner or {}).get("token", ""))


def _sign_of_life(path: Path) -> float | None:
    """When a writer was last heard of, by the clock of the file system; None when it has given its right back."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _age(path: Path, fresh: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system."""
    os.utime(fresh)
    sign = _sign_of_life(path)
    return STALE if sign is None else fresh.stat().st_mtime - sign
