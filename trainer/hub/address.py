"""Where strangers get the code that loads a pushed model: an address for the card, and the command that installs it."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from trainer import origin

ARCHIVES = (".whl", ".zip", ".tar.gz")


def code_address(code_url: str, root: Path = origin.ROOT) -> str | None:
    """hub.code_url, else the git remote origin as an https address; None where that is no address for others.

    Args:
        root: the clone that is asked for its remote.
    """
    if code_url:
        return _without_user(code_url)
    return public(origin.remote(root))


def public(remote: str) -> str | None:
    """A git remote as an https address without user, password and .git; None for a path or a host without a name."""
    short = re.fullmatch(r"(?:[\w.-]+@)([\w-]+(?:\.[\w-]+)+):(?!/)(.+)", remote)  # git@host.name:owner/repo
    if short:
        remote = f"https://{short[1]}/{short[2]}"
    parts = urlsplit(remote)
    if parts.scheme not in ("https", "http", "ssh", "git") or "." not in (parts.hostname or ""):
        return None
    port = f":{parts.port}" if parts.port and parts.scheme in ("https", "http") else ""
    scheme = "http" if parts.scheme == "http" else "https"
    return f"{scheme}://{parts.hostname}{port}{parts.path.removesuffix('.git').rstrip('/')}"


def install_command(address: str, commit: str | None, extra: str = "") -> str:
    """What a reader types to install the package m2mkd.

    Args:
        address: a wheel or an archive, or else a git repository.
        commit: of the repository; None = its newest.
        extra: of the package, as "transformers".
    """
    package = f"m2mkd[{extra}]" if extra else "m2mkd"
    source = address
    if not address.endswith(ARCHIVES):
        source = "git+" + address.removeprefix("git+")
        if commit:
            source += f"@{commit}"
    return f'pip install "{package} @ {source}"'


def _without_user(address: str) -> str:
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
