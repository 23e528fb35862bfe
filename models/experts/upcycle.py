"""Students started from a dense vision transformer: every expert a copy of the MLP it stands in for.

Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055), with whole layers left out where the student has fewer.
At equal depths the student computes what the dense model computes, because the gates of a token's K experts sum to 1;
a capacity that drops tokens, dropout and noise on experts end that. What a V-MoE cannot hold is folded into weights
(LayerScale, another mean and std of the images) or refused by name.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Attention, LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..moe.layer import GELU, MoE, draw
from ..preprocessing import Preprocessing
from ..teacher.load import Teacher
from ..vmoe.config import POOLS
from ..vmoe.model import VMoE


def chosen_layers(dense_depths: Sequence[int], student_depths: Sequence[int]) -> list[int]:
    """Number of the dense layer that starts each of the student's blocks, module by module.

    Block j of a module's S blocks takes layer floor(j L / S) of the L layers of that module in the dense model: evenly
    spread; the first of the stage when S is 1, as the meta model does; each its own when S is L.

    Raises:
        ValueError: a student module deeper than the dense one, or another number of modules.
    """
    if len(dense_depths) != len(student_depths):
        raise ValueError(f"{len(student_depths)} student modules cannot start from {len(dense_depths)} dense ones.")
    layers, start = [], 0
    for module, (dense, student) in enumerate(zip(dense_depths, student_depths)):
        if student > dense:
            raise ValueError(
                f"module {module} of the student has {student} blocks and the dense model's has {dense}: a start from "
                f"dense weights takes at most as many. Set student.depths (now {list(student_depths)}) within "
                f"{list(dense_depths)}, or name a deeper dense model in student.init."
            )
        layers += [start + j * dense // student for j in range(student)]
        start += dense
    return layers


def norm_eps(dense: VisionTransformer) -> float:
    """The eps of the dense model's LayerNorms, which VMoEConfig.norm_eps has to be.

    Raises:
        ValueError: another kind of block or norm, or norms that differ.
    """
    if strange := {type(block).__name__ for block in dense.blocks if type(block) is not Block}:
        raise ValueError(f"a V-MoE cannot start from a model with blocks of type {', '.join(sorted(strange))}.")
    norms = [norm for block in dense.blocks for norm in (block.norm1, block.norm2)] + [_final_norm(dense)]
    if strange := {type(norm).__name__ for norm in norms if not isinstance(norm, nn.LayerNorm)}:
        raise ValueError(f"a V-MoE cannot start from a model with {', '.join(sorted(strange))} in place of LayerNorm.")
    if len(found := {norm.eps for norm in norms}) > 1:
        raise ValueError(f"a V-MoE has one LayerNorm eps, and the dense model has {sorted(found)}.")
    return norms[0].eps


@torch.no_grad()
def upcycle(
    student: VMoE, dense: Teacher, layers: Sequence[int], images: Preprocessing, *, noise: float = 0.0,
    own_classes: bool = True,
) -> list[str]:  # fmt: skip
    """Start a student from dense weights, in place: everything but the routers, which stay as they are.

    On the meta device only the checks are made.

    Args:
        layers: as from `chosen_layers`, one per block of the student.
        images: what the student's images look like; where the dense model's have another mean or std, the patch
            embedding makes up for it.
        noise: standard deviation of Gaussian noise on each expert's matrices, relative to that of the matrix; drawn
            from (seed of the student, block, expert), so that experts differ from the start.
        own_classes: whether the dense model's classes are the student's; otherwise its head is left behind when there
            are not as many.

    Returns:
        What was left behind, one phrase each.

    Raises:
        ValueError: sizes or parts that do not fit; both sides are named.
    """
    model = dense.model
    _check_sizes(student, dense)
    _check_parts(student, dense, layers)
    left_behind = _check_head(student, dense, own_classes)
    if student.pos_embed.is_meta:
        return left_behind
    _start_embedding(student, model, images, dense.preprocessing)
    for number, layer in enumerate(layers):
        _start_block(student.blocks[number], model.blocks[layer], partial(_noise, noise, student.config.seed, number))
    _copy(student.norm, _final_norm(model))
    if not any(phrase.startswith("its head") for phrase in left_behind):
        _copy(student.head, model.head)
    return left_behind


def _check_sizes(student: VMoE, dense: Teacher) -> None:
    config, model, first = student.config, dense.model, dense.model.blocks[0]
    if (eps := norm_eps(model)) != (config.norm_eps or student.norm.eps):
        raise ValueError(f"the student's norm_eps is {student.norm.eps} and that of {dense.source} is {eps}.")
    mlp_dim = first.mlp.fc1.out_features if isinstance(first.mlp, Mlp) else None
    pairs = {
        "width": (config.width, model.embed_dim),
        "heads": (config.heads, getattr(first.attn, "num_heads", None)),
        "mlp_dim": (config.mlp_dim, mlp_dim),
        "patch_size": (config.patch_size, model.patch_embed.patch_size[0]),
        "in_chans": (config.in_chans, model.patch_embed.proj.in_channels),
        "image_size": (config.image_size, model.patch_embed.img_size[0]),
        "prefix tokens": (student.num_prefix_tokens, model.num_prefix_tokens),
    }
    for name, (ours, theirs) in pairs.items():
        if theirs is not None and ours != theirs:
            advice = "" if name in ("image_size", "in_chans") else f"student.{name}={theirs}"  # those are the teacher's
            if name == "prefix tokens":
                advice = f"student.reg_tokens={theirs - 1}" if theirs else ""
            advice = (f"set {advice}, or " if advice else "") + f"name in student.init a dense model with {name} {ours}"
            raise ValueError(
                f"the student's {name} is {ours} and that of {dense.source}, which it is to start from, is {theirs}: "
                f"they must be equal; {advice}."
            )


def _check_parts(student: VMoE, dense: Teacher, layers: Sequence[int]) -> None:
    config, model = student.config, dense.model
    if len(layers) != len(student.blocks):
        raise ValueError(f"{len(layers)} layers were chosen for {len(student.blocks)} blocks.")
    sparse, moe = any(isinstance(block.mlp, MoE) for block in student.blocks), config.moe
    if sparse and not moe.renormalize and moe.k < moe.num_experts:
        raise ValueError(
            f"student.moe.renormalize is false: the gates of {moe.k} of {moe.num_experts} experts then sum to less "
            "than 1, by another amount for every token, so no copies of a dense MLP keep its function. Set "
            "student.moe.renormalize=true."
        )
    reasons = [] if isinstance(model.norm_pre, nn.Identity) else ["a norm before the blocks (pre_norm)"]
    if type(model.patch_embed) is not PatchEmbed or not isinstance(model.patch_embed.norm, nn.Identity):
        reasons.append(f"a patch embedding {type(model.patch_embed).__name__} that is more than one convolution")
    for layer in layers:
        reasons += _strange_parts(model.blocks[layer], layer)
        act = getattr(model.blocks[layer].mlp, "act", None)
        if not reasons and (form := _gelu(act)) != config.gelu:
            setting = f"set student.gelu={form}" if form else "a V-MoE has GELU, exact or by tanh"
            raise ValueError(
                f"the student's gelu is {config.gelu!r} and the activation of {dense.source} is "
                f"{form or type(act).__name__}: {setting}."
            )
    if reasons:
        raise ValueError(f"a V-MoE cannot start from {dense.source}, which has {reasons[0]}.")


def _strange_parts(block: nn.Module, layer: int) -> list[str]:
    """What a block has that a V-MoE's has not."""
    if type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return [f"{type(block.attn).__name__} and {type(block.mlp).__name__} in block {layer}"]
    norms = {"q_norm": block.attn.q_norm, "k_norm": block.attn.k_norm, "norm": block.attn.norm, "mlp": block.mlp.norm}
    found = [f"a norm inside block {layer} ({name})" for name, norm in norms.items() if not _identity(norm)]
    scales = [scale for scale in (block.ls1, block.ls2) if not _identity(scale) and not isinstance(scale, LayerScale)]
    return found + [f"{type(scale).__name__} in block {layer}" for scale in scales]


