"""Where a detector's backbone comes from: a V-MoE of ours, or any vision transformer that load_teacher reads.

What it was built as travels in the detector's config.json (`Made`), so that a saved detector is built again without it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import nn

from ..files.checks import read_object
from ..files.hub import CheckpointFiles
from ..nac.config import MODEL_TYPE as NAC
from ..preprocessing import Preprocessing
from ..teacher.load import load_teacher
from ..vmoe.config import MODEL_TYPE as VMOE
from ..vmoe.config import VMoEConfig
from ..vmoe.model import VMoE


@dataclass(frozen=True)
class Made:
    """What a backbone is, in plain values.

    Attributes:
        kind: vmoe, timm or transformers.
        config: a VMoEConfig; timm's architecture and model_args; or the config.json of transformers.
    """

    kind: str
    config: dict[str, Any]

    def build(self, seed: int = 0) -> nn.Module:
        """The same model with new weights.

        Raises:
            ValueError: a kind that this version does not know, or settings that make no model.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.kind == "vmoe":
                return VMoE(VMoEConfig.from_dict(self.config | {"seed": seed}))
            if self.kind == "timm":
                return timm.create_model(self.config["architecture"], **self.config["model_args"])
            if self.kind == "transformers":
                return _of_transformers(self.config)
        raise ValueError(f"backbone kind {self.kind!r} is not known; use one of vmoe, timm, transformers.")


@dataclass
class Backbone:
    """A loaded backbone."""

    vit: nn.Module
    preprocessing: Preprocessing
    made: Made
    source: str  # directory, or hub id with the commit it resolved to


def load_backbone(source: str, revision: str | None = None) -> Backbone:
    """A vision transformer with its weights, to train or to freeze.

    Images are routed alone in a V-MoE (images_per_group 1), whatever it was trained with: those of a batch have other
    numbers of tokens.

    Args:
        source: directory, or hub id ("owner/name", "owner/name@revision"): a V-MoE of ours, or what load_teacher reads.

    Raises:
        ValueError: nothing there, a NAC, or whatever load_teacher refuses.
    """
    files = CheckpointFiles(source, revision)
    path = files.find("config.json")
    content = {} if path is None else read_object(path, files)
    if content.get("model_type") == NAC:
        raise ValueError(f"{files} is a NAC, which has no feature maps: a detector needs a V-MoE or another ViT.")
    if content.get("model_type") == VMOE:
        vit = VMoE.from_pretrained(files)
        if vit.preprocessing is None:
            raise ValueError(f"config.json of {files} has no preprocessing: how are its images normalised?")
        route_alone(vit)
        return Backbone(vit, vit.preprocessing, Made("vmoe", asdict(vit.config)), str(files))
    teacher = load_teacher(source, revision=revision)
    vit = teacher.model.requires_grad_(True)
    if "architecture" in content:
        arguments = content.get("model_args") or {}
        made = Made("timm", {"architecture": content["architecture"], "model_args": arguments})
    else:
        made = Made("transformers", content)
    return Backbone(vit, teacher.preprocessing, made, teacher.source)


def route_alone(vit: VMoE) -> None:
    """Let every image be routed by itself, in place."""
    values = asdict(vit.config)
    values["moe"] |= {"images_per_group": 1}
    vit.config = VMoEConfig.from_dict(values)
    for module in vit.modules():
        if hasattr(module, "route_images"):
            module.config = vit.config.moe


def set_drop_path(vit: nn.Module, rate: float) -> None:
    """Stochastic depth of the blocks, rising linearly to `rate`, in place."""
    depth = len(vit.blocks)
    for number, block in enumerate(vit.blocks):
        of_block = rate * number / max(1, depth - 1)
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(of_block) if of_block else nn.Identity())


def _of_transformers(config: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    from ..teacher.convert import to_timm

    values = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    original = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **values))
    return to_timm(original.eval())
