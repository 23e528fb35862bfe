"""The directory a student is published as: config.json and safetensors weights, in one file or in shards.

config.json is read by three: this project (the fields of the student's configuration, `preprocessing`, `labels`), timm
(models/registry.py: `architecture`, `model_args`, `pretrained_cfg`, ...) and transformers (models/auto.py:
`model_type`, `architectures`). What a kind of student writes there is its Format; everything else is the same for all,
the version of the package that wrote it and the one it needs among it (models/version.py).
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelHubMixin, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from ..preprocessing import Preprocessing
from ..version import SAVED, check_needs
from .hub import INDEX, CheckpointFiles, Weights

log = logging.getLogger(__name__)
# in config.json for timm or written by transformers' configuration; nothing of it changes what the model computes
FOR_TIMM = ("architecture", "num_features", "global_pool", "label_names", "model_args", "pretrained_cfg")
FOR_TRANSFORMERS = ("architectures", "transformers_version", "dtype", "id2label", "label2id", "problem_type")
# where its classes are found by transformers without this package: hub.code of a push (trainer/hub/code.py)
REMOTE_CODE = "auto_map"
FOR_OTHERS = (*FOR_TIMM, *FOR_TRANSFORMERS, REMOTE_CODE, *SAVED)
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.tmp)?")


@dataclass(frozen=True)
class Format:
    """What config.json says of one kind of student.

    Attributes:
        name: for people.
        model_type: tells the kinds apart.
        from_dict: the configuration of plain values, ValueError where they make no model.
        content: what is written beside `model_type`, `preprocessing` and `labels`: the configuration's fields, and what
            timm and transformers read.
        check_counts: refuses a configuration with more parts than the weights hold, before they are built.
    """

    name: str
    model_type: str
    from_dict: Callable[[Mapping[str, Any]], Any]
    content: Callable[[Any, Preprocessing | None, Sequence[str] | None], dict[str, Any]]
    check_counts: Callable[[Any, Weights], None]


class Published(ModelHubMixin):
    """A student with its files: save_pretrained, from_pretrained and, by huggingface_hub, push_to_hub.

    Attributes:
        FORMAT: of its config.json.
        config: what it is.
        preprocessing, labels: what its images must look like and what its classes are called; None when not known.
        source: the directory, or the hub id with its commit, that it was loaded from; None for a new one.
    """

    FORMAT: ClassVar[Format]
    config: Any
    num_classes: int
    preprocessing: Preprocessing | None
    labels: list[str] | None
    source: str | None

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] | None = None,
        state: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        config: None = None,  # these two only because ModelHubMixin.push_to_hub passes them along
        model_card_kwargs: None = None,
    ) -> None:
        """Write config.json and the weights: model.safetensors, or shards and their index; see models/files/saved.py.

        Args:
            preprocessing, labels: travel with the model; by default its own.
            state: weights to write in place of the model's own, by plain names: full_state_dict of the model in
                training, which is collective, while one rank writes.
            max_shard_size: bytes of one weights file, a number or text like "5GB".

        Raises:
            ValueError: an expert parallel model without `state`, labels of another number than the classes, or weights
                that are not those of this model, so that nobody could load them.
        """
        if state is None:
            parallel = any(hasattr(module, "deepspeed_moe") for module in self.modules())
            if parallel or any(parameter.is_meta for parameter in self.parameters()):
                raise ValueError("this model holds one rank's experts: pass state=models.moe.full_state_dict(model).")
            state = self.state_dict()
        preprocessing = preprocessing or self.preprocessing
        labels = labels or self.labels
        if labels is not None and len(labels) != self.num_classes:
            raise ValueError(f"{len(labels)} labels were given for {self.num_classes} classes.")
        with torch.device("meta"):
            expected = type(self)(self.config).state_dict()
        for name in sorted(expected.keys() | state.keys()):
            given_shape = _shape(state, name)
            model_shape = _shape(expected, name)
            if given_shape != model_shape:
                raise ValueError(
                    f"{name} is {given_shape} in the weights to save and {model_shape} in a model of this config."
                )
        write(Path(save_directory), content(self.FORMAT, self.config, preprocessing, labels), state, max_shard_size)

    @classmethod
    def from_pretrained(
        cls, source: str | Path | CheckpointFiles, revision: str | None = None, *, config: Any = None
    ) -> Self:
        """Load from a directory or from the hub ("owner/name" or "owner/name@revision"); strict, safetensors only.

        Args:
            config: build this on the weights: it may differ from what was saved in dropout, noise, capacities and loss
                weights.

        Returns the model in evaluation mode, in the precision it was saved in, its weights mapped from the files.

        Raises:
            ValueError: not found, not a student of this kind, without safetensors weights, weights that are damaged,
                not finite or do not fit, or a `config` that makes another function of them.
        """
        return cls._load(source, revision, config, lambda name: True)

    @classmethod
    def _load(
        cls,
        source: str | Path | CheckpointFiles,
        revision: str | None,
        config: Any,
        needed: Callable[[str], bool],
    ) -> Self:
        files = source if isinstance(source, CheckpointFiles) else CheckpointFiles(str(source), revision)
        saved, preprocessing, labels = read(cls.FORMAT, files)
        config = saved if config is None else config.on_weights_of(saved, str(files))
        weights = Weights(files)
        weights.unwrap()
        cls.FORMAT.check_counts(config, weights)
        with torch.device("meta"):
            model = cls(config)
        fill(model, weights, needed)
        model.preprocessing = preprocessing
        model.labels = labels
        model.source = str(files)
        log.info("loaded %s: %.3f GB read", files, weights.bytes_read / 1e9)
        return model.eval()


def content(
    format: Format, config: Any, preprocessing: Preprocessing | None, labels: Sequence[str] | None
) -> dict[str, Any]:
    """What config.json holds."""
    images = {"preprocessing": preprocessing.to_dict()} if preprocessing else {}
    names = {"labels": list(labels), "label_names": list(labels)} if labels else {}
    values = format.content(config, preprocessing, labels)
    return {"model_type": format.model_type, **values, **images, **names, **SAVED}


def write(
    directory: Path,
    content: Mapping[str, Any],
    state: Mapping[str, Tensor],
    max_shard_size: int | str,
) -> None:
    """Write the directory anew: weights of an earlier save that are no part of this one are removed.

    Killed at any moment, what was there before still loads, or nothing does: config.json goes away before the first
    weight file changes and comes back last.

    Args:
        content: of config.json.
        state: weights by the names of the model's state dict.
        max_shard_size: bytes of one weights file, a number or text like "5GB".
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    # meta tensors: those of a flat buffer share its storage and would all be kept in one shard
    shapes = {name: torch.empty_like(value, device="meta") for name, value in weights.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    # everything is written under temporary names first, in the order in which it gets its own: config.json last
    temporary: dict[str, Path] = {}
    for name, tensors in split.filename_to_tensors.items():
        temporary[name] = directory / f"{name}.tmp"
        shard = {tensor: weights[tensor] for tensor in tensors}
        save_file(shard, temporary[name], metadata={"format": "pt"})
    json_files: dict[str, Any] = {}
    if split.is_sharded:
        json_files[INDEX] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    json_files["config.json"] = content
    for name, values in json_files.items():
        temporary[name] = directory / f"{name}.tmp"
        temporary[name].write_text(json.dumps(values, indent=2) + "\n")
    assert list(temporary)[-1] == "config.json"
    for path in temporary.values():
        _flush(path)
    (directory / "config.json").unlink(missing_ok=True)
    for path in directory.iterdir():
        if WEIGHT_FILES.fullmatch(path.name) and path not in temporary.values():
            path.unlink()
    for name, path in temporary.items():
        path.replace(directory / name)


def write_config(directory: Path, content: Mapping[str, Any]) -> None:
    """Write config.json alone, while the weights are still being trained."""
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def read(format: Format, files: CheckpointFiles) -> tuple[Any, Preprocessing | None, list[str] | None]:
    """What config.json says: the model's configuration, what its images must look like, and its classes' names.

    Raises:
        ValueError: there is none, it is not that of a student of this kind, it needs a newer version of this package,
            or it makes no model.
    """
    values = _read_content(format.name, files)
    model_type = values.pop("model_type", None)
    if model_type != format.model_type:
        raise ValueError(f"{files} is a {model_type!r}, not a {format.model_type!r}; load teachers with load_teacher.")
    check_needs(values, files)
    images = values.pop("preprocessing", None)
    labels = values.pop("labels", None)
    values = {name: value for name, value in values.items() if name not in FOR_OTHERS}
    try:
        config = format.from_dict(values)
        preprocessing = None if images is None else Preprocessing.from_dict(images)
        return config, preprocessing, labels
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json of {files}: {error}") from error


def read_versions(format: Format, files: CheckpointFiles) -> dict[str, str]:
    """The versions that config.json names (models/version.py); none where an older package wrote it.

    Raises:
        ValueError: there is no config.json, or it is damaged.
    """
    values = _read_content(format.name, files)
    return {name: values[name] for name in SAVED if name in values}


def read_model_type(files: CheckpointFiles) -> Any:
    """What config.json says to be, of any kind of student or of somebody else's model.

    Raises:
        ValueError: there is no config.json, or it is damaged.
    """
    return _read_content("student", files).get("model_type")


def fill(model: nn.Module, weights: Weights, needed: Callable[[str], bool]) -> None:
    """Give the parameters of a model on the meta device the values of `weights`; those not needed stay as they are.

    Args:
        needed: whether the tensor of that name is read.

    Raises:
        ValueError: weights that do not fit the model, or are no finite floats.
    """
    expected = model.state_dict()
    weights.check(expected)
    state = {name: weights.read(name) for name in expected if needed(name)}
    model.load_state_dict(state, strict=False, assign=True)  # assign: mapped from the file, not copied


def timm_pretrained_cfg(
    config: Any, preprocessing: Preprocessing | None, *, first_conv: str, any_size: bool
) -> dict[str, Any]:
    """What timm takes from a checkpoint: its classes, the names of its first and last layer, and its images."""
    pretrained_cfg = {
        "num_classes": config.num_classes,
        "fixed_input_size": not any_size,
        "pool_size": None,
        "first_conv": first_conv,
        "classifier": "head",
        "input_size": [config.in_chans, config.image_size, config.image_size],
    }
    if preprocessing is not None:
        images = preprocessing.to_dict()
        known_to_timm = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        pretrained_cfg |= {name: value for name, value in images.items() if name in known_to_timm}
    return pretrained_cfg


def _read_content(name: str, files: CheckpointFiles) -> dict[str, Any]:
    path = files.find("config.json")
    if path is None:
        raise ValueError(f"{files} has no config.json, so it is not a saved {name}.")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"config.json of {files} is truncated or not JSON.") from None


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(state[name].shape) if name in state else "missing"
