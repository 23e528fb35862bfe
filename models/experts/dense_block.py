"""A block of a dense vision transformer, whichever of timm's classes it is, under the names a V-MoE's block has.

timm's Block and EvaBlock compute the same: attention and an MLP, each behind a norm and scaled by channel. They keep it
under other names, and Eva's attention and gated MLPs come in several layouts. D width, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, GluMlp, LayerScale, Mlp, SwiGLU
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..moe.expert import GELU, SWIGLU

BLOCKS = (Block, EvaBlock)
ATTENTIONS = (Attention, AttentionRope, EvaAttention)
MLPS = (Mlp, SwiGLU, GluMlp)


@dataclass(frozen=True)
class Affine:
    """W x + b; no bias counts as 0."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class DenseBlock:
    """What a block computes: x + scale1 * proj(attention(qkv(norm1(x)))), then x + scale2 * mlp(norm2(x)).

    Attributes:
        qkv: queries, keys and values as one layer, (3D, D).
        scale1, scale2: of LayerScale, (D,); None where there is none.
        activation: a key of models.moe.expert.LAYERS.
        mlp: its layers by the names of LAYERS[activation].
    """

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    qkv: Affine
    proj: Affine
    scale1: Tensor | None
    scale2: Tensor | None
    activation: str
    mlp: dict[str, Affine]


def read_block(block: nn.Module, number: int, *, refitted: bool = False) -> DenseBlock:
    """The block under the names of a V-MoE's; parameters are shared with it where they are kept as they are.

    Args:
        number: of the block in its model, for messages.
        refitted: the layers that write into the stream are not taken as they are, so norms right before them do not
            stand in the way.

    Raises:
        ValueError: a part that no V-MoE has, as a phrase that names it.
    """
    if type(block) not in BLOCKS:  # another order of norms, or other positions
        kind = f"{type(block).__module__}.{type(block).__name__}"
        raise ValueError(f"blocks of type {kind} (block {number})")
    attn = block.attn
    mlp = block.mlp
    if type(attn) not in ATTENTIONS or type(mlp) not in MLPS:
        raise ValueError(f"{type(attn).__name__} and {type(mlp).__name__} in block {number}")
    norms = {"q_norm": attn.q_norm, "k_norm": attn.k_norm}
    if not refitted:
        norms |= {"norm": attn.norm, "mlp": mlp.norm}
    for name, norm in norms.items():
        if not is_identity(norm):
            raise ValueError(f"a norm inside block {number} ({name})")
    if getattr(attn, "gate", None) is not None:
        raise ValueError(f"a gate behind the attention of block {number}")
    width = attn.proj.out_features
    if attn.head_dim * attn.num_heads != width:
        raise ValueError(f"{attn.num_heads} heads of {attn.head_dim} channels at width {width} in block {number}")
    if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
        raise ValueError(f"{attn.num_kv_heads} heads of keys for {attn.num_heads} of queries in block {number}")
    if isinstance(block, EvaBlock):
        scale1 = block.gamma_1
        scale2 = block.gamma_2
    else:
        scale1 = _gamma(block.ls1, number)
        scale2 = _gamma(block.ls2, number)
    activation, layers = _mlp(mlp, number)
    return DenseBlock(block.norm1, block.norm2, _qkv(attn), _affine(attn.proj), scale1, scale2, activation, layers)


def is_identity(part: nn.Module | None) -> bool:
    """Whether a part of a model is there in name only."""
    return part is None or isinstance(part, nn.Identity)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm before the head; of one class token it makes no difference whether it stands before the pooling."""
    return model.fc_norm if is_identity(model.norm) else model.norm


def _gamma(scale: nn.Module, number: int) -> Tensor | None:
    if is_identity(scale):
        return None
    if not isinstance(scale, LayerScale):
        raise ValueError(f"{type(scale).__name__} in block {number}")
    return scale.gamma


def _qkv(attn: nn.Module) -> Affine:
    """Queries, keys and values as one layer: Eva's may have a layer each, or biases apart from a common weight."""
    if attn.qkv is None:
        parts = [_affine(layer) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
        biases = []
        for part in parts:
            biases.append(part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias)
        return Affine(torch.cat([part.weight for part in parts]), torch.cat(biases))
    if getattr(attn, "q_bias", None) is not None:
        return Affine(attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
    return _affine(attn.qkv)


def _mlp(mlp: nn.Module, number: int) -> tuple[str, dict[str, Affine]]:
    """The activation, and the layers by the names of LAYERS."""
    if isinstance(mlp, Mlp):
        form = _gelu(mlp.act)
        if form is None:
            raise ValueError(f"the activation {type(mlp.act).__name__} in block {number}, and a V-MoE GELU or SwiGLU")
        return form, {"fc1": _affine(mlp.fc1), "fc2": _affine(mlp.fc2)}
    if not isinstance(mlp.act, nn.SiLU):
        raise ValueError(f"an MLP gated by {type(mlp.act).__name__} in block {number}, and a V-MoE GELU or SwiGLU")
    if isinstance(mlp, SwiGLU):
        return SWIGLU, {name: _affine(getattr(mlp, name)) for name in ("fc1_g", "fc1_x", "fc2")}
    # GluMlp: gate and value in one layer
    first, second = mlp.fc1.weight.chunk(2)
    first_bias, second_bias = (None, None) if mlp.fc1.bias is None else mlp.fc1.bias.chunk(2)
    gate = Affine(first, first_bias)
    value = Affine(second, second_bias)
    if mlp.gate_last:
        gate, value = value, gate
    return SWIGLU, {"fc1_g": gate, "fc1_x": value, "fc2": _affine(mlp.fc2)}


def _affine(layer: nn.Linear) -> Affine:
    return Affine(layer.weight, layer.bias)


def _gelu(act: nn.Module) -> str | None:
    """Our name of a GELU, told by what it computes."""
    x = torch.linspace(-4, 4, 81, device="cpu")
    y = act(x.clone())  # it may work in place
    for name, form in GELU.items():
        if torch.equal(y, F.gelu(x, approximate=form)):
            return name
    return None
