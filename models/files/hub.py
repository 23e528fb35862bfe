"""The files of a checkpoint, from a directory or from the Hugging Face hub, one by one and with errors for people.

Files are asked for by name, so weights stored as pickle are never downloaded, and every file after the first comes from
the commit the first one resolved to. `Weights` reads single tensors out of one safetensors file or of shards.
"""

import json
import re
from collections.abc import KeysView
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .places import expanded

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types weights may have


class CheckpointFiles:
    """Files of `source`: a directory, or a hub id with an optional "@revision".

    Args:
        folder: where in the source they lie; "" = at its top.
        cache_dir: where the hub's files are kept; None = the client's own cache.

    Raises:
        ValueError: a revision given twice or for a directory, or a path that is no directory.
    """

    def __init__(
        self, source: str, revision: str | None = None, *, folder: str = "", cache_dir: str | Path | None = None
    ) -> None:
        name = expanded(source.removeprefix("local-dir:"))  # timm's prefix
        directory = Path(name)
        self.directory = directory if directory.is_dir() else None
        self.commit: str | None = None  # of the hub's files, known after the first one
        meant_as_path = source.startswith(("local-dir:", "/", ".", "~", "$"))
        if self.directory is None and meant_as_path:
            raise ValueError(f"{source!r} is not a directory. Give an existing directory or a hub id (owner/name).")
        if self.directory is None:
            name, _, suffix = name.removeprefix("hf-hub:").partition("@")
            if suffix and revision and suffix != revision:
                raise ValueError(f"{source!r} and revision={revision!r} name two revisions. Give one of them.")
            revision = suffix or revision
        elif revision:
            raise ValueError(f"{source!r} is a directory and has no revision {revision!r}. Leave the revision out.")
        self.name = name
        self.revision = revision
        self.folder = folder
        self.options = {} if cache_dir is None else {"cache_dir": cache_dir}

    def __str__(self) -> str:
        """The source with the commit it resolved to, or else the revision asked for."""
        version = self.commit or self.revision
        text = self.name
        if version:
            text += f"@{version}"
        if self.folder:
            text += f"/{self.folder}"
        return text

    def find(self, filename: str) -> Path | None:
        """Local path of a file, downloaded if need be; None when the checkpoint has no such file.

        Raises:
            ValueError: the hub does not give it: no such repository or revision, no access, no network.
        """
        if self.folder:
            filename = f"{self.folder}/{filename}"
        if self.directory is not None:
            path = self.directory / filename
            return path if path.is_file() else None
        try:
            path = Path(hf_hub_download(self.name, filename, revision=self.commit or self.revision, **self.options))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and self.commit is None:
                raise ValueError(_explain(self.name, self.revision, filename, error)) from error
            return None
        # whatever the client raises (its HTTP library changes between releases) means: the file cannot be had
        except Exception as error:
            raise ValueError(_explain(self.name, self.revision, filename, error)) from error
        # the cache keeps a file under snapshots/<commit>/
        self.commit = path.parents[len(PurePosixPath(filename).parts) - 1].name
        return path

    def weights(self) -> list[Path]:
        """Weights in safetensors format: one file, or an index and its shards.

        Raises:
            ValueError: none there (pickled weights can run code and are not read), or a shard is missing.
        """
        single = self.find(WEIGHTS)
        if single:
            return [single]
        index = self.find(INDEX)
        if index:
            names = sorted(set(self.weight_map(index).values()))
            shards = {name: self.find(name) for name in names}
            missing = [name for name, path in shards.items() if path is None]
            if missing:
                raise ValueError(f"{self}: shards {missing} of {INDEX} are missing.")
            return [index, *shards.values()]
        raise ValueError(
            f"{self} has no model.safetensors. Only safetensors weights are read: pickle files (.bin, .pth) can run "
            f"code. Convert it with transformers' save_pretrained or timm.models.save_for_hf(safe_serialization=True)."
        )

    def weight_map(self, index: Path) -> dict[str, str]:
        """Name of a tensor -> file name of its shard, as the index has it.

        Raises:
            ValueError: not an index, or a shard that is not a safetensors file beside it.
        """
        try:
            shards = {str(name): str(shard) for name, shard in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self}: {INDEX} is truncated or no index of weights ({error!r}).") from None
        for shard in shards.values():
            if not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):
                raise ValueError(f"{self}: {INDEX} names {shard!r}: expected .safetensors files beside it.")
        return shards


class Weights:
    """The tensors of a checkpoint by name, memory-mapped: what is not read costs nothing.

    Raises:
        ValueError: no safetensors weights, a damaged file, a shard that is missing, or an index that is not true.
    """

    def __init__(self, files: CheckpointFiles) -> None:
        self.files = files
        self.bytes_read = 0
        self._holders = {}  # name of a tensor -> its opened file
        paths = files.weights()
        index = None
        if paths[0].name == INDEX:
            index = files.weight_map(paths.pop(0))
        for path in paths:
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{files}: {path.name} is truncated or no safetensors file ({error}).") from None
            if index is None:
                names = list(file.keys())
            else:
                names = [name for name, shard in index.items() if shard == path.name]
            absent = sorted(set(names) - set(file.keys()))
            if absent:
                raise ValueError(f"{files}: {INDEX} has {absent[0]} in {path.name}, which does not hold it.")
            self._holders.update(dict.fromkeys(names, file))

    def names(self) -> KeysView[str]:
        """Names of all tensors."""
        return self._holders.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._holders[name].get_slice(name).get_shape())

    def check(self, expected: dict[str, Tensor]) -> None:
        """Compare names, shapes and types with those of a model (its state dict, on whatever device).

        Raises:
            ValueError: naming the first tensor that is missing, left over or of another shape or type, and both sides.
        """
        missing = [name for name in expected if name not in self._holders]
        if missing:
            raise ValueError(
                f"{self.files} lacks {missing[0]}{_and_more(missing)}: the model expects it with shape "
                f"{tuple(expected[missing[0]].shape)}."
            )
        unexpected = sorted(set(self._holders) - set(expected))
        if unexpected:
            raise ValueError(
                f"{self.files} has {unexpected[0]}{_and_more(unexpected)} of shape {self.shape(unexpected[0])}, which "
                f"the model does not have."
            )
        for name, tensor in expected.items():
            shape = self.shape(name)
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"{self.files} has {name} with shape {shape}, but the model has it with {tuple(tensor.shape)}."
                )
            dtype = self._holders[name].get_slice(name).get_dtype()
            if dtype not in FLOATS:
                raise ValueError(f"{self.files} has {name} as {dtype}; weights must be one of {', '.join(FLOATS)}.")

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file.

        Raises:
            ValueError: values that are not finite.
        """
        tensor = self._holders[name].get_tensor(name)
        self.bytes_read += tensor.nbytes
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(f"{self.files} has {bad} values in {name} that are NaN or infinite.")
        return tensor


def _and_more(names: list[str]) -> str:
    if len(names) == 1:
        return ""
    return f" (and {len(names) - 1} more)"


def _explain(name: str, revision: str | None, filename: str, error: Exception) -> str:
    """What the hub's client says, in one line, and the next step."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"HTTP {status}" if status else " ".join(str(error).split())[:200]
    source = repr(name)
    if revision:
        source += f" at revision {revision!r}"
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
    return f"cannot read {filename} of {source} from the Hugging Face hub: {type(error).__name__}, {reason}. {step}"
