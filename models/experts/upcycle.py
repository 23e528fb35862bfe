"""Students started from a dense vision transformer: every expert a copy of the MLP it stands in for.

Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055), with whole layers left out where the student has fewer.
At equal depths the student computes what the dense model computes, because the gates of a token's K experts sum to 1;
a capacity that drops tokens, dropout and noise on experts end that. What the student does not hold is folded into
weights (LayerScale, another mean and std of the images) or refused by name.
"""

from collections.abc import Mapping, Sequence

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..modules.tokens import token_layout
from ..moe.expert import SWIGLU
from ..moe.layer import MoE, draw
from ..preprocessing import Preprocessing
from ..teacher.load import Teacher
from ..vmoe.config import POOLS, VMoEConfig
from ..vmoe.model import VMoE
from .dense_block import BLOCKS, Affine, DenseBlock, final_norm, is_identity, read_block

# what to do where nothing can be copied
INSTEAD = ": give the student new weights, 'student.init=\"\"', which learn from every kind of teacher."


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


def covered_layers(dense_depths: Sequence[int], student_depths: Sequence[int]) -> list[tuple[int, int]]:
    """The dense layers that each of the student's blocks stands for, (first, stop), from its chosen one to the next.

    Raises:
        ValueError: as chosen_layers.
    """
    firsts = chosen_layers(dense_depths, student_depths)
    return list(zip(firsts, [*firsts[1:], sum(dense_depths)]))


def norm_eps(dense: VisionTransformer) -> float:
    """The eps of the dense model's LayerNorms, which VMoEConfig.norm_eps has to be.

    Raises:
        ValueError: another kind of block or norm, or norms that differ.
    """
    strange_blocks = {type(block).__name__ for block in dense.blocks if type(block) not in BLOCKS}
    if strange_blocks:
        names = ", ".join(sorted(strange_blocks))
        raise ValueError(f"a V-MoE cannot start from a {type(dense).__name__} with blocks of type {names}{INSTEAD}")
    norms = []
    for block in dense.blocks:
        norms += [block.norm1, block.norm2]
    norms.append(final_norm(dense))
    strange_norms = {type(norm).__name__ for norm in norms if not isinstance(norm, nn.LayerNorm)}
    if strange_norms:
        names = ", ".join(sorted(strange_norms))
        raise ValueError(f"a V-MoE cannot start from a model with {names} in place of LayerNorm{INSTEAD}")
    all_eps = {norm.eps for norm in norms}
    if len(all_eps) > 1:
        raise ValueError(f"a V-MoE has one LayerNorm eps, and the dense model has {sorted(all_eps)}{INSTEAD}")
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
    eps = norm_eps(model)
    if eps != (student.config.norm_eps or student.norm.eps):
        raise ValueError(f"the student's norm_eps is {student.norm.eps} and that of {dense.source} is {eps}.")
    blocks = read_layers(student, dense, layers)
    if len(blocks) != len(student.blocks):
        raise ValueError(f"{len(blocks)} layers were chosen for {len(student.blocks)} blocks.")
    _check_sizes(student, dense, blocks[0])
    left_behind = check_parts(student, dense, blocks, own_classes=own_classes)
    if student.pos_embed.is_meta:
        return left_behind
    start_embedding(student, model, images, dense.preprocessing)
    for number, block in enumerate(blocks):
        _start_block(student.blocks[number], block)
    _copy_norm(student.norm, final_norm(model))
    if student.num_classes and not any(phrase.startswith("its head") for phrase in left_behind):
        _copy(student.head, Affine(model.head.weight, model.head.bias))
    add_noise(student, noise)
    return left_behind


def is_copy(config: VMoEConfig, model: VisionTransformer, covered: Sequence[tuple[int, int]]) -> bool:
    """Whether each of a student's blocks has a dense layer of its sizes to itself, so that a copy loses nothing.

    Args:
        covered: the dense layers that each block stands for, (first, stop).
    """
    attn, mlp = getattr(model.blocks[0], "attn", None), getattr(model.blocks[0], "mlp", None)
    sizes = (model.embed_dim, getattr(attn, "num_heads", 0), getattr(getattr(mlp, "fc2", None), "in_features", 0))
    alone = all(stop - first == 1 for first, stop in covered)
    return alone and sizes == (config.width, config.heads, config.mlp_dim)


@torch.no_grad()
def add_noise(student: VMoE, relative: float) -> None:
    """Make experts differ from the start: weight += relative x std(weight) x N(0, 1), in place.

    Drawn from (seed of the student, block, expert, layer) and nothing else.
    """
    if not relative:
        return
    for number, block in enumerate(student.blocks):
        if not isinstance(block.mlp, MoE):
            continue
        for expert, layers in enumerate(block.mlp.experts):
            for name, layer in layers.items():
                values = torch.empty_like(layer.weight)
                std = relative * layer.weight.std().item()
                draw(values, nn.init.normal_, student.config.seed, number, expert, name, "upcycle", std=std)
                layer.weight += values


