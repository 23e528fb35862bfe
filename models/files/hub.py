"""The files of a checkpoint, from a directory or from the Hugging Face hub, one by one and with errors for people.

Files are asked for by name, so weights stored as pickle are never downloaded, and every file after the first comes from
the commit the first one resolved to. `Weights` reads single tensors out of one safetensors file or of shards.
"""

import json
import logging
import re
from collections.abc import KeysView
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
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
from .wrappers import grouped, plain_names

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"  # what git leaves in place of a large file it has not fetched
SAVE_PLAIN = (
    "Save the state dict of the model itself: of a wrapped one that is model.module (DistributedDataParallel, an "
    "average of weights) or model._orig_mod (torch.compile)."
)
# torch reads tensors only, and runs nothing, with weights_only
CONVERT = (
    """python -c "import torch; from safetensors.torch import save_file; """
    """state = torch.load('pytorch_model.bin', weights_only=True); """
    """save_file({k: v.clone() for k, v in state.items()}, 'model.safetensors', {'format': 'pt'})" """
).strip()
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types weights may have


class NotCached(ValueError):
    """The hub cannot be asked and the file is not in its cache, so nobody knows whether the checkpoint has it."""


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
        if self.directory is not None and (directory / "snapshots").is_dir() and (directory / "refs").is_dir():
            versions = ", ".join(sorted(path.name for path in (directory / "snapshots").iterdir())) or "none"
            raise ValueError(
                f"{source!r} is a folder of the hub's cache, its files are in {directory / 'snapshots'}/COMMIT "
                f"({versions}). Give one of those, or the hub id (owner/name) with HF_HUB_OFFLINE=1."
            )
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

    def find(self, filename: str, optional: bool = False) -> Path | None:
        """Local path of a file, downloaded if need be; None when the checkpoint has no such file.

        Args:
            optional: None also where the hub cannot be asked and the cache does not say whether there is one.

        Raises:
            NotCached: the hub cannot be asked, and the file is not in its cache.
            ValueError: the hub does not give it: no such repository or revision, no access.
        """
        if self.folder:
            filename = f"{self.folder}/{filename}"
        if self.directory is not None:
            path = self.directory / filename
            return path if path.is_file() else None
        revision = self.commit or self.revision
        try:
            path = Path(hf_hub_download(self.name, filename, revision=revision, **self.options))
        except LocalEntryNotFoundError as error:
            # the client remembers which files it was once told do not exist
            cached = try_to_load_from_cache(self.name, filename, revision=revision, **self.options)
            if optional or cached is _CACHED_NO_EXIST:
                return None
            raise NotCached(self._not_cached(filename, error)) from error
        except EntryNotFoundError:
            return None
        # whatever the client raises (its HTTP library changes between releases) means: the file cannot be had
        except Exception as error:
            raise ValueError(_explain(self.name, self.revision, filename, error)) from error
        # the cache keeps a file under snapshots/<commit>/
        self.commit = path.parents[len(PurePosixPath(filename).parts) - 1].name
        return path

    def _not_cached(self, filename: str, error: Exception) -> str:
        """Why a file cannot be had without the hub, what of the repository is in the cache, and the next step."""
        cause = error.__cause__ or error
        reason = "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else f"the hub cannot be reached: {_one_line(cause)}"
        cache = Path(self.options.get("cache_dir", constants.HF_HUB_CACHE))
        repository = cache / f"models--{self.name.replace('/', '--')}"
        refs = [path for path in repository.glob("refs/**/*") if path.is_file()]
        commits = {path.name for path in repository.glob("snapshots/*")}
        versions = sorted(f"{path.relative_to(repository / 'refs')} ({path.read_text()[:12]})" for path in refs)
        versions += sorted(commit[:12] for commit in commits - {path.read_text() for path in refs})
        there = f"there: {', '.join(versions)}" if versions else "nothing of it is there"
        revision = self.commit or self.revision
        command = f"hf download {self.name}" + (f" --revision {revision}" if revision else "")
        return (
            f"cannot read {filename} of {str(self)!r} from the Hugging Face hub: it is not in the cache {cache} "
            f"({there}), and {reason}. Without internet, download it once on a machine that has it ({command}), share "
            f"HF_HOME and set HF_HUB_OFFLINE=1."
        )

    def weights(self) -> list[Path]:
        """Weights in safetensors format: one file, or an index and its shards.

        Raises:
            NotCached: the hub cannot be asked, and its cache has no weights or not all shards.
            ValueError: none there (pickled weights can run code and are not read), or a shard is missing.
        """
        single, unknown = self._if_known(WEIGHTS)
        if single:
            return [single]
        index, index_unknown = self._if_known(INDEX)
        if index:
            names = sorted(set(self.weight_map(index).values()))
            shards = {name: self.find(name) for name in names}
            missing = [name for name, path in shards.items() if path is None]
            if missing:
                raise ValueError(
                    f"{self}: {missing[0]}{_and_more(missing)} of the {len(names)} shards of {INDEX} is missing. "
                    f"Fetch all files of the checkpoint again."
                )
            return [index, *shards.values()]
        if unknown or index_unknown:
            raise unknown or index_unknown
        others = []
        if self.directory is not None:
            others = sorted(path.name for path in (self.directory / self.folder).glob("*.safetensors"))
        if others:
            raise ValueError(
                f"{self} has no {WEIGHTS} and no {INDEX}, only {others[0]}{_and_more(others)}. Take all files of the "
                f"checkpoint, under the names that save_pretrained or timm.models.save_for_hf give them."
            )
        raise ValueError(
            f"{self} has no model.safetensors. Only safetensors weights are read: pickle files (.bin, .pth) can run "
            f"code. Convert it once, in a folder of its files (hf download {self.name} --local-dir FOLDER): {CONVERT}"
        )

    def _if_known(self, filename: str) -> tuple[Path | None, NotCached | None]:
        """Where a file is, or why nobody knows whether there is one."""
        try:
            return self.find(filename), None
        except NotCached as error:
            return None, error

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
        self._saved_as: dict[str, str] = {}  # name of a tensor -> its name in the file
        paths = files.weights()
        index = None
        if paths[0].name == INDEX:
            index = files.weight_map(paths.pop(0))
        for path in paths:
            with path.open("rb") as start:
                if start.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise ValueError(f"{files}: {path.name} is a Git LFS pointer: git lfs pull fetches the weights.")
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
        self._saved_as = {name: name for name in self._holders}

    @property
    def renamed(self) -> bool:
        """Whether `unwrap` has left something out of the names."""
        return any(name != saved for name, saved in self._saved_as.items())

    def unwrap(self) -> None:
        """Leave out of the names what DistributedDataParallel, torch.compile or another wrapper put into all of them.

        One line of the log says so.

        Raises:
            ValueError: two tensors have one name without it.
        """
        try:
            plain = plain_names(self._holders)
        except ValueError as error:
            raise ValueError(f"{self.files}: {error} {SAVE_PLAIN}") from None
        if plain == self._saved_as:
            return
        name, saved = next((name, saved) for name, saved in plain.items() if name != saved)
        log.warning("%s was saved from a wrapped model: %s is taken for %s, and so on", self.files, saved, name)
        self._holders = {name: self._holders[saved] for name, saved in plain.items()}
        self._saved_as = plain

    def names(self) -> KeysView[str]:
        """Names of all tensors."""
        return self._holders.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def check(self, expected: dict[str, Tensor]) -> None:
        """Compare names, shapes and types with those of a model (its state dict, on whatever device).

        Raises:
            ValueError: naming the first tensor that is missing, left over or of another shape or type, and both sides.
        """
        missing = [name for name in expected if name not in self._holders]
        unexpected = sorted(set(self._holders) - set(expected))
        if missing and unexpected:
            raise ValueError(
                f"{self.files} lacks {missing[0]}{_and_more(missing)} and has {unexpected[0]}{_and_more(unexpected)}: "
                f"its tensors are {grouped(self.names())}, the model's are {grouped(expected)}. {SAVE_PLAIN}"
            )
        if missing:
            raise ValueError(
                f"{self.files} lacks {missing[0]}{_and_more(missing)}: the model expects it with shape "
                f"{tuple(expected[missing[0]].shape)}. Download it again, all of its files."
            )
        if unexpected:
            raise ValueError(
                f"{self.files} has {unexpected[0]}{_and_more(unexpected)} of shape {self.shape(unexpected[0])}, which "
                f"the model does not have. Leave it out."
            )
        for name, tensor in expected.items():
            shape = self.shape(name)
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"{self.files} has {name} with shape {shape}, but the model has it with {tuple(tensor.shape)}."
                )
            dtype = self._slice(name).get_dtype()
            if dtype not in FLOATS:
                raise ValueError(f"{self.files} has {name} as {dtype}; weights must be one of {', '.join(FLOATS)}.")

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file.

        Raises:
            ValueError: values that are not finite.
        """
        tensor = self._holders[name].get_tensor(self._saved_as[name])
        self.bytes_read += tensor.nbytes
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(f"{self.files} has {bad} values in {name} that are NaN or infinite.")
        return tensor

    def _slice(self, name: str) -> Any:
        """A tensor's shape and type, without its values."""
        return self._holders[name].get_slice(self._saved_as[name])


def _and_more(names: list[str]) -> str:
    if len(names) == 1:
        return ""
    return f" (and {len(names) - 1} more)"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _explain(name: str, revision: str | None, filename: str, error: Exception) -> str:
    """What the hub's client says, in one line, and the next step."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"HTTP {status}" if status else _one_line(error)
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
