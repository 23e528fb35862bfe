"""Student modules: a stage of the student between stitch layers that speak the teacher's width.

Student module i takes and gives the teacher's border states, (B, T, D_t), except that the first takes images and the
last gives logits, or where there are no classes the teacher's final tokens, through the student's own feature head. At
assembly the stitches are dropped (published default), kept, or folded into one linear map. D_t is the teacher's width,
D_s the student's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..moe.out import Out, inside
from .basis import Basis, Embed, Project, check_width
from .stages import Stage, assemble, shallow_copy, split

KINDS = ("linear", "pca", "tied")
STITCHES = ("drop", "keep", "fold")
FOLDED = 0  # in VMoEConfig.stitch_blocks, in place of the teacher's width


class StudentModule(nn.Module):
    def __init__(self, stage: Stage, pre: nn.Module | None, post: nn.Module | None) -> None:
        super().__init__()
        self.stage = stage
        self.pre = pre
        self.post = post

    def forward(self, x: Tensor, out: Out | None = None) -> Tensor:
        """Images (first) or (B, T, D_t) in; logits (last, with classes) or (B, T, D_t) out.

        What the stage tells beside is left in out["stage"].
        """
        if self.pre is not None:
            x = self.pre(x)
        x = self.stage(x, inside(out, "stage"))
        if self.stage.last and not self.stage.num_classes:
            return self.stage.feature_head(x)
        return x if self.post is None else self.post(x)


def build_student_modules(
    student: VisionTransformer,
    depths: Sequence[int],
    teacher_width: int,
    seed: int = 0,
    kind: str = "linear",
    bases: Sequence[Basis] | None = None,
) -> list[StudentModule]:
    """Split the student (parameters shared with it) and put stitches at its inner borders.

    The stitches of border b depend on `seed` (or `bases`) and b only, so a job that teaches one module starts it like
    every other.

    Args:
        kind: "linear", fresh LayerNorm + Linear (the paper's); "pca", Linear started from the border's principal
            components; "tied", those components as they are.
        bases: per inner border, for "pca" and "tied"; None for a plan that only needs shapes.

    Raises:
        ValueError: depths that do not fit the student, an unknown kind, or a student wider than the teacher where the
            stitches use a basis.
    """
    if kind not in KINDS:
        raise ValueError(f"stitches {kind!r} are not one of {', '.join(KINDS)}.")
    stages = split(student, depths)
    pairs = []
    for border in range(len(stages) - 1):
        if kind == "linear":
            pairs.append(_stitch_pair(teacher_width, student.embed_dim, seed, border))
        else:
            basis = bases[border] if bases else None
            pairs.append(_basis_pair(teacher_width, student.embed_dim, kind, basis))
    # behind the last module and in front of the first there is no stitch
    posts = [post for post, _ in pairs] + [None]
    pres = [None] + [pre for _, pre in pairs]
    return [StudentModule(stage, pre, post) for stage, pre, post in zip(stages, pres, posts)]


def assemble_student(
    modules: Sequence[StudentModule], stitches: str = "drop", states: Sequence[Tensor] | None = None
) -> VisionTransformer:
    """One student from its modules, sharing their parameters; the modules stay usable.

    Args:
        stitches: "drop" leaves the blocks as they are; "keep" puts post-stitch and next pre-stitch in front of each
            border's block, so that the student computes what its modules compute in turn; "fold" puts one linear map
            there. Of stitches without LayerNorm the fold is exact, so "keep" is that fold too; tied stitches cancel
            out, so all three are the same.
        states: per inner border, outputs (..., D_s) of the stage before it, to fit the fold of stitches with LayerNorm.

    Raises:
        ValueError: an unknown `stitches`, modules that do not make one student, or no states where the fold needs them.
    """
    if stitches not in STITCHES:
        raise ValueError(f"stitches {stitches!r} is not one of {', '.join(STITCHES)}.")
    student = assemble([module.stage for module in modules])
    if stitches == "drop":
        return student
    widths = {}
    for border, (before, after) in enumerate(itertools.pairwise(modules)):
        if isinstance(before.post, Embed | nn.Identity):
            continue
        start = after.stage.start
        block = shallow_copy(student.blocks[start])  # the module's own block must not run the stitch twice
        if stitches == "keep" and isinstance(before.post, nn.Sequential):
            block.stitch = nn.Sequential(before.post, after.pre)
            widths[str(start)] = before.post[-1].out_features
        else:
            border_states = states[border] if states is not None else None
            block.stitch = fold(before.post, after.pre, border_states)
            widths[str(start)] = FOLDED
        student.blocks[start] = block
    student.config = replace(student.config, stitch_blocks=widths or None)
    return student


@torch.no_grad()
def fold(post: nn.Module, pre: nn.Module, states: Tensor | None = None) -> nn.Linear:
    """One linear map D_s -> D_s in place of pre(post(z)): exact for two Linears, else a least squares fit on `states`.

    Raises:
        ValueError: stitches with LayerNorm and no states.
    """
    if isinstance(post, nn.Linear) and isinstance(pre, nn.Linear):
        # A2 (A1 z + b1) + b2 = (A2 A1) z + (A2 b1 + b2)
        weight = pre.weight @ post.weight
        bias = pre.weight @ post.bias + pre.bias
    elif states is None:
        raise ValueError("folding stitches with LayerNorm needs states to fit the linear map on.")
    else:
        z = states.reshape(-1, states.shape[-1])
        stitched = pre(post(z)).double()
        z = z.double()
        # min_A |(z - mean z) A^T - (y - mean y)|^2, then b = mean y - A mean z
        center = z.mean(0)
        weight = torch.linalg.lstsq(z - center, stitched - stitched.mean(0)).solution.T
        bias = (stitched.mean(0) - weight @ center).float()
        weight = weight.float()
    folded = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    folded.weight.copy_(weight)
    folded.bias.copy_(bias)
    return folded


def _stitch_pair(teacher_width: int, student_width: int, seed: int, border: int) -> tuple[nn.Module, nn.Module]:
    """(post-stitch of module `border`, pre-stitch of the module after it)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + border)
    return stitch(student_width, teacher_width, generator), stitch(teacher_width, student_width, generator)