def _check_sizes(student: VMoE, dense: Teacher, block: DenseBlock) -> None:
    """Refuse a dense model of other sizes, naming the setting that makes the student's equal."""
    config = student.config
    model = dense.model
    _refuse_other_sizes(
        student,
        dense,
        {
            "width": (config.width, model.embed_dim),
            "heads": (config.heads, model.blocks[0].attn.num_heads),
            "mlp_dim": (config.mlp_dim, block.mlp["fc2"].weight.shape[1]),
        },
    )


def check_parts(student: VMoE, dense: Teacher, blocks: Sequence[DenseBlock], *, own_classes: bool) -> list[str]:
    """Refuse a dense model whose images, tokens, rotations or MLPs are not the student's; sizes of layers aside.

    Args:
        blocks: its layers that the student starts from.
        own_classes: as in upcycle.

    Returns:
        What is left behind of it, one phrase each.

    Raises:
        ValueError: both sides are named.
    """
    config = student.config
    model = dense.model
    pairs = {
        "patch_size": (config.patch_size, model.patch_embed.patch_size[0]),
        "in_chans": (config.in_chans, model.patch_embed.proj.in_channels),
        "image_size": (config.image_size, model.patch_embed.img_size[0]),
        "prefix tokens": (student.num_prefix_tokens, model.num_prefix_tokens),
    }
    _refuse_other_sizes(student, dense, pairs)
    _check_rope(student, dense)
    for block in blocks:
        _check_activation(student, dense, block)
    return _check_head(student, dense, own_classes)


def _refuse_other_sizes(student: VMoE, dense: Teacher, pairs: Mapping[str, tuple[int, int]]) -> None:
    """Refuse the first size that differs.

    Args:
        pairs: size -> the student's and the dense model's.
    """
    for name, (student_size, dense_size) in pairs.items():
        if student_size != dense_size:
            setting = _setting(name, dense_size, student.config.class_token)
            raise ValueError(
                f"the student's {name} is {student_size} and that of {dense.source}, which it is to start from, is "
                f"{dense_size}: they must be equal; {setting}name in student.init a dense model with {name} "
                f"{student_size}."
            )


def _setting(name: str, size: int, class_token: bool) -> str:
    """The start of an advice: which setting gives the student, with or without a class token, this size."""
    if name in ("image_size", "in_chans"):  # the teacher's, whatever the recipe says of the student
        return ""
    if name == "prefix tokens":
        registers = size - int(class_token)
        return f"set student.reg_tokens={registers}, or " if registers >= 0 else "set student.class_token=false, or "
    return f"set student.{name}={size}, or "


def read_layers(student: VMoE, dense: Teacher, layers: Sequence[int], *, refitted: bool = False) -> list[DenseBlock]:
    """These layers of the dense model; refuses what a V-MoE cannot hold, and gates that make no copy of it.

    Args:
        refitted: what writes into the stream is fitted anew, see read_block.

    Raises:
        ValueError: naming the dense model and the part.
    """
    config = student.config
    model = dense.model
    sparse = any(isinstance(block.mlp, MoE) for block in student.blocks)
    moe = config.moe
    if sparse and not moe.renormalize and moe.k < moe.num_experts:
        raise ValueError(
            f"student.moe.renormalize is false: the gates of {moe.k} of {moe.num_experts} experts then sum to less "
            "than 1, by another amount for every token, so no copies of a dense MLP keep its function. Set "
            "student.moe.renormalize=true."
        )
    try:
        blocks = [read_block(model.blocks[layer], layer, refitted=refitted) for layer in layers]
        if not is_identity(model.norm_pre):
            raise ValueError("a norm before the blocks (pre_norm)")
        if type(model.patch_embed) is not PatchEmbed or not is_identity(model.patch_embed.norm):
            embedding = type(model.patch_embed).__name__
            raise ValueError(f"a patch embedding {embedding} that is more than one convolution")
    except ValueError as error:
        raise ValueError(f"a V-MoE cannot start from {dense.source}, which has {error}{INSTEAD}") from None
    return blocks


def _check_rope(student: VMoE, dense: Teacher) -> None:
    """Refuse a dense model whose attention rotates queries and keys in another way than the student's."""
    layout = token_layout(dense.model)
    if layout.rotary and layout.rope is None:
        embedding = type(dense.model.rope).__name__
        raise ValueError(
            f"a V-MoE cannot start from {dense.source}, whose rotary positions ({embedding}) have learned or other "
            f"frequencies than a V-MoE's{INSTEAD}"
        )
    rope = student.config.rope
    if layout.rope == rope:
        return
    if layout.rope is None or rope is None:
        rotates, other = ("", "do not") if rope is None else ("do not ", "do")
        value = str(rope is None).lower()
        raise ValueError(
            f"the blocks of {dense.source} {rotates}rotate queries and keys by position and the student's {other}: set "
            f"student.rope={value}."
        )
    raise ValueError(
        f"the student's rope is {rope} and that of {dense.source} is {layout.rope}: name in student.init a dense model "
        f"with the student's, or leave it empty."
    )


