"""Student modules: a stage of the student between stitch layers that speak the teacher's width.

Student module i takes and gives the teacher's border states, (B, T, D_t), except that the first takes images and the
last gives logits. At assembly the stitches are dropped (published default) or kept. D_t is the teacher's width, D_s the
student's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.modules import Stage, assemble, shallow_copy, split

if TYPE_CHECKING:  # vmoe.py builds kept stitches with this file
    from models.vmoe import VMoE

STITCHES = ("drop", "keep")


class StudentModule(nn.Module):
    def __init__(self, stage: Stage, pre: nn.Module | None, post: nn.Module | None) -> None:
        super().__init__()
        self.stage, self.pre, self.post = stage, pre, post

    def forward(self, x: Tensor) -> Tensor:
        """Images (first) or (B, T, D_t) in; logits (last) or (B, T, D_t) out."""
        if self.pre is not None:
            x = self.pre(x)
        x = self.stage(x)
        return x if self.post is None else self.post(x)


def build_student_modules(
    student: VMoE, depths: Sequence[int], teacher_width: int, seed: int = 0
) -> list[StudentModule]:
    """Split the student (parameters shared with it) and put fresh stitches at its inner borders.

    The stitches of border b depend on `seed` and b only, so a job that teaches one module starts it like every other.

    Raises:
        ValueError: depths that do not fit the student.
    """
    stages = split(student, depths)
    pairs = [_stitch_pair(teacher_width, student.embed_dim, seed, border) for border in range(len(stages) - 1)]
    posts = [post for post, _ in pairs] + [None]
    pres = [None] + [pre for _, pre in pairs]
    return [StudentModule(stage, pre, post) for stage, pre, post in zip(stages, pres, posts)]


def assemble_student(modules: Sequence[StudentModule], stitches: str = "drop") -> VMoE:
    """One student from its modules, sharing their parameters; the modules stay usable.

    Args:
        stitches: "drop" leaves the blocks as they are; "keep" puts post-stitch and next pre-stitch in front of each
            border's block, so that the student computes what its modules compute in turn.

    Raises:
        ValueError: an unknown `stitches`, or modules that do not make one student.
    """
    if stitches not in STITCHES:
        raise ValueError(f"stitches {stitches!r} is not one of {', '.join(STITCHES)}.")
    student = assemble([module.stage for module in modules])
    if stitches == "keep":
        widths = {}
        for before, after in itertools.pairwise(modules):
            start = after.stage.start
            block = shallow_copy(student.blocks[start])  # the module's own block must not run the stitch twice
            block.stitch = nn.Sequential(before.post, after.pre)
            student.blocks[start] = block
            widths[str(start)] = before.post[-1].out_features
        student.config = replace(student.config, stitch_blocks=widths)
    return student


def _stitch_pair(teacher_width: int, student_width: int, seed: int, border: int) -> tuple[nn.Module, nn.Module]:
    """(post-stitch of module `border`, pre-stitch of the module after it)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + border)
    return stitch(student_width, teacher_width, generator), stitch(teacher_width, student_width, generator)


def stitch(width_in: int, width_out: int, generator: torch.Generator | None = None) -> nn.Sequential:
    """LayerNorm and Linear from one width to the other; weights drawn like the ViT's own Linear layers (std 0.02)."""
    layers = nn.Sequential(nn.LayerNorm(width_in), nn.Linear(width_in, width_out))
    nn.init.trunc_normal_(layers[1].weight, std=0.02, generator=generator)
    nn.init.zeros_(layers[1].bias)
    return layers