def _check_head(student: VMoE, dense: Teacher, own_classes: bool) -> list[str]:
    """Whether the dense head can be copied; what is left behind."""
    model, config = dense.model, student.config
    ours, theirs = student.num_classes, dense.num_classes
    if ours != theirs or not isinstance(model.head, nn.Linear):
        if own_classes:
            raise ValueError(
                f"the student has {ours} classes and {dense.source} has {theirs}: they must be equal to start from it."
            )
        return [f"its head of {theirs} classes" if theirs else "its head, which it has none of"]
    pool = next((name for name, timm in POOLS.items() if timm == model.global_pool and timm), None)
    after_mean = model.global_pool != "token" and not _identity(model.fc_norm)
    if pool is None or after_mean or getattr(model, "pool_include_prefix", False) or config.representation_size:
        what = "norm after the mean" if after_mean else f"pooling {model.global_pool!r}"
        return [f"its head, which reads another pooling than a V-MoE's ({what})"]
    if pool != config.pool:
        raise ValueError(
            f"the student's pool is {config.pool!r} and that of {dense.source} is {pool!r}: set student.pool={pool}."
        )
    return ["the head on its distillation token"] if hasattr(model, "head_dist") else []


def _start_embedding(student: VMoE, model: VisionTransformer, ours: Preprocessing, theirs: Preprocessing) -> None:
    """Patch embedding, prefix tokens and positions.

    Images come as x = (p - mean) / std; the dense convolution wants another mean and std of the same values p, which
    is linear in x and has no padding to spoil it.
    """
    proj, own = model.patch_embed.proj, student.patch_embed.proj
    mean, std, their_mean, their_std = (torch.tensor(v) for v in (ours.mean, ours.std, theirs.mean, theirs.std))
    weight = proj.weight.float()
    own.weight.copy_(weight * (std / their_std)[:, None, None])
    _set(own.bias, proj.bias)
    own.bias += weight.sum((2, 3)) @ ((mean - their_mean) / their_std)
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    if tokens := [token for token in tokens if token is not None]:
        prefix = torch.cat(tokens, 1)
        student.cls_token.copy_(prefix[:, :1])
        if student.reg_token is not None:
            student.reg_token.copy_(prefix[:, 1:])
    student.pos_embed.zero_()
    if model.pos_embed is not None:  # without the prefix tokens where the dense model gives those no position
        student.pos_embed[:, -model.pos_embed.shape[1] :].copy_(model.pos_embed)


