"""The sizes of a student that its recipe leaves to the teacher, and the patches that have to be the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from models.experts.dense_block import read_block
from models.moe.expert import SWIGLU
from trainer.config.student import LIKE_TEACHER, StudentConfig

SIZES = ("patch_size", "width", "depth", "heads", "mlp_dim")


def like_teacher(student: StudentConfig, teacher: nn.Module, modules: int) -> StudentConfig:
    """Section student with numbers in place of what it leaves to the teacher: its patches, or with variant teacher all.

    Variant teacher has half the teacher's blocks (rounded up, and one for each module at least): a token goes through
    two experts in a block of the student, so it costs about what the teacher does. Its MLPs and its pooling are of the
    teacher's kind, where a V-MoE has them.

    Raises:
        ValueError: sizes that do not fit to those that are set, or blocks that do not say how many heads they have and
            how wide their MLP is.
    """
    if student.variant != LIKE_TEACHER:
        return _with_patches(student, patch_of(teacher))
    block = teacher.blocks[0]
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    if not hasattr(attention, "num_heads") or not hasattr(mlp, "fc2"):
        raise ValueError(
            f"student.variant is {LIKE_TEACHER!r}, but blocks of kind {type(block).__name__} have no heads and MLP to "
            "follow: set student.variant=S, B or L"
        )
    sizes = {
        "patch_size": patch_of(teacher),
        "width": teacher.embed_dim,
        "depth": max(modules, (len(teacher.blocks) + 1) // 2),
        "heads": attention.num_heads,
        "mlp_dim": mlp.fc2.in_features,  # of a gated MLP too: what its gate leaves of fc1
    }
    if getattr(teacher, "global_pool", "") == "avg":
        student = replace(student, pool="mean")
    return replace(_filled(student, sizes), **_kind_of_mlp(block))


def _kind_of_mlp(block: nn.Module) -> dict[str, Any]:
    """The settings of section student that make MLPs like a block's; none where a V-MoE has no such block."""
    try:
        activation = read_block(block, 0).activation
    except (ValueError, AttributeError):  # student.init says what stands in the way, where anything starts from it
        return {}
    return {"swiglu": True} if activation == SWIGLU else {"gelu": activation}


def like_saved(student: StudentConfig, saved: Any) -> StudentConfig:
    """The same for a student that starts from a saved one, whose configuration has the sizes by the same names."""
    if student.variant != LIKE_TEACHER:
        return _with_patches(student, saved.patch_size)
    return _filled(student, {name: getattr(saved, name) for name in SIZES})


def _with_patches(student: StudentConfig, patch_size: int) -> StudentConfig:
    if student.patch_size is not None or "/" in student.variant:
        return student
    variant = f"{student.variant}/{patch_size}" if student.variant else ""
    return replace(student, variant=variant, patch_size=patch_size)


def _filled(student: StudentConfig, sizes: Mapping[str, int]) -> StudentConfig:
    left_open = {name: size for name, size in sizes.items() if getattr(student, name) is None}
    return replace(student, variant="", **left_open)


def patch_of(teacher: nn.Module) -> int:
    """Side of a teacher's patches, pixels."""
    return teacher.patch_embed.patch_size[0]


def check_patches(student: StudentConfig, teacher: nn.Module, source: str, image_size: int) -> None:
    """Refuse a student that cuts its images into other patches than the teacher: modules would meet other tokens.

    Args:
        student: with numbers in place of what it left open.
        source: of the teacher, for the message.
        image_size: of teacher and student, pixels.

    Raises:
        ValueError: naming both, and what fits.
    """
    patch = patch_size(student)
    expected = patch_of(teacher)
    if patch in (None, expected):
        return
    down, across = teacher.patch_embed.grid_size
    raise ValueError(
        f"student.patch_size is {patch}, but the teacher {source} cuts images of {image_size} pixels into {down} x "
        f"{across} patches of {expected}, and both must see the same patches: set student.patch_size={expected}, or "
        "leave it null with a student.variant that has no patch size (B in place of B/16), which takes the teacher's"
    )


def patch_size(student: StudentConfig) -> int | None:
    """Side of a student's patches in pixels; None where the variant is none (the student's family says so)."""
    if student.patch_size is not None:
        return student.patch_size
    text = student.variant.partition("/")[2]
    return int(text) if text.isdecimal() else None