def _check_activation(student: VMoE, dense: Teacher, block: DenseBlock) -> None:
    config = student.config
    if block.activation == config.activation:
        return
    if SWIGLU in (block.activation, config.activation):
        gated = block.activation == SWIGLU
        ours, theirs = ("GELU", "SwiGLU") if gated else ("SwiGLU", "GELU")
        raise ValueError(
            f"the student's MLPs have {ours} and those of {dense.source} {theirs}: set student.swiglu="
            f"{str(gated).lower()}."
        )
    raise ValueError(
        f"the student's gelu is {config.gelu!r} and the activation of {dense.source} is {block.activation}: set "
        f"student.gelu={block.activation}."
    )


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
    after_mean = model.global_pool != "token" and not is_identity(model.fc_norm)
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


def start_embedding(
    student: VMoE,
    model: VisionTransformer,
    ours: Preprocessing,
    theirs: Preprocessing,
    projection: Tensor | None = None,
) -> None:
    """Patch embedding, prefix tokens and positions.

    Images come as x = (p - mean) / std; the dense convolution wants another mean m and deviation s of the same values
    p, which is linear in x and has no padding to spoil it: (p - m) / s = x std / s + (mean - m) / s, by channel.

    Args:
        projection: P (D_s, D_t) to the student's width; None where it is the dense model's.
    """
    if projection is None:
        projection = torch.eye(student.embed_dim)
    proj = student.patch_embed.proj
    dense_proj = model.patch_embed.proj
    mean_C = torch.tensor(ours.mean)
    std_C = torch.tensor(ours.std)
    dense_mean_C = torch.tensor(theirs.mean)
    dense_std_C = torch.tensor(theirs.std)
    # W' = P W std / s
    weight_DCHW = torch.einsum("sd,dchw->schw", projection, dense_proj.weight.float())
    proj.weight.copy_(weight_DCHW * (std_C / dense_std_C)[:, None, None])
    # b' = P b + sum over the patch of P W (mean - m) / s
    _set(proj.bias, None if dense_proj.bias is None else projection @ dense_proj.bias.float())
    proj.bias += weight_DCHW.sum((2, 3)) @ ((mean_C - dense_mean_C) / dense_std_C)
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    tokens = [token for token in tokens if token is not None]
    if tokens:
        prefix = torch.cat(tokens, 1) @ projection.T
        first = 0
        for token in (student.cls_token, student.reg_token):
            if token is not None:
                token.copy_(prefix[:, first : first + token.shape[1]])
                first += token.shape[1]
    student.pos_embed.zero_()
    if model.pos_embed is not None:  # without the prefix tokens where the dense model gives those no position
        student.pos_embed[:, -model.pos_embed.shape[1] :].copy_(model.pos_embed @ projection.T)


def _start_block(block: nn.Module, dense: DenseBlock) -> None:
    """A block of the student from one of the dense model."""
    _copy_norm(block.norm1, dense.norm1)
    _copy_norm(block.norm2, dense.norm2)
    _copy(block.attn.qkv, dense.qkv)
    _copy(block.attn.proj, dense.proj, _taken_on(block.ls1, dense.scale1))
    mlp_scale = _taken_on(block.ls2, dense.scale2)
    if not isinstance(block.mlp, MoE):
        for name, layer in dense.mlp.items():
            _copy(getattr(block.mlp, name), layer, mlp_scale if name == "fc2" else None)
        return
    for expert in block.mlp.experts:
        for name, layer in dense.mlp.items():
            _copy(expert[name], layer, mlp_scale if name == "fc2" else None)


def _taken_on(scale: nn.Module, gamma: Tensor | None) -> Tensor | None:
    """Give the student's LayerScale the dense one's values; what is left for the weights before it to take on."""
    if is_identity(scale):
        return gamma
    if gamma is None:
        scale.gamma.fill_(1)
    else:
        scale.gamma.copy_(gamma)
    return None


def _copy(target: nn.Linear, source: Affine, gamma: Tensor | None = None) -> None:
    """Weight and bias of a layer; a LayerScale behind it goes into both."""
    assert target.weight.shape == source.weight.shape  # sizes were compared; copy_ would repeat a smaller one
    if gamma is None:
        target.weight.copy_(source.weight)
        _set(target.bias, source.bias)
        return
    # gamma (W x + b) = (gamma W) x + gamma b
    gamma = gamma.float()
    target.weight.copy_(source.weight.float() * gamma[:, None])
    _set(target.bias, source.bias)
    target.bias *= gamma


def _copy_norm(target: nn.LayerNorm, source: nn.LayerNorm) -> None:
    target.weight.copy_(source.weight)
    _set(target.bias, source.bias)


def _set(target: Tensor, source: Tensor | None) -> None:
    """Copy a bias; one that is not there counts as 0."""
    if source is None:
        target.zero_()
    else:
        target.copy_(source)
