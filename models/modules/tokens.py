"""What the tokens of a vision transformer are: class token, registers, and how their positions turn in attention.

A student's tokens meet its teacher's one to one, so these are the teacher's unless a recipe says otherwise. N patches,
D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, create_rope_embed
from torch import nn

# timm's embedding -> timm's name of it: by the patch's number, or by its place from -1 to 1 (Siméoni et al. 2025)
ROPE_TYPES = {RotaryEmbeddingCat: "cat", RotaryEmbeddingDinoV3: "dinov3"}
CAST = 0.01  # by so much a sine differs at most once it was cast to bfloat16


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding (Su et al. 2021; of two axes: Heo et al. 2024), as timm's create_rope_embed takes it.

    The default is DINOv3's: by the place in the image, whatever the size of the grid.

    Raises:
        ValueError: naming the field that makes no embedding, its value, and what is expected.
    """

    rope_type: str = "dinov3"
    temperature: float = 100.0
    rotate_half: bool = True  # channel i turns with channel i + D/2, else with its neighbour
    grid_offset: float = 0.0
    grid_indexing: str = "ij"  # rows first, or "xy"
    ref_feat_shape: tuple[int, int] | None = None  # "cat": places are scaled to a grid of this size

    def __post_init__(self) -> None:
        for name, known in (("rope_type", tuple(ROPE_TYPES.values())), ("grid_indexing", ("ij", "xy"))):
            if getattr(self, name) not in known:
                raise ValueError(f"rope.{name} {getattr(self, name)!r} is not known; use one of {', '.join(known)}.")
        if not self.temperature > 0:
            raise ValueError(f"rope.temperature must be above 0, got {self.temperature!r}.")
        if self.ref_feat_shape is not None:
            if self.rope_type != "cat":
                raise ValueError(f"rope.ref_feat_shape is of rope_type cat, got it with {self.rope_type}.")
            object.__setattr__(self, "ref_feat_shape", tuple(self.ref_feat_shape))  # a list from JSON

    def build(self, width: int, heads: int) -> nn.Module:
        """timm's embedding for heads of width / heads channels; get_embed(shape=(height, width)) -> (N, 2D).

        It has no weights. Its frequencies are kept, in float32 whatever the model is cast to, and the angles computed
        at every call.
        """
        options = {name: getattr(self, name) for name in ("temperature", "rotate_half", "grid_offset", "grid_indexing")}
        if self.rope_type == "cat":
            options |= {"in_pixels": False, "ref_feat_shape": self.ref_feat_shape}
        with torch.device("cpu"):  # also where a model is laid out on the meta device: no file has frequencies
            return create_rope_embed(self.rope_type, dim=width, num_heads=heads, feat_shape=None, **options)


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """What comes before the patches, and how the patches' positions are turned."""

    class_token: bool
    reg_tokens: int  # every other prefix token: registers, a distillation token
    rope: Rope | None = None
    rotary: bool = False  # positions are turned, also in a way that no Rope describes

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + self.reg_tokens


def grid_size(model: nn.Module) -> tuple[int, int]:
    """Patches of an image down and across, of a timm model or of a student."""
    own = getattr(model, "grid_size", None)
    return tuple(model.patch_embed.grid_size if own is None else own)


def token_layout(model: nn.Module) -> TokenLayout:
    """The layout of a timm model (VisionTransformer, Eva, Beit) or of a student."""
    class_token = model.cls_token is not None
    return TokenLayout(
        class_token=class_token,
        reg_tokens=model.num_prefix_tokens - int(class_token),
        rope=rope_of(model),
        rotary=getattr(model, "rope", None) is not None,
    )


def rope_of(model: nn.Module) -> Rope | None:
    """The rotary embedding of a timm model; None where it has none, or one that no Rope makes (learned frequencies)."""
    embedding = getattr(model, "rope", None)
    rope_type = ROPE_TYPES.get(type(embedding))
    if rope_type is None or embedding.temperature is None:  # DINOv3's may have periods in its place
        return None
    values = {f.name: getattr(embedding, f.name) for f in fields(Rope) if hasattr(embedding, f.name)}
    rope = Rope(rope_type=rope_type, **values)
    # frequencies have settings that no timm model uses and a Rope does not know: what both compute decides
    grid = embedding.feat_shape or model.patch_embed.grid_size
    with torch.device("cpu"):  # also where a student is laid out on the meta device beside a model with weights
        theirs = embedding.get_embed(shape=grid)
        ours = rope.build(model.embed_dim, model.embed_dim // embedding.dim).get_embed(shape=grid)
    if not theirs.is_meta and not torch.allclose(ours, theirs.float().cpu(), atol=CAST):
        return None
    return rope
