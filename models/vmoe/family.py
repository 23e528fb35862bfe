"""V-MoE as a family of students: what the trainer asks of each (trainer/teaching/families.py)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import saved
from ..files.hub import CheckpointFiles
from ..flops import forward_flops, num_tokens
from ..forms import StudentForm
from ..modules.basis import Basis
from ..modules.stitch import STITCHES, StudentModule, assemble_student, build_student_modules
from ..modules.tokens import Rope, TokenLayout
from ..moe.layer import MoEConfig, routed_layers
from ..preprocessing import Preprocessing
from .config import VMoEConfig, decode_variant
from .files import FORMAT
from .model import VMoE, load_expert_parallel

__all__ = [
    "ALIGNED",
    "ENDS",
    "STITCHES",
    "assemble",
    "build",
    "config",
    "describe",
    "forms",
    "load",
    "modules",
    "read_config",
    "rivals",
    "write_config",
]
ALIGNED = True
ENDS = 0
EXPERTS_PER_TOKEN = (1, 2, 4)  # of the forms that are measured
SIZES = ("patch_size", "width", "depth", "heads", "mlp_dim")


def config(
    section: Mapping[str, Any],
    *,
    num_classes: int,
    drop_path: float,
    image_size: int,
    in_chans: int,
    tokens: TokenLayout,
    seed: int,
    teacher_width: int = 0,
) -> VMoEConfig:
    """The V-MoE that section student of a recipe asks for.

    Args:
        section: plain values of the recipe's section student.
        tokens: of the teacher, or of the model that training starts from; the student's where the recipe leaves them
            open.
        teacher_width: of the teacher whose final tokens a student without classes learns.

    Raises:
        ValueError: an unknown variant, or sizes that do not fit together.
    """
    sizes = decode_variant(section["variant"]) if section["variant"] else {}
    sizes |= {name: section[name] for name in SIZES if section[name] is not None}
    class_token = section["class_token"]
    if class_token is None:
        class_token = tokens.class_token
    reg_tokens = section["reg_tokens"]
    if reg_tokens is None:  # as many prefix tokens as the teacher has
        reg_tokens = max(tokens.prefix_tokens - int(class_token), 0)
    rope = section["rope"]
    if rope is None:
        rope = tokens.rotary
    asked = {
        "image_size": image_size,
        "in_chans": in_chans,
        "num_classes": num_classes,
        "moe_blocks": section["moe_blocks"],
        "moe": MoEConfig(**section["moe"]),
        "gelu": section["gelu"],
        "pool": section["pool"] if class_token else "mean",
        "class_token": class_token,
        "reg_tokens": reg_tokens,
        "rope": (tokens.rope or Rope()) if rope else None,
        "swiglu": section["swiglu"],
        "layer_scale": section["layer_scale"],
        "drop_rate": section["drop_rate"],
        "drop_path_rate": drop_path,
        "seed": seed,
    }
    student = VMoEConfig(**(sizes | asked))  # the recipe's routing, also where a variant brings its own
    if num_classes or student.width == teacher_width:
        return student
    return replace(student, feature_width=teacher_width)


def build(config: VMoEConfig) -> VMoE:
    """A V-MoE with new weights, drawn from config.seed."""
    return VMoE(config)


def modules(
    student: VMoE,
    depths: Sequence[int],
    teacher_width: int,
    seed: int,
    stitches: str,
    bases: Sequence[Basis] | None,
    **_: Any,
) -> list[StudentModule]:
    """See build_student_modules."""
    return build_student_modules(student, depths, teacher_width, seed, stitches, bases)


def assemble(modules: Sequence[StudentModule], stitches: str, states: Sequence[Tensor] | None) -> VMoE:
    """See assemble_student."""
    return assemble_student(modules, stitches, states)


def forms(student: VMoE) -> list[StudentForm]:
    """A V-MoE with 1, 2 and 4 experts per token, and as many as it was trained with; none where it has no experts."""
    if not routed_layers(student):
        return []
    trained = student.config.moe.k
    found = []
    for k in sorted({*EXPERTS_PER_TOKEN, trained}):
        if k <= student.config.moe.num_experts:
            prepare = functools.partial(student.set_k, k)
            found.append(StudentForm(f"k = {k}", student, prepare, trained=k == trained))
    return found


def rivals(student: VMoE) -> dict[str, VMoE]:
    """A dense ViT that costs as much per image."""
    return {"dense ViT of equal FLOPs": dense_of_equal_flops(student)}


def describe(student: VMoE, images: Tensor) -> dict[str, Any]:
    """What there is to see of a V-MoE, its routing, comes out of its evaluation."""
    return {}


def read_config(files: CheckpointFiles) -> tuple[VMoEConfig, Preprocessing | None, list[str] | None]:
    """Configuration, preprocessing and class names of a saved V-MoE.

    Raises:
        ValueError: not one of ours.
    """
    return saved.read(FORMAT, files)


def write_config(folder: Path, config: VMoEConfig, preprocessing: Preprocessing, labels: Sequence[str]) -> None:
    """Write config.json alone: with weights beside it the folder is a V-MoE."""
    saved.write_config(folder, saved.content(FORMAT, config, preprocessing, labels))


def load(source: str, *, config: VMoEConfig | None = None, ep_size: int = 1, ep_rank: int = 0) -> VMoE:
    """A saved V-MoE in evaluation mode, with the experts of one rank only where ep_size is above 1.

    Raises:
        ValueError: see VMoE.from_pretrained and load_expert_parallel.
    """
    if ep_size == 1:
        return VMoE.from_pretrained(source, config=config)
    return load_expert_parallel(source, ep_size, ep_rank, config=config)


def dense_of_equal_flops(student: VMoE) -> VMoE:
    """A new model without experts, as deep and as wide, whose MLPs cost what the student's routers and k experts do.

    Its FLOPs per image are the student's but for less than half of what one hidden unit costs.
    """
    config = student.config
    wanted = forward_flops(student, num_tokens(student))
    sizes = []
    for mlp_dim in (1, 2):
        with torch.device("meta"):
            model = VMoE(replace(config, moe_blocks="none", mlp_dim=mlp_dim, stitch_blocks=None))
        sizes.append(forward_flops(model, num_tokens(model)))
    # cost is linear in the hidden width
    mlp_dim = 1 + round((wanted - sizes[0]) / (sizes[1] - sizes[0]))
    return VMoE(replace(config, moe_blocks="none", mlp_dim=max(1, mlp_dim), stitch_blocks=None))
