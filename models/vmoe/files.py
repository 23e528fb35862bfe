"""The directory a V-MoE is published as: config.json and safetensors weights, in one file or in shards.

config.json is read by three: this project (the fields of VMoEConfig, `preprocessing`, `labels`), timm
(models/registry.py: `architecture`, `model_args`, `pretrained_cfg`, ...) and transformers (models/auto.py:
`model_type`, `architectures`). It names the version of the package that wrote it and the one it needs
(models/version.py).
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files.hub import INDEX, CheckpointFiles, Weights
from ..files.wrappers import grouped
from ..moe.expert import LAYERS
from ..preprocessing import Preprocessing
from ..version import SAVED, check_needs
from .config import MODEL_TYPE, POOLS, VMoEConfig, moe_numbers

ARCHITECTURE = "vmoe"  # timm's name of a V-MoE that is built from its arguments alone
TIMM_NAMES = {  # our name -> timm's
    "image_size": "img_size",
    "width": "embed_dim",
    "heads": "num_heads",
    "pool": "global_pool",
    "drop_rate": "proj_drop_rate",
    "swiglu": "swiglu_mlp",
    "layer_scale": "init_values",
}
# in config.json for timm or written by transformers' configuration; nothing of it changes what the model computes
FOR_TIMM = ("architecture", "num_features", "global_pool", "label_names", "model_args", "pretrained_cfg")
FOR_TRANSFORMERS = ("architectures", "transformers_version", "dtype", "id2label", "label2id", "problem_type")
# where its classes are found by transformers without this package: hub.code of a push (trainer/hub/code.py)
REMOTE_CODE = "auto_map"
FOR_OTHERS = (*FOR_TIMM, *FOR_TRANSFORMERS, REMOTE_CODE, *SAVED)
# what timm's caller decides on, so that model_args leaves it out (num_classes stands in pretrained_cfg)
TIMM_DECIDES = ("num_classes", "drop_path_rate", "drop_rate", "seed")
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.tmp)?")


def write(
    directory: Path,
    config: VMoEConfig,
    state: Mapping[str, Tensor],
    preprocessing: Preprocessing | None,
    labels: Sequence[str] | None,
    max_shard_size: int | str,
) -> None:
    """Write the directory anew: weights of an earlier save that are no part of this one are removed.

    Killed at any moment, what was there before still loads, or nothing does: config.json goes away before the first
    weight file changes and comes back last.

    Args:
        state: weights by the names of a V-MoE's state dict.
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
    json_files["config.json"] = _content(config, preprocessing, labels)
    for name, content in json_files.items():
        temporary[name] = directory / f"{name}.tmp"
        temporary[name].write_text(json.dumps(content, indent=2) + "\n")
    assert list(temporary)[-1] == "config.json"
    for path in temporary.values():
        _flush(path)
    (directory / "config.json").unlink(missing_ok=True)
    for path in directory.iterdir():
        if WEIGHT_FILES.fullmatch(path.name) and path not in temporary.values():
            path.unlink()
    for name, path in temporary.items():
        path.replace(directory / name)


def write_config(
    directory: Path, config: VMoEConfig, preprocessing: Preprocessing | None, labels: Sequence[str] | None
) -> None:
    """Write config.json alone, while the weights are still being trained."""
    text = json.dumps(_content(config, preprocessing, labels), indent=2) + "\n"
    (directory / "config.json").write_text(text)


def read(files: CheckpointFiles) -> tuple[VMoEConfig, Preprocessing | None, list[str] | None]:
    """What config.json says: the model's configuration, what its images must look like, and its classes' names.

    Raises:
        ValueError: there is none, it is not that of a V-MoE, it needs a newer version of this package, or it makes no
            model.
    """
    content = _read_content(files)
    model_type = content.pop("model_type", None)
    if model_type != MODEL_TYPE:
        raise ValueError(f"{files} is a {model_type!r}, not a {MODEL_TYPE!r}; load teachers with load_teacher.")
    check_needs(content, files)
    images = content.pop("preprocessing", None)
    labels = content.pop("labels", None)
    values = {name: value for name, value in content.items() if name not in FOR_OTHERS}
    try:
        config = VMoEConfig.from_dict(values)
        preprocessing = None if images is None else Preprocessing.from_dict(images)
        return config, preprocessing, labels
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json of {files}: {error}") from error


def read_versions(files: CheckpointFiles) -> dict[str, str]:
    """The versions that config.json names (models/version.py); none where an older package wrote it.

    Raises:
        ValueError: there is no config.json, or it is damaged.
    """
    content = _read_content(files)
    return {name: content[name] for name in SAVED if name in content}


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


def check_counts(config: VMoEConfig, weights: Weights) -> None:
    """Refuse a configuration with more blocks or experts than the weights hold, before they are built.

    Raises:
        ValueError: naming the tensor of the last block or expert.
    """
    last_tensors = [f"blocks.{config.depth - 1}.norm1.weight"]
    moe_blocks = moe_numbers(config.moe_blocks, config.depth)
    if moe_blocks:
        first_layer = LAYERS[config.activation][0]
        last_tensors.append(f"blocks.{moe_blocks[-1]}.mlp.experts.{config.moe.num_experts - 1}.{first_layer}.weight")
    for name in last_tensors:
        if name not in weights.names():
            raise ValueError(
                f"{weights.files} lacks {name}: the configuration asks for {config.depth} blocks and "
                f"{config.moe.num_experts} experts, its tensors are {grouped(weights.names())}. Take the config.json "
                f"that was saved with these weights; of a wrapped model, save the state dict of the model itself."
            )


def _read_content(files: CheckpointFiles) -> dict[str, Any]:
    path = files.find("config.json")
    if path is None:
        raise ValueError(f"{files} has no config.json, so it is not a saved V-MoE.")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"config.json of {files} is truncated or not JSON.") from None


def _content(config: VMoEConfig, preprocessing: Preprocessing | None, labels: Sequence[str] | None) -> dict[str, Any]:
    """config.json, without what is not known."""
    values = asdict(config)
    content = {
        "model_type": MODEL_TYPE,
        "architectures": ["VMoEForImageClassification" if config.num_classes else "VMoEModel"],
        **values,
        "preprocessing": preprocessing and preprocessing.to_dict(),
        "labels": list(labels) if labels else None,
        "architecture": ARCHITECTURE,
        "num_features": config.width,
        "global_pool": POOLS[config.pool],
        "label_names": list(labels) if labels else None,
        "model_args": _timm_arguments(values),
        "pretrained_cfg": _timm_pretrained_cfg(config, preprocessing),
        **SAVED,
    }
    # a field of VMoEConfig may be None; what others read is left out then
    return {name: value for name, value in content.items() if value is not None or name in values}


def _timm_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a VMoEConfig as arguments of timm's create_model."""
    arguments = {TIMM_NAMES.get(name, name): value for name, value in values.items() if name not in TIMM_DECIDES}
    arguments["global_pool"] = POOLS[values["pool"]]
    return arguments


def _timm_pretrained_cfg(config: VMoEConfig, preprocessing: Preprocessing | None) -> dict[str, Any]:
    """What timm takes from a checkpoint: its classes, the names of its first and last layer, and its images."""
    pretrained_cfg = {
        "num_classes": config.num_classes,
        "fixed_input_size": not config.dynamic_img_size,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "input_size": [config.in_chans, config.image_size, config.image_size],
    }
    if preprocessing is not None:
        images = preprocessing.to_dict()
        known_to_timm = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        pretrained_cfg |= {name: value for name, value in images.items() if name in known_to_timm}
    return pretrained_cfg


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
