"""What the image size of a teacher costs, and whether anybody would want it."""

from __future__ import annotations

import statistics

from models.flops import forward_flops, num_tokens
from models.memory import activation_bytes
from trainer.context import Run
from trainer.data.base import ImageSource

USUAL = (224, 384)  # pixels; ViTs are trained and fine-tuned at these
DEAR = 2.0  # times the tokens of the first of them: a size that nobody asked for is warned about
LOOKED_AT = 16  # pictures whose size is read
BLOWN_UP = 2.0  # times their size: from here on small pictures are worth a line


def cost(run: Run) -> str:
    """FLOPs and activations of an image at the teacher's size, and at usual ones where the teacher is given."""
    own = _cost(run, run.teacher.preprocessing.image_size)
    lines = [f"an image is {own} of activations kept in training a model of this size (float32)"]
    if run.recipe.teacher.source:
        lines += [f"with teacher.image_size={size} {_cost(run, size)}" for size in _others(run)]
    return "; ".join(lines)


def doubts(run: Run) -> list[str]:
    """What a person should know of the size before paying for it, a line each."""
    found = []
    size, tokens = run.teacher.preprocessing.image_size, run.tokens
    for other in _others(run)[:1]:
        fewer = _tokens(run, other)
        if run.recipe.teacher.source and run.recipe.teacher.image_size is None and tokens > DEAR * fewer:
            found.append(
                f"the teacher's own image size of {size} pixels makes {tokens:,} tokens of every image: set "
                f"teacher.image_size={other} for {fewer:,}, or teacher.image_size={size} to keep it without this line"
            )
    side = _usual_side(run.sources[0])
    if side * BLOWN_UP <= size:
        found.append(
            f"the pictures are small, {side:g} pixels at their shorter side (median of {LOOKED_AT}), and are blown up "
            f"to {size}: a smaller teacher.image_size would cost less"
        )
    return found


def _others(run: Run) -> list[int]:
    """The usual sizes, as the teacher's patches allow them, without its own."""
    patch = run.teacher.model.patch_embed.patch_size[0]
    own = run.teacher.preprocessing.image_size
    sizes = [size // patch * patch for size in USUAL]
    return [size for size in sizes if size not in (0, own)]


def _tokens(run: Run, size: int) -> int:
    model = run.teacher.model
    return (size // model.patch_embed.patch_size[0]) ** 2 + num_tokens(model) - model.patch_embed.num_patches


def _cost(run: Run, size: int) -> str:
    model, tokens = run.teacher.model, _tokens(run, size)
    gigaflops = forward_flops(model, tokens) / 1e9
    megabytes = activation_bytes(model, tokens) / 1e6
    return f"{tokens:,} tokens, {gigaflops:.3g} GFLOPs, {megabytes:.3g} MB"


def _usual_side(source: ImageSource) -> float:
    """The shorter side of a picture, pixels: the median of a few, spread over the source."""
    few = source.spread(LOOKED_AT)
    sides = [min(few.image_or_next(index)[0].size) for index in range(len(few))]
    return statistics.median(sides)
