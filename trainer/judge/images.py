"""The images of an evaluation: which split is measured, and which one is learned from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models.files.places import expanded
from trainer.config.data import BUILT_IN, DataConfig
from trainer.config.knobs import close
from trainer.config.tasks import TaskSpec
from trainer.data.base import ImageSource
from trainer.data.hub_splits import load_splits
from trainer.data.sources import open_source, source_of
from trainer.data.tars import shard_splits
from trainer.data.walk import SPLIT_NAMES, is_picture_folder, other_names


def measured_images(data: DataConfig, split: str = "") -> ImageSource:
    """The images an evaluation is made on, all of them: of a set that has one split, that one.

    Args:
        split: its name; empty = the validation split, else the test split, else the only one, else the folder itself
            where its folders are the classes.

    Raises:
        ValueError: no such split, or several and none of them for validation or test.
    """
    names = _split_names(data)
    if names is None:
        return open_source(data, "train" if split and split == data.train_split else "val")
    if not names and not split:
        return open_source(replace(data, train_split="", val_split="", val_share=0), "val")
    name = _chosen(names, split or _of_validation(data, names), data)
    return open_source(replace(data, train_split=name, val_split=name, val_share=0), "val")


def learned_and_measured(spec: TaskSpec, default: DataConfig) -> tuple[ImageSource, ImageSource]:
    """Training and validation images, as a run has them; with split=NAME those are the images measured.

    Raises:
        ValueError: what open_source raises.
    """
    data = spec.data(default)
    if spec.settings.split:
        data = replace(data, val_split=spec.settings.split)
    return open_source(data, "train"), open_source(data, "val")


def _split_names(data: DataConfig) -> list[str] | None:
    """Splits of a folder or hub set; none where class folders lie in the folder itself; None of what is built in."""
    kind = source_of(data)
    if kind in BUILT_IN:
        return None
    root = Path(expanded(data.path))
    if not root.is_dir():
        return list(load_splits(data.path, data.config)[0])
    if kind == "shards":
        return [name for name in shard_splits(root, data) if name]
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if kind == "hub" and not is_picture_folder(root, data.train_split):
        return list(load_splits(data.path, data.config)[0])
    splits = [name for name in names if any(name.lower() in row for row in SPLIT_NAMES)]
    return splits or [name for name in names if name in (data.train_split, data.val_split)]


def _of_validation(data: DataConfig, names: list[str]) -> str:
    if data.val_split in names:
        return data.val_split
    for wanted in (data.val_split, "validation", "test"):
        meant = [wanted] if wanted in names else other_names(wanted, names)
        if len(meant) == 1:
            return meant[0]
    if len(names) == 1:
        return names[0]
    raise ValueError(f"{data.path} has splits {', '.join(names)}, none of them for validation or test: give split=NAME")


def _chosen(names: list[str], split: str, data: DataConfig) -> str:
    if split in names:
        return split
    meant = other_names(split, names)
    if len(meant) == 1:
        return meant[0]
    raise ValueError(f"split {split!r} is not in {data.path}. {close(split, names)}")