def _start_block(own: nn.Module, block: Block, noise) -> None:
    for name in ("norm1", "norm2"):
        _copy(getattr(own, name), getattr(block, name))
    _copy(own.attn.qkv, block.attn.qkv)
    _copy(own.attn.proj, block.attn.proj, block.ls1)
    experts = own.mlp.experts if isinstance(own.mlp, MoE) else ()
    for parts in [dict(expert.items()) for expert in experts] or [{"fc1": own.mlp.fc1, "fc2": own.mlp.fc2}]:
        _copy(parts["fc1"], block.mlp.fc1)
        _copy(parts["fc2"], block.mlp.fc2, block.ls2)
    for number, expert in enumerate(experts):
        for name, linear in expert.items():
            noise(number, name, linear.weight)


def _noise(relative: float, seed: int, block: int, expert: int, name: str, weight: Tensor) -> None:
    if relative:
        values = torch.empty_like(weight)
        draw(values, nn.init.normal_, seed, block, expert, name, "upcycle", std=relative * weight.std().item())
        weight += values


def _copy(own: nn.Module, theirs: nn.Module, scale: nn.Module | None = None) -> None:
    """Weight and bias of a Linear or LayerNorm; a LayerScale behind it goes into both."""
    gamma = scale.gamma.float() if isinstance(scale, LayerScale) else None
    weight = theirs.weight if gamma is None else theirs.weight.float() * gamma[:, None]
    own.weight.copy_(weight)
    _set(own.bias, theirs.bias)
    if gamma is not None:
        own.bias *= gamma


def _set(own: Tensor, theirs: Tensor | None) -> None:
    own.copy_(torch.zeros_like(own) if theirs is None else theirs)


def _final_norm(model: VisionTransformer) -> nn.Module:
    """The norm before the head; of one class token it makes no difference whether it stands before the pooling."""
    return model.fc_norm if _identity(model.norm) else model.norm


def _gelu(act: nn.Module | None) -> str | None:
    """Our name of a GELU, told by what it computes."""
    x = torch.linspace(-4, 4, 81, device="cpu")
    if act is None:
        return None
    return next((ours for ours, form in GELU.items() if torch.equal(act(x.clone()), F.gelu(x, approximate=form))), None)


def _identity(part: nn.Module | None) -> bool:
    return part is None or isinstance(part, nn.Identity)
