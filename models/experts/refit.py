"""Modules that were taught apart, fitted to what they really get once they stand behind each other.

Not in the paper. A module that learned from the teacher's states meets those of the modules before it when the student
is put together, and what they miss adds up. Here the products that write into the stream, attention's and the MLP's
last ones, are fitted anew by least squares, block by block on the student's own states, as a projected start fits
them (projection.py). No gradient is taken, and the modules may have been independent jobs.

For a block that is given z where its own teaching would have given it the clean z*: attention's product is fitted to
what is missing to z*_mid, the MLP's to what is missing to z*_out; the last block of a module, but for the last one, to
the teacher's state at the border as the next module reads it, so that what a module has not learned is made up for as
well. Only the change is fitted, and held small:

    min over dW, db of the mean over tokens of |dW x + db - missing|^2 + NEAR var(x) |dW|^2.

Each expert learns what its tokens' mixture is missing, tokens counting by their gates, so experts stay apart.

B images, T tokens, D_t and D_s width of teacher and student, N tokens of a batch, H hidden width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from ..flops import forward_flops
from ..modules.positions import embed
from ..modules.stages import Stage
from ..modules.stitch import StudentModule
from ..moe.expert import LAYERS
from ..moe.layer import MoE
from .fitting import class_token_half, gates, hidden
from .least_squares import LeastSquares

# Ridge on the change of a product, see LeastSquares.solve: .03 to .3 end within two points of each other (docs/log.md)
NEAR = 0.03


@torch.no_grad()
def refit(
    modules: Sequence[StudentModule],
    stages: Sequence[Stage],
    images: Iterable[Tensor],
    *,
    beat: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Fit the modules of a student to each other, in place.

    Args:
        modules: all of them in order, between tied stitches.
        stages: the teacher's modules, on the same device.
        images: some hundred (B, 3, H, W) in batches, on that device; some states of each are held at once.
        beat: called now and then.

    Returns:
        For every module the relative squared error of the student's states behind each of its blocks, by the block's
        number in the student, |z - wanted|^2 / |wanted|^2 after the fit.
    """
    modes = [module.training for module in (*modules, *stages)]
    for module in (*modules, *stages):
        module.eval()
    taught = list(images)  # what the teacher's next module reads
    clean = [embed(modules[0].stage, batch) for batch in taught]
    real = clean
    errors = []
    for number, (module, stage) in enumerate(zip(modules, stages)):
        last = number == len(modules) - 1
        border = []
        if not last:
            taught = [stage(state) for state in taught]
            border = [modules[number + 1].pre(state) for state in taught]
        weights: list[Tensor | None] = [None] * len(real)
        if last and module.stage.num_classes and module.stage.config.pool == "token":
            weights = class_token_half(real)
        positions = module.stage.positions()
        activation = module.stage.config.activation
        *_, end = module.stage.blocks
        errors.append({})
        for name, block in module.stage.blocks.items():
            beat()
            arguments = positions.get(name, {})
            clean_mid = [_attend(block, z, arguments)[1] for z in clean]
            # behind the module's last block the teacher's own states, if they are there
            clean = border if name == end and border else [_behind_mlp(block, mid) for mid in clean_mid]
            real = _refit_block(block, activation, real, clean_mid, clean, weights, arguments)
            errors[-1][name] = _error(real, clean)
    for module, training in zip((*modules, *stages), modes):
        module.train(training)
    return errors


def refit_flops(modules: Sequence[StudentModule], stages: Sequence[Stage], tokens: int) -> list[int]:
    """FLOPs of `refit` for each image, by module; what does not grow with the images is left out.

    Args:
        tokens: of teacher and student, prefix tokens included.
    """
    found = []
    for number, (module, stage) in enumerate(zip(modules, stages)):
        spent = 0
        if number:
            spent += forward_flops(module.pre, tokens)
        if number < len(modules) - 1:
            spent += forward_flops(stage, tokens)
        *_, end = module.stage.blocks
        for name, block in module.stage.blocks.items():
            ends = name == end and number < len(modules) - 1
            spent += _block_flops(block, module.stage.config.activation, tokens, ends)
        found.append(spent)
    embedding = modules[0].stage.patch_embed
    found[0] += forward_flops(embedding, embedding.num_patches)
    return found