@torch.no_grad()
def _basis_pair(teacher_width: int, student_width: int, kind: str, basis: Basis | None) -> tuple[nn.Module, nn.Module]:
    """The same in the basis of a border; without one, only the shapes are right."""
    turns = student_width != teacher_width if basis is None else basis.turns(student_width)
    if kind == "tied" and not turns:
        return nn.Identity(), nn.Identity()
    if basis is None:
        check_width(teacher_width, student_width)
        mean = torch.zeros(teacher_width)
        directions = torch.zeros(teacher_width, student_width)
    else:
        mean, directions = basis.leading(student_width)
    if kind == "tied":
        return Embed(mean, directions), Project(mean, directions)
    # post(z) = U z + mean, pre(h) = U^T (h - mean)
    post = nn.Linear(student_width, teacher_width)
    pre = nn.Linear(teacher_width, student_width)
    post.weight.copy_(directions)
    post.bias.copy_(mean)
    pre.weight.copy_(directions.T)
    pre.bias.copy_(-directions.T @ mean)
    return post, pre


def stitch(width_in: int, width_out: int, generator: torch.Generator | None = None) -> nn.Sequential:
    """LayerNorm and Linear from one width to the other; weights drawn like the ViT's own Linear layers (std 0.02)."""
    layers = nn.Sequential(nn.LayerNorm(width_in), nn.Linear(width_in, width_out))
    nn.init.trunc_normal_(layers[1].weight, std=0.02, generator=generator)
    nn.init.zeros_(layers[1].bias)
    return layers
