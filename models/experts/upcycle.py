"""Students started from a dense vision transformer: every expert a copy of the MLP it stands in for.

Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055), with whole layers left out where the student has fewer.
At equal depths the student computes what the dense model computes, because the gates of a token's K experts sum to 1;
a capacity that drops tokens, dropout and noise on experts end that. What a V-MoE cannot hold is folded into weights
(LayerScale, another mean and std of the images) or refused by name.
"""

from collections.abc import Callable, Sequence
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
    layers = []
    first = 0  # layer of the dense module
    for module, (dense_depth, student_depth) in enumerate(zip(dense_depths, student_depths)):
        if student_depth > dense_depth:
            raise ValueError(
                f"module {module} of the student has {student_depth} blocks and the dense model's has {dense_depth}: "
                f"a start from dense weights takes at most as many. Set student.depths (now {list(student_depths)}) "
                f"within {list(dense_depths)}, or name a deeper dense model in student.init."
            )
        # first + floor(j L / S)
        layers += [first + j * dense_depth // student_depth for j in range(student_depth)]
        first += dense_depth
    return layers


def norm_eps(dense: VisionTransformer) -> float:
    """The eps of the dense model's LayerNorms, which VMoEConfig.norm_eps has to be.

    Raises:
        ValueError: another kind of block or norm, or norms that differ.
    """
    strange_blocks = {type(block).__name__ for block in dense.blocks if type(block) is not Block}
    if strange_blocks:
        raise ValueError(f"a V-MoE cannot start from a model with blocks of type {', '.join(sorted(strange_blocks))}.")
    norms = []
    for block in dense.blocks:
        norms += [block.norm1, block.norm2]
    norms.append(_final_norm(dense))
    strange_norms = {type(norm).__name__ for norm in norms if not isinstance(norm, nn.LayerNorm)}
    if strange_norms:
        names = ", ".join(sorted(strange_norms))
        raise ValueError(f"a V-MoE cannot start from a model with {names} in place of LayerNorm.")
    all_eps = {norm.eps for norm in norms}
    if len(all_eps) > 1:
        raise ValueError(f"a V-MoE has one LayerNorm eps, and the dense model has {sorted(all_eps)}.")
    return norms[0].eps


@torch.no_grad()
def upcycle(
    student: VMoE,
    dense: Teacher,
    layers: Sequence[int],
    images: Preprocessing,
    *,
    noise: float = 0.0,
    own_classes: bool = True,
) -> list[str]:
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
    if student.num_classes and not any(phrase.startswith("its head") for phrase in left_behind):
        _copy(student.head, model.head)
    return left_behind


def _check_sizes(student: VMoE, dense: Teacher) -> None:
    """Refuse a dense model of other sizes, naming the setting that makes the student's equal."""
    config = student.config
    model = dense.model
    block = model.blocks[0]
    eps = norm_eps(model)
    if eps != (config.norm_eps or student.norm.eps):
        raise ValueError(f"the student's norm_eps is {student.norm.eps} and that of {dense.source} is {eps}.")
    mlp_dim = None
    if isinstance(block.mlp, Mlp):
        mlp_dim = block.mlp.fc1.out_features
    # size -> (the student's, the dense model's; None where its blocks have no such number: refused by _check_parts)
    pairs = {
        "width": (config.width, model.embed_dim),
        "heads": (config.heads, getattr(block.attn, "num_heads", None)),
        "mlp_dim": (config.mlp_dim, mlp_dim),
        "patch_size": (config.patch_size, model.patch_embed.patch_size[0]),
        "in_chans": (config.in_chans, model.patch_embed.proj.in_channels),
        "image_size": (config.image_size, model.patch_embed.img_size[0]),
        "prefix tokens": (student.num_prefix_tokens, model.num_prefix_tokens),
    }
    for name, (student_size, dense_size) in pairs.items():
        if dense_size is not None and student_size != dense_size:
            raise ValueError(
                f"the student's {name} is {student_size} and that of {dense.source}, which it is to start from, is "
                f"{dense_size}: they must be equal; {_setting(name, dense_size)}name in student.init a dense model "
                f"with {name} {student_size}."
            )


def _setting(name: str, size: int) -> str:
    """The start of an advice: which setting gives the student this size, where one does."""
    if name in ("image_size", "in_chans"):  # the teacher's, whatever the recipe says of the student
        return ""
    if name == "prefix tokens":
        return f"set student.reg_tokens={size - 1}, or " if size else ""
    return f"set student.{name}={size}, or "


def _check_parts(student: VMoE, dense: Teacher, layers: Sequence[int]) -> None:
    """Refuse what a V-MoE cannot hold, and gates that make no copy of the dense model of it."""
    config = student.config
    model = dense.model
    if len(layers) != len(student.blocks):
        raise ValueError(f"{len(layers)} layers were chosen for {len(student.blocks)} blocks.")
    sparse = any(isinstance(block.mlp, MoE) for block in student.blocks)
    moe = config.moe
    if sparse and not moe.renormalize and moe.k < moe.num_experts:
        raise ValueError(
            f"student.moe.renormalize is false: the gates of {moe.k} of {moe.num_experts} experts then sum to less "
            "than 1, by another amount for every token, so no copies of a dense MLP keep its function. Set "
            "student.moe.renormalize=true."
        )
    reasons = []
    if not isinstance(model.norm_pre, nn.Identity):
        reasons.append("a norm before the blocks (pre_norm)")
    if type(model.patch_embed) is not PatchEmbed or not isinstance(model.patch_embed.norm, nn.Identity):
        reasons.append(f"a patch embedding {type(model.patch_embed).__name__} that is more than one convolution")
    for layer in layers:
        block = model.blocks[layer]
        reasons += _strange_parts(block, layer)
        if not reasons:  # only then has the block an MLP whose activation can be told
            _check_activation(student, dense, block)
    if reasons:
        raise ValueError(f"a V-MoE cannot start from {dense.source}, which has {reasons[0]}.")


def _check_activation(student: VMoE, dense: Teacher, block: nn.Module) -> None:
    act = getattr(block.mlp, "act", None)
    form = _gelu(act)
    if form != student.config.gelu:
        advice = f"set student.gelu={form}" if form else "a V-MoE has GELU, exact or by tanh"
        raise ValueError(
            f"the student's gelu is {student.config.gelu!r} and the activation of {dense.source} is "
            f"{form or type(act).__name__}: {advice}."
        )


def _strange_parts(block: nn.Module, layer: int) -> list[str]:
    """What a block has that a V-MoE's has not, one phrase each."""
    if type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return [f"{type(block.attn).__name__} and {type(block.mlp).__name__} in block {layer}"]
    norms = {"q_norm": block.attn.q_norm, "k_norm": block.attn.k_norm, "norm": block.attn.norm, "mlp": block.mlp.norm}
    strange = [f"a norm inside block {layer} ({name})" for name, norm in norms.items() if not _identity(norm)]
    for scale in (block.ls1, block.ls2):
        if not _identity(scale) and not isinstance(scale, LayerScale):
            strange.append(f"{type(scale).__name__} in block {layer}")
    return strange


def _check_head(student: VMoE, dense: Teacher, own_classes: bool) -> list[str]:
    """Whether the dense head can be copied; what is left behind."""
    model = dense.model
    config = student.config
    if not student.num_classes:
        return []
    if student.num_classes != dense.num_classes or not isinstance(model.head, nn.Linear):
        if own_classes:
            raise ValueError(
                f"the student has {student.num_classes} classes and {dense.source} has {dense.num_classes}: "
                f"they must be equal to start from it."
            )
        if not dense.num_classes:
            return ["its head, which it has none of"]
        return [f"its head of {dense.num_classes} classes"]
    our_pools = {timm_name: name for name, timm_name in POOLS.items() if timm_name}
    pool = our_pools.get(model.global_pool)
    after_mean = model.global_pool != "token" and not _identity(model.fc_norm)
    if pool is None or after_mean or getattr(model, "pool_include_prefix", False) or config.representation_size:
        what = "norm after the mean" if after_mean else f"pooling {model.global_pool!r}"
        return [f"its head, which reads another pooling than a V-MoE's ({what})"]
    if pool != config.pool:
        raise ValueError(
            f"the student's pool is {config.pool!r} and that of {dense.source} is {pool!r}: set student.pool={pool}."
        )
    if hasattr(model, "head_dist"):
        return ["the head on its distillation token"]
    return []


def _start_embedding(student: VMoE, model: VisionTransformer, ours: Preprocessing, theirs: Preprocessing) -> None:
    """Patch embedding, prefix tokens and positions.

    Images come as x = (p - mean) / std; the dense convolution wants another mean m and deviation s of the same values
    p, which is linear in x and has no padding to spoil it: (p - m) / s = x std / s + (mean - m) / s, by channel.
    """
    proj = student.patch_embed.proj
    dense_proj = model.patch_embed.proj
    mean_C = torch.tensor(ours.mean)
    std_C = torch.tensor(ours.std)
    dense_mean_C = torch.tensor(theirs.mean)
    dense_std_C = torch.tensor(theirs.std)
    # W' = W std / s
    weight_DCHW = dense_proj.weight.float()
    proj.weight.copy_(weight_DCHW * (std_C / dense_std_C)[:, None, None])
    # b' = b + sum over the patch of W (mean - m) / s
    _set(proj.bias, dense_proj.bias)
    proj.bias += weight_DCHW.sum((2, 3)) @ ((mean_C - dense_mean_C) / dense_std_C)
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    tokens = [token for token in tokens if token is not None]
    if tokens:
        prefix = torch.cat(tokens, 1)
        student.cls_token.copy_(prefix[:, :1])
        if student.reg_token is not None:
            student.reg_token.copy_(prefix[:, 1:])
    student.pos_embed.zero_()
    if model.pos_embed is not None:  # without the prefix tokens where the dense model gives those no position
        student.pos_embed[:, -model.pos_embed.shape[1] :].copy_(model.pos_embed)


def _start_block(block: nn.Module, dense: Block, add_noise: Callable[[int, str, Tensor], None]) -> None:
    """A block of the student from one of the dense model; `add_noise` changes weight `name` of expert `number`."""
    _copy(block.norm1, dense.norm1)
    _copy(block.norm2, dense.norm2)
    _copy(block.attn.qkv, dense.attn.qkv)
    _copy(block.attn.proj, dense.attn.proj, dense.ls1)
    if not isinstance(block.mlp, MoE):
        _copy(block.mlp.fc1, dense.mlp.fc1)
        _copy(block.mlp.fc2, dense.mlp.fc2, dense.ls2)
        return
    for number, expert in enumerate(block.mlp.experts):
        _copy(expert["fc1"], dense.mlp.fc1)
        _copy(expert["fc2"], dense.mlp.fc2, dense.ls2)
        for name, linear in expert.items():
            add_noise(number, name, linear.weight)


def _noise(relative: float, seed: int, block: int, expert: int, name: str, weight: Tensor) -> None:
    """weight += relative * std(weight) * N(0, 1)."""
    if relative:
        values = torch.empty_like(weight)
        draw(values, nn.init.normal_, seed, block, expert, name, "upcycle", std=relative * weight.std().item())
        weight += values


def _copy(target: nn.Module, source: nn.Module, scale: nn.Module | None = None) -> None:
    """Weight and bias of a Linear or LayerNorm; a LayerScale behind it goes into both."""
    assert target.weight.shape == source.weight.shape  # sizes were compared; copy_ would repeat a smaller one
    if not isinstance(scale, LayerScale):
        target.weight.copy_(source.weight)
        _set(target.bias, source.bias)
        return
    # gamma (W x + b) = (gamma W) x + gamma b
    gamma = scale.gamma.float()
    target.weight.copy_(source.weight.float() * gamma[:, None])
    _set(target.bias, source.bias)
    target.bias *= gamma


def _set(target: Tensor, source: Tensor | None) -> None:
    """Copy a bias; one that is not there counts as 0."""
    if source is None:
        target.zero_()
    else:
        target.copy_(source)


def _final_norm(model: VisionTransformer) -> nn.Module:
    """The norm before the head; of one class token it makes no difference whether it stands before the pooling."""
    return model.fc_norm if _identity(model.norm) else model.norm


def _gelu(act: nn.Module | None) -> str | None:
    """Our name of a GELU, told by what it computes."""
    if act is None:
        return None
    x = torch.linspace(-4, 4, 81, device="cpu")
    y = act(x.clone())  # it may work in place
    for name, form in GELU.items():
        if torch.equal(y, F.gelu(x, approximate=form)):
            return name
    return None


def _identity(part: nn.Module | None) -> bool:
    return part is None or isinstance(part, nn.Identity)