def _block_flops(block: nn.Module, activation: str, tokens: int, ends: bool) -> int:
    """The block on clean states, and on real ones with its last products once more; two fits.

    Args:
        ends: the teacher's states stand for what its MLP gives of clean ones.
    """
    mlp, proj = block.mlp, block.attn.proj
    attention = forward_flops(block.attn, tokens)
    written = forward_flops(mlp, tokens)
    found = 2 * attention + (2 if ends else 3) * written
    found += 2 * tokens * proj.in_features * (proj.in_features + 2 * proj.out_features)
    each = 1
    if isinstance(mlp, MoE):
        found += 2 * tokens * mlp.dim * mlp.config.num_experts  # the router once more, for the gates
        each = mlp.config.k
        layers = mlp.experts[0]
    else:
        layers = dict(mlp.named_children())
    *first, last = (layers[name] for name in LAYERS[activation])
    products = sum(layer.weight.numel() for layer in first) + last.in_features * (last.in_features + last.out_features)
    return found + 2 * tokens * each * products


def _attend(block: nn.Module, z: Tensor, positions: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What attention's last product reads, and the stream behind it, (B, T, D_s) each."""
    read = []
    hook = block.attn.proj.register_forward_pre_hook(lambda _module, given: read.append(given[0]))
    try:
        written = block.attn(block.norm1(z), **positions)
    finally:
        hook.remove()
    return read[-1], z + block.ls1(written)


def _behind_mlp(block: nn.Module, mid: Tensor) -> Tensor:
    """The stream behind the block's MLP, of that before it."""
    return mid + block.ls2(block.mlp(block.norm2(mid)))


def _refit_block(
    block: nn.Module,
    activation: str,
    real: Sequence[Tensor],
    wanted_mid: Sequence[Tensor],
    wanted_out: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    positions: Mapping[str, Tensor],
) -> list[Tensor]:
    """Fit what the block writes, from the states it is really given to those that are wanted; what it then puts out."""
    read = []
    fit = LeastSquares()
    for z, wanted, weight in zip(real, wanted_mid, weights):
        heads, mid = _attend(block, z, positions)
        fit.add(heads, _unscaled(wanted - mid, block.ls1), weight)
        read.append(heads)
    _move(block.attn.proj, fit)
    mids = [z + block.ls1(block.attn.proj(heads)) for z, heads in zip(real, read)]
    del read
    missing = [_unscaled(wanted - _behind_mlp(block, mid), block.ls2) for wanted, mid in zip(wanted_out, mids)]
    inputs = [block.norm2(mid) for mid in mids]
    if isinstance(block.mlp, MoE):
        _refit_experts(block.mlp, inputs, missing, weights)
    else:
        layers = dict(block.mlp.named_children())
        fit = LeastSquares()
        for x, y, weight in zip(inputs, missing, weights):
            fit.add(hidden(layers, activation, x), y, weight)
        _move(layers[LAYERS[activation][-1]], fit)
    return [_behind_mlp(block, mid) for mid in mids]


def _refit_experts(
    mlp: MoE, inputs: Sequence[Tensor], missing: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> None:
    """Each expert's last layer, to what is missing of its tokens' outputs.

    With s the sum of a token's gates g_e, what its mixture misses of y is at most
    |sum_e g_e p_e - y|^2 <= s sum_e g_e |p_e - y / s|^2, which is the least squares of each expert.
    """
    fits = [LeastSquares() for _ in mlp.experts]
    rows = [0] * len(fits)
    for x, y, weight in zip(inputs, missing, weights):
        gates_NE = gates(mlp, x)
        x_ND, y_ND = x.flatten(0, 1), y.flatten(0, 1)
        sum_N1 = gates_NE.sum(1, keepdim=True)
        y_ND = y_ND / sum_N1.clamp_min(1e-6)  # 0 of a token that found all its experts full
        weighted_NE = gates_NE * sum_N1
        if weight is not None:
            weighted_NE = weighted_NE * weight.flatten()[:, None]
        for number, expert in enumerate(mlp.experts):
            visits_N = gates_NE[:, number] > 0
            if not visits_N.any():
                continue
            rows[number] += int(visits_N.sum())
            fits[number].add(hidden(expert, mlp.act, x_ND[visits_N]), y_ND[visits_N], weighted_NE[visits_N, number])
    last = LAYERS[mlp.act][-1]
    for expert, fit, visits in zip(mlp.experts, fits, rows):
        if visits > 1:  # one token has no variance; an expert that nobody visits stays as it was taught
            _move(expert[last], fit)


def _move(layer: nn.Linear, fit: LeastSquares) -> None:
    """Add the fitted change to a layer that writes into the stream."""
    weight, bias = fit.solve(ridge=NEAR)
    layer.weight.add_(weight)
    layer.bias.add_(bias)


def _unscaled(missing: Tensor, scale: nn.Module) -> Tensor:
    """What a layer has to give for its LayerScale to make this of it; nothing where the scale is 0."""
    if not isinstance(scale, LayerScale):
        return missing
    return torch.where(scale.gamma == 0, 0, missing / scale.gamma)


def _error(states: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    missing = sum(float((z - y).square().sum()) for z, y in zip(states, wanted))
    return missing / sum(float(y.square().sum()) for y in wanted)
