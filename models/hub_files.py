"""The files of a checkpoint, from a directory or from the Hugging Face hub, one by one and with errors for people.

Files are asked for by name, so weights stored as pickle are never downloaded, and every file after the first comes from
the commit the first one resolved to.
"""

import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


class CheckpointFiles:
    """Files of `source`: a directory, or a hub id with an optional "@revision".

    Raises:
        ValueError: a revision given twice or for a directory, or a path that is no directory.
    """

    def __init__(self, source: str, revision: str | None = None) -> None:
        name = source.removeprefix("local-dir:")
        self.directory = Path(name).expanduser() if Path(name).expanduser().is_dir() else None
        self.commit: str | None = None  # of the hub's files, known after the first one
        if self.directory is None and (name != source or name.startswith(("/", ".", "~"))):
            raise ValueError(f"{source!r} is not a directory. Give an existing directory or a hub id (owner/name).")
        if self.directory is None:
            name, _, suffix = name.removeprefix("hf-hub:").partition("@")
            if suffix and revision and suffix != revision:
                raise ValueError(f"{source!r} and revision={revision!r} name two revisions. Give one of them.")
            revision = suffix or revision
        elif revision:
            raise ValueError(f"{source!r} is a directory and has no revision {revision!r}. Leave the revision out.")
        self.name, self.revision = name, revision

    def __str__(self) -> str:
        """The source with the commit it resolved to, or else the revision asked for."""
        version = self.commit or self.revision
        return f"{self.name}@{version}" if version else self.name

    def find(self, filename: str) -> Path | None:
        """Local path of a file, downloaded if need be; None when the checkpoint has no such file."""
        if self.directory is not None:
            path = self.directory / filename
            return path if path.is_file() else None
        try:
            path = Path(hf_hub_download(self.name, filename, revision=self.commit or self.revision))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and self.commit is None:
                raise ValueError(_explain(self.name, self.revision, filename, error)) from error
            return None
        # whatever the client raises (its HTTP library changes between releases) means: the file cannot be had
        except Exception as error:
            raise ValueError(_explain(self.name, self.revision, filename, error)) from error
        self.commit = path.parent.name  # the cache keeps a file under snapshots/<commit>/
        return path

    def weights(self) -> list[Path]:
        """Weights in safetensors format: one file, or an index and its shards.

        Raises:
            ValueError: none there (pickled weights can run code and are not read), or a shard is missing.
        """
        if path := self.find("model.safetensors"):
            return [path]
        if index := self.find("model.safetensors.index.json"):
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            shards = {name: self.find(name) for name in names}
            if missing := [name for name, path in shards.items() if path is None]:
                raise ValueError(f"{self}: shards {missing} of model.safetensors.index.json are missing.")
            return [index, *shards.values()]
        raise ValueError(
            f"{self} has no model.safetensors. Only safetensors weights are read: pickle files (.bin, .pth) can run "
            f"code. Convert it with transformers' save_pretrained or timm.models.save_for_hf(safe_serialization=True)."
        )


def _explain(name: str, revision: str | None, filename: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"HTTP {status}" if status else " ".join(str(error).split())[:200]
    at = f" at revision {revision!r}" if revision else ""
    login = "log in with huggingface-cli login (hf auth login) or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        step = f"It is gated: ask for access on https://huggingface.co/{name}, then {login}."
    elif isinstance(error, RevisionNotFoundError):
        step = "Name a branch, tag or commit that exists."
    elif isinstance(error, RepositoryNotFoundError | HFValidationError):
        step = f"Check the spelling (owner/name; timm's own models are timm/NAME); if it is private, {login}."
    else:
        step = (
            "Without internet, download it once on a machine that has it (hf download NAME), share HF_HOME and set "
            f"HF_HUB_OFFLINE=1; if it is private, {login}."
        )
    return f"cannot read {filename} of {name!r}{at} from the Hugging Face hub: {type(error).__name__}, {reason}. {step}"
