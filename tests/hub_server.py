"""A stand-in of the Hugging Face hub on 127.0.0.1: enough of its protocol for the real clients, with faults on order.

    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path)  # the client of this process; environment(hub.url, ...) for another one
        hub.seed("alice/model", {"config.json": b"{}"})
        hub.fail("commit", "lost", times=2)

Models only, and storage by LFS without xet. The routes, whose names are the steps of `fail`, are in hub_protocol.py.
"""

import contextlib
import http.server
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.hub_protocol import Handler
from tests.hub_store import File, Repo

WRITER, READER, FINE = (f"hf_{name:0<34}" for name in ("writer", "reader", "finegrained"))
EXPIRED = f"hf_{'expired':0<34}"  # nobody's


@dataclass
class Fault:
    """What the next `times` requests of a step meet.

    kind: an HTTP status; "page" is one with a proxy's page in place of the hub's answer; "drop" closes the connection
    before anything is done, "lost" after all is done, "truncate" in the middle of the answer.
    """

    step: str
    kind: int | str
    times: int
    headers: Mapping[str, str]


class _Server(http.server.ThreadingHTTPServer):
    """Knows its open connections."""

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*arguments)

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)


class HubServer:
    """The hub's state and its thread; `with` starts and stops it.

    Attributes:
        users: token -> the answer of whoami. They all are alice, who writes for the organisation acme and reads
            readers; FINE may write to alice/model and nowhere else.
        requests: (step, path) of every request, in order.
        before: step -> called once, before the next request of that step is answered: somebody else acts in between.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        orgs = [{"name": "acme", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
        scope = {"entity": {"type": "model", "name": "alice/model"}, "permissions": ["repo.write"]}
        roles = {
            WRITER: {"role": "write"},
            READER: {"role": "read"},
            FINE: {"role": "fineGrained", "fineGrained": {"global": [], "scoped": [scope]}},
        }
        self.users: dict[str, dict[str, Any]] = {
            token: {
                "type": "user",
                "name": "alice",
                "orgs": orgs,
                "auth": {"type": "access_token", "accessToken": role},
            }
            for token, role in roles.items()
        }
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS storage, by SHA-256
        self.requests: list[tuple[str, str]] = []
        self.before: dict[str, Callable[[], None]] = {}
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = _Server((host, 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://{host}:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Be gone: no connection is accepted any more, and those that clients keep open end."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.server.connections:
            with contextlib.suppress(OSError):  # ended already
                connection.shutdown(socket.SHUT_RDWR)

    def connect(self, monkeypatch: pytest.MonkeyPatch, folder: Path, token: str | None = WRITER) -> None:
        """Point the client of this process here, with its home below `folder`."""
        connect(monkeypatch, self.url, folder, token)

    def seed(self, name: str, files: Mapping[str, bytes] | Path, branch: str = "main", **repo: bool) -> str:
        """Add a commit that holds exactly these files, or those of a folder, as somebody's earlier push.

        Args:
            repo: private, gated; of a repo that is made by this.

        Returns:
            The commit's sha.
        """
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        kept = self.repos.setdefault(name, Repo(**{"private": False, **repo}))
        found = {path: File.of(path, data) for path, data in files.items()}
        self.objects |= {file.oid: file.data for file in found.values() if file.lfs}
        return kept.commit(branch, found, "seed").sha

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        return {path: file.data for path, file in self.repos[name].find(revision).files.items()}

    def head(self, name: str, branch: str = "main") -> str:
        """The commit a branch is at."""
        return self.repos[name].branches[branch]

    def fail(self, step: str, kind: int | str, times: int = 1, headers: Mapping[str, str] | None = None) -> None:
        """Order a fault; see Fault."""
        self.faults.append(Fault(step, kind, times, headers or {}))

    def count(self, step: str) -> int:
        """Requests of a step so far."""
        return sum(name == step for name, _ in self.requests)

    def begin(self, step: str, path: str) -> Fault | None:
        """Note a request; returns the fault it meets."""
        with self.lock:
            self.requests.append((step, path))
            if act := self.before.pop(step, None):
                act()
            for fault in self.faults:
                if fault.step == step and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


def connect(monkeypatch: pytest.MonkeyPatch, url: str, folder: Path, token: str | None = WRITER) -> None:
    """Point the client of this process to a stand-in, whatever was imported before."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    settings = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in environment(url, folder, token).items():
        monkeypatch.setenv(name, value)


def environment(url: str, folder: Path, token: str | None = WRITER) -> dict[str, str]:
    """What points the client of a new process to a stand-in."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": urlsplit(url).hostname}  # fmt: skip
    return settings | ({"HF_TOKEN": token} if token else {})
