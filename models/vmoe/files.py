"""The directory a V-MoE is published as: config.json and safetensors weights, in one file or in shards.

config.json is read by three: this project (the fields of VMoEConfig, `preprocessing`, `labels`), timm
(models/registry.py: `architecture`, `model_args`, `pretrained_cfg`, ...) and transformers (models/auto.py:
`model_type`, `architectures`).
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
from ..preprocessing import Preprocessing
from .config import MODEL_TYPE, POOLS, VMoEConfig, moe_numbers

ARCHITECTURE = "vmoe"  # timm's name of a V-MoE that is built from its arguments alone
TIMM_NAMES = {"image_size": "img_size", "width": "embed_dim", "heads": "num_heads", "pool": "global_pool",
              "drop_rate": "proj_drop_rate"}  # our name -> timm's  # fmt: skip
# in config.json for timm or written by transformers' configuration; nothing of it changes what the model computes
FOR_OTHERS = ("architecture", "num_features", "global_pool", "label_names", "model_args", "pretrained_cfg",
              "architectures", "transformers_version", "dtype", "id2label", "label2id", "problem_type")  # fmt: skip
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
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    # meta tensors: those of a flat buffer share its storage and would all be kept in one shard
    shapes = {name: torch.empty_like(value, device="meta") for name, value in weights.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    beside = {}
    for name, tensors in split.filename_to_tensors.items():
        beside[name] = directory / f"{name}.tmp"
        save_file({tensor: weights[tensor] for tensor in tensors}, beside[name], metadata={"format": "pt"})
    texts = {"config.json": _content(config, preprocessing, labels)}
    if split.is_sharded:
        texts = {INDEX: {"metadata": split.metadata, "weight_map": split.tensor_to_filename}} | texts
    for name, values in texts.items():
        beside[name] = directory / f"{name}.tmp"
        beside[name].write_text(json.dumps(values, indent=2) + "\n")
    for path in beside.values():
        _flush(path)
    (directory / "config.json").unlink(missing_ok=True)
    for path in directory.iterdir():
        if WEIGHT_FILES.fullmatch(path.name) and path not in beside.values():
            path.unlink()
    for name, path in beside.items():
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
        ValueError: there is none, it is not that of a V-MoE, or it makes no model.
    """
    if (path := files.find("config.json")) is None:
        raise ValueError(f"{files} has no config.json, so it is not a saved V-MoE.")
    try:
        content = dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"config.json of {files} is truncated or not JSON.") from None
    if (model_type := content.pop("model_type", None)) != MODEL_TYPE:
        raise ValueError(f"{files} is a {model_type!r}, not a {MODEL_TYPE!r}; load teachers with load_teacher.")
    preprocessing, labels = content.pop("preprocessing", None), content.pop("labels", None)
    try:
        config = VMoEConfig.from_dict({name: value for name, value in content.items() if name not in FOR_OTHERS})
        return config, None if preprocessing is None else Preprocessing.from_dict(preprocessing), labels
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json of {files}: {error}") from error


def fill(model: nn.Module, weights: Weights, needed: Callable[[str], bool]) -> None:
    """Give the parameters of a model on the meta device the values of `weights`; those not needed stay as they are.

    Raises:
        ValueError: weights that do not fit the model, or are no finite floats.
    """
    expected = model.state_dict()
    weights.check(expected)
    model.load_state_dict({name: weights.read(name) for name in expected if needed(name)}, strict=False, assign=True)


def check_counts(config: VMoEConfig, weights: Weights) -> None:
    """Refuse a configuration with more blocks or experts than the weights hold, before they are built.

    Raises:
        ValueError: naming the tensor of the last block or expert.
    """
    last = [f"blocks.{config.depth - 1}.norm1.weight"]
    if blocks := moe_numbers(config.moe_blocks, config.depth):
        last.append(f"blocks.{blocks[-1]}.mlp.experts.{config.moe.num_experts - 1}.fc1.weight")
    for name in last:
        if name not in weights.names():
            raise ValueError(
                f"{weights.files} lacks {name}: the configuration asks for {config.depth} blocks and "
                f"{config.moe.num_experts} experts, the weights hold fewer."
            )


def _content(config: VMoEConfig, preprocessing: Preprocessing | None, labels: Sequence[str] | None) -> dict[str, Any]:
    """config.json, without what is not known."""
    values = asdict(config)
    images = {"input_size": [config.in_chans, config.image_size, config.image_size]}
    if preprocessing is not None:
        kept = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        images |= {name: value for name, value in preprocessing.to_dict().items() if name in kept}
    given_by_others = ("num_classes", "drop_path_rate", "drop_rate", "seed")  # the caller of timm decides on the last 3
    content = {
        "model_type": MODEL_TYPE,
        "architectures": ["VMoEForImageClassification"],
        **values,
        "preprocessing": preprocessing and preprocessing.to_dict(),
        "labels": labels and list(labels),
        "architecture": ARCHITECTURE,
        "num_features": config.width,
        "global_pool": POOLS[config.pool],
        "label_names": labels and list(labels),
        "model_args": {TIMM_NAMES.get(name, name): POOLS[value] if name == "pool" else value
                       for name, value in values.items() if name not in given_by_others},
        "pretrained_cfg": {"num_classes": config.num_classes, "fixed_input_size": not config.dynamic_img_size,
                           "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head", **images},
    }  # fmt: skip
    return {name: value for name, value in content.items() if value is not None or name in values}


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
