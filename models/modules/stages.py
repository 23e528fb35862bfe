"""Split a vision transformer into N module stages and put stages back together, sharing every parameter.

A stage is the model itself, shallowly copied, that keeps only its own parts: timm's own methods (positions, pooling,
heads, of whatever subclass) keep serving, so running the stages in turn equals the model to the bit. State-dict keys of
a stage are those of the whole model; blocks carry global numbers. What makes positions for every block (a rotary
embedding, a relative bias shared by the blocks) is a part of the first stage that the others borrow.
B images, T tokens, D width, C classes.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..moe.out import Out, inside
from ..moe.routing import Decided
from .positions import Positions, block_positions, embed, learned_per_block

# Parts before the blocks; "blocks" is shared out and whatever else a model has comes after them (norm, pooling, heads).
EMBEDDING_PARTS = frozenset(
    {"patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre"}
)
# Parts that make what every block takes of positions. Some learn, so one state dict has them, the first stage's.
POSITION_PARTS = ("rope", "rel_pos_bias")


class Stage(nn.Module):
    """Blocks start..stop-1 of a model; the first stage owns the embedding, the last one the norm and the head.

    Made by `split` only, as a subclass of (Stage, class of the model).
    """

    start: int
    stop: int
    first: bool
    last: bool
    grid: tuple[int, int]  # patches down and across
    borrowed: dict[str, nn.Module]  # POSITION_PARTS of a stage that is not the first: no parts of it, the first's
    grad_checkpointing: bool  # recompute each block's activations in backward instead of keeping them

    def forward(self, x: Tensor, out: Out | None = None, states: Collection[int] = ()) -> Tensor:
        """Images (B, C, H, W) in when first, else tokens (B, T, D); logits (B, C) out when last, else tokens.

        The last stage of a model without classes gives its normalised tokens (B, T, D), not pooled.

        Args:
            out, states: see run_blocks.
        """
        if self.first:
            x = embed(self, x)
        x = run_blocks(self.blocks, x, self.grad_checkpointing, out, states, positions=self.positions())
        if not self.last:
            return x
        x = self.norm(x)
        return self.forward_head(x) if self.num_classes else x

    def positions(self) -> Positions:
        """What its blocks take beside their tokens, by their number."""
        parts = {name: self.borrowed.get(name, getattr(self, name, None)) for name in POSITION_PARTS}
        return block_positions(**parts, grid=self.grid, numbers=self.blocks)

    @property
    def pools(self) -> bool:
        """Whether it pools its tokens, for the head; the other stages have no pooling, or leave it unused."""
        return self.last and self.num_classes > 0

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stage":
        """What `to`, `cuda` and the like do: to the borrowed parts too, so that a stage can be moved on its own."""
        for part in self.borrowed.values():
            part._apply(fn)
        return super()._apply(fn, recurse)


def run_blocks(
    blocks: nn.ModuleDict | Mapping[str, nn.Module],
    x_BTD: Tensor,
    recompute: bool,
    out: Out | None = None,
    states: Collection[int] = (),
    *,
    positions: Positions = MappingProxyType({}),
    **masks: Any,
) -> Tensor:
    """Blocks one after another, by their number in the whole model; (B, T, D) in and out.

    Args:
        recompute: each block's activations in backward instead of keeping them, but for where its tokens went.
        out: what block n tells is left in out["blocks"]["n"]: "mlp" by an MoE block, and "state".
        states: numbers of the blocks whose output (B, T, D) is left there as "state"; others than these are ignored.
        positions: what single blocks take, by their number.
        masks: of attention, for every block.
    """
    recompute = recompute and torch.is_grad_enabled()
    for number, block in blocks.items():
        arguments = {**masks, **positions.get(number, {})}
        if recompute:
            # a block run on its own never sees timm's checkpointing flag, which lives in forward_features
            x_BTD, told = checkpoint(_run_block, block, x_BTD, arguments, {}, use_reentrant=False)
        else:
            x_BTD, told = _run_block(block, x_BTD, arguments)
        if int(number) in states:
            told["state"] = x_BTD
        if out is not None:
            inside(out, "blocks")[number] = told
    return x_BTD


def _run_block(
    block: nn.Module, x_BTD: Tensor, arguments: dict[str, Any], decided: Decided | None = None
) -> tuple[Tensor, Out]:
    """Output of a block and what it tells: new at every call, as backward may run the block once more.

    Args:
        decided: what the first call of the two decides, for the second; see models.moe.routing.once.
    """
    told: Out = {}
    if getattr(block, "routes", False):
        if decided is not None:
            inside(told, "mlp")["decided"] = decided
        return block(x_BTD, told, **arguments), told
    return block(x_BTD, **arguments), told


def split(model: VisionTransformer, depths: Sequence[int]) -> list[Stage]:
    """Cut `model` into stages of `depths` blocks that share its parameters.

    Raises:
        ValueError: a depth below 1, or depths that do not add up to the number of blocks.
    """
    blocks = list(model.blocks)
    if not depths or min(depths) < 1 or sum(depths) != len(blocks):
        raise ValueError(
            f"depths {list(depths)} do not split {len(blocks)} blocks: each must be at least 1 "
            f"and together they must make {len(blocks)} (they make {sum(depths)})."
        )
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [_stage(model, blocks, start, start + depth) for start, depth in zip(starts, depths)]


def assemble(stages: Sequence[Stage]) -> VisionTransformer:
    """Put stages back into one model of the class they were split from; parameters stay shared with the stages.

    Raises:
        ValueError: stages of different classes, out of order, or not from the first block to the last.
    """
    _check_order(stages)
    # plain attributes from the last stage: those that change after the split belong to the head (num_classes)
    model = shallow_copy(stages[-1], type(stages[-1]).__bases__[1])
    for name in ("start", "stop", "first", "last", "grid", "borrowed"):
        delattr(model, name)
    parts_of_last = dict(model._modules)
    parts_of_first = (*EMBEDDING_PARTS, *POSITION_PARTS)
    model._modules = {name: part for name, part in stages[0]._modules.items() if name in parts_of_first}
    model._parameters = {**stages[0]._parameters, **model._parameters}
    model._buffers = {**stages[0]._buffers, **model._buffers}
    model.blocks = nn.Sequential(*(block for stage in stages for block in stage.blocks.values()))
    for name, part in parts_of_last.items():
        model._modules.setdefault(name, part)
    return model


def with_blocks(model: VisionTransformer, numbers: Sequence[int]) -> VisionTransformer:
    """The same model with these of its blocks, everything shared with it.

    Where a rotary embedding has frequencies for every block, the result has copies of those of its blocks.
    """
    result = shallow_copy(model)
    result.blocks = nn.Sequential(*(model.blocks[number] for number in numbers))
    rope = getattr(model, "rope", None)
    if learned_per_block(rope):
        result.rope = shallow_copy(rope)
        result.rope.depth = len(numbers)
        # (2, blocks, heads, frequencies)
        result.rope.freqs = nn.Parameter(rope.freqs.detach()[:, list(numbers)], rope.freqs.requires_grad)
    return result


def set_drop_path(model: VisionTransformer, rate: float) -> None:
    """Stochastic depth in place, rising linearly over the blocks from 0 to `rate` (Huang et al. 2016, as in timm)."""
    for i, block in enumerate(model.blocks):
        share = rate * i / max(len(model.blocks) - 1, 1)
        block.drop_path1 = DropPath(share) if share else nn.Identity()
        block.drop_path2 = DropPath(share) if share else nn.Identity()


def shallow_copy(module: nn.Module, cls: type | None = None) -> nn.Module:
    """A module of its own (parts can be set and deleted) that shares parts and parameters; of class `cls` if given."""
    result = copy.copy(module)
    for name, value in vars(module).items():
        # torch's own registries (parts, parameters, hooks): left shared, setting one here would write into both modules
        if name.startswith("_") and isinstance(value, dict | set):
            vars(result)[name] = value.copy()
    if cls is not None:
        result.__class__ = cls
    return result


def _stage(model: VisionTransformer, blocks: list[nn.Module], start: int, stop: int) -> Stage:
    stage = shallow_copy(model, _stage_class(type(model)))
    stage.start = start
    stage.stop = stop
    stage.first = start == 0
    stage.last = stop == len(blocks)
    stage.grid = tuple(model.patch_embed.grid_size)
    stage.borrowed = {}
    if not stage.first:
        stage.borrowed = {name: part for name, part in model._modules.items() if name in POSITION_PARTS}
    for parts in (stage._parameters, stage._modules, stage._buffers):
        for name in list(parts):
            of_first = name in EMBEDDING_PARTS or name in POSITION_PARTS
            keeps = stage.first if of_first else stage.last
            if name != "blocks" and not keeps:
                del parts[name]
    stage.blocks = nn.ModuleDict({str(i): blocks[i] for i in range(start, stop)})
    return stage


@functools.cache
def _stage_class(model_class: type[VisionTransformer]) -> type[Stage]:
    return type(f"{model_class.__name__}Stage", (Stage, model_class), {"__module__": __name__})


def _check_order(stages: Sequence[Stage]) -> None:
    spans = [(stage.start, stage.stop) for stage in stages]
    joined = all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    if not (stages and stages[0].first and stages[-1].last and joined):
        raise ValueError(
            f"stages of blocks {spans} do not make one model: expected them in order, each starting where the one "
            f"before stops, the first with the embedding and the last with the head."
        )
    classes = {type(stage).__name__ for stage in stages}
    if len(classes) > 1:
        raise ValueError(f"stages of different models cannot be assembled: got {sorted(classes)}.")
