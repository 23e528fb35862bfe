"""Can the hub be reached from here? Asked once and quickly, since every file asked for later waits for it again."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from urllib.parse import urlsplit

SECONDS = 5.0  # for the name and the connection
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
IMPATIENT = {"HF_HUB_DOWNLOAD_TIMEOUT": "10", "HF_HUB_ETAG_TIMEOUT": "10"}  # seconds; of huggingface_hub


def hub_environ(environ: Mapping[str, str] = os.environ) -> tuple[dict[str, str], str]:
    """Variables for a process that opens hub models and data here, and a line where the hub cannot be reached.

    What the user has set stays; behind a proxy nothing is tried.
    """
    patience = {name: value for name, value in IMPATIENT.items() if name not in environ}
    proxied = any(environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if proxied or environ.get("HF_HUB_OFFLINE"):
        return patience, ""
    address = urlsplit(environ.get("HF_ENDPOINT") or "https://huggingface.co")
    host = address.hostname or ""
    port = address.port or (80 if address.scheme == "http" else 443)
    problem = _unreachable(host, port)
    if not problem:
        return patience, ""
    said = f"{host} cannot be reached from here ({problem}): what lies in the caches is used, nothing is downloaded"
    return patience | OFFLINE, said


def _unreachable(host: str, port: int) -> str:
    """Why; empty when it can be reached."""
    answers: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), SECONDS).close()
            answers.append("")
        except OSError as error:
            answers.append(error.strerror or str(error))

    thread = threading.Thread(target=connect, daemon=True)  # asking for the name has no time limit of its own
    thread.start()
    thread.join(SECONDS)
    return answers[0] if answers else f"no answer within {SECONDS:.0f} s"
