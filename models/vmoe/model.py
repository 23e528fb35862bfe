"""V-MoE: a vision transformer some of whose MLPs are mixtures of experts; the model, save and load.

Weights published by `save_pretrained` load with torch alone, whatever number of ranks they were trained on. B images,
T tokens, D width.
"""

import functools
import math
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import AttentionRope, LayerNorm, Mlp, SwiGLU, to_2tuple
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..files.hub import CheckpointFiles
from ..files.saved import Published, read
from ..modules.attention import quick_attention
from ..modules.stages import run_blocks, shallow_copy
from ..modules.stitch import FOLDED, stitch
from ..moe.expert import GELU
from ..moe.layer import MoE, draw, lecun_normal_, routed_layers
from ..moe.out import Out, inside
from ..preprocessing import Preprocessing
from .config import POOLS, VARIANTS, VMoEConfig, decode_variant, moe_numbers
from .files import FORMAT

__all__ = ["VARIANTS", "VMoE", "VMoEBlock", "VMoEConfig", "decode_variant", "load_expert_parallel", "moe_numbers"]
MLP_LAYERS = (".fc1", ".fc2", ".fc1_g", ".fc1_x")


class VMoEBlock(Block):
    """timm's block, with the stitch layers kept in front of it at a module border, if any.

    Attributes:
        routes: whether its MLP is an MoE, which takes `out`.
    """

    def __init__(self, *args: Any, routes: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.routes = routes
        self.stitch = nn.Identity()

    def forward(self, x: Tensor, out: Out | None = None, **masks: Any) -> Tensor:
        """(B, T, D) in and out; what an MoE tells is left in out["mlp"].

        Args:
            masks: of timm's attention, and the `rope` of a rotary one.
        """
        x = self.stitch(x)
        with quick_attention(self.attn, x):
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **masks)))
        normed = self.norm2(x)
        hidden = self.mlp(normed, inside(out, "mlp")) if self.routes else self.mlp(normed)
        return x + self.drop_path2(self.ls2(hidden))


class VMoE(VisionTransformer, Published):
    """timm's VisionTransformer with MoE blocks; images (B, C, H, W) -> logits (B, classes).

    Without classes (num_classes 0) it gives pooled features (B, D) of its own. `feature_head` then takes its normalised
    tokens to those of the teacher it learned from, where that has another width.

    Attributes:
        config: what it is, kept true by reset_classifier and set_input_size.
        preprocessing, labels: what its images must look like and what its classes are called; None when not known.
        source: the directory, or the hub id with its commit, that it was loaded from; None for a new one.
    """

    FORMAT = FORMAT

    def __init__(self, config: VMoEConfig) -> None:
        norm_layer = None  # timm's own
        if config.norm_eps:
            norm_layer = functools.partial(LayerNorm, eps=config.norm_eps)
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            in_chans=config.in_chans,
            num_classes=0,  # the head is made below, behind pre_logits
            global_pool=POOLS[config.pool],
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            class_token=config.class_token,
            reg_tokens=config.reg_tokens,
            init_values=config.layer_scale or None,
            fc_norm=False,  # the official model normalises before it pools
            pos_drop_rate=config.drop_rate,
            proj_drop_rate=config.drop_rate,
            drop_path_rate=config.drop_path_rate,
            dynamic_img_size=config.dynamic_img_size,
            weight_init="skip",
            norm_layer=norm_layer,
            act_layer=functools.partial(nn.GELU, approximate=GELU[config.gelu]),
            block_fn=functools.partial(_block, config),
        )
        self.config = config
        self.rope = config.rope.build(config.width, config.heads) if config.rope else None
        self.preprocessing: Preprocessing | None = None
        self.labels: list[str] | None = None
        self.source: str | None = None
        self.head_hidden_size = config.representation_size or config.width
        self.pre_logits = nn.Identity()
        if config.representation_size:
            self.pre_logits = nn.Linear(config.width, config.representation_size)
        self.num_classes = config.num_classes
        self.feature_head = nn.Identity()
        if config.num_classes:
            self.head = nn.Linear(self.head_hidden_size, config.num_classes)
        elif config.feature_width:
            self.feature_head = nn.Linear(config.width, config.feature_width)
        _initialise(self, config)

    def forward(
        self,
        x: Tensor,
        out: Out | None = None,
        states: Collection[int] = (),
        as_teacher: bool = False,
        **masks: Any,
    ) -> Tensor:
        """Images (B, C, H, W) -> logits (B, classes), or without classes pooled features (B, D).

        Args:
            out: takes what the MoE layers tell of their routing, for auxiliary_loss and routing_metrics (models.moe).
            states: numbers of the blocks whose output is left in `out` as well; see run_blocks.
            as_teacher: give the tokens that learn from the teacher's final ones, (B, T, feature_width or D).
            masks: timm's attn_mask and is_causal.

        Learned positions are added to the tokens where queries and keys are rotated (config.rope) too: a dense model
        to start from may have both, and where it has not they start at zero.
        """
        x = self.forward_features(x, out, states, **masks)
        return self.feature_head(x) if as_teacher else self.forward_head(x)

    def forward_features(self, x: Tensor, out: Out | None = None, states: Collection[int] = (), **masks: Any) -> Tensor:
        """Images (B, C, H, W) -> normalised tokens (B, T, D); arguments as in forward."""
        rotation = self._rotation(x)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        blocks = {str(number): block for number, block in enumerate(self.blocks)}
        return self.norm(run_blocks(blocks, x, self.grad_checkpointing, out, states, **rotation, **masks))

    def forward_intermediates(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        """timm's: the outputs of some blocks as feature maps."""
        rotation = self._rotation(x)
        if not rotation:
            return super().forward_intermediates(x, *arguments, **options)
        # timm's method hands its blocks tokens alone
        rotating = shallow_copy(self)
        del rotating.blocks
        rotating.blocks = [functools.partial(block, **rotation) for block in self.blocks]
        return VisionTransformer.forward_intermediates(rotating, x, *arguments, **options)

    def _rotation(self, images: Tensor) -> dict[str, Tensor]:
        """How attention turns the patches of these images (B, C, H, W), as an argument of every block."""
        if self.rope is None:
            return {}
        grid = self.patch_embed.dynamic_feat_size(images.shape[-2:])
        return {"rope": self.rope.get_embed(shape=grid).to(images.device)}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, T, D); logits (B, classes), or with `pre_logits` what the head reads."""
        x = self.fc_norm(self.pool(x))
        if self.config.representation_size:
            x = self.pre_logits(x).tanh()
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0 = none), and with `global_pool` ("token", "avg" or "") another pooling.

        Raises:
            ValueError: another pooling.
        """
        names = {timm: ours for ours, timm in POOLS.items()}
        if global_pool is not None and global_pool not in names:
            raise ValueError(f"global_pool {global_pool!r} is not known; use one of {', '.join(map(repr, names))}.")
        super().reset_classifier(0, global_pool)
        self.config = replace(self.config, num_classes=num_classes, pool=names[self.global_pool])
        self.num_classes = num_classes
        self.labels = None
        if num_classes:
            self.feature_head = nn.Identity()
            self.config = replace(self.config, feature_width=0)
            like = self.norm.weight
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            reset_head(self.head)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Take images of another size: position embeddings and patch kernel are resampled, rotations follow the grid.

        Raises:
            ValueError: images that are not square.
        """
        if img_size is None:
            img_size = self.patch_embed.img_size
        height, width = to_2tuple(img_size)
        if height != width:
            raise ValueError(f"a V-MoE is built for square images, got {height}x{width}; dynamic_img_size takes any.")
        patch_size = patch_size or self.config.patch_size
        config = replace(self.config, image_size=height, patch_size=patch_size)
        super().set_input_size((height, width), to_2tuple(patch_size))
        self.config = config
        if self.preprocessing is not None:
            self.preprocessing = replace(self.preprocessing, image_size=height)

    def set_k(self, k: int) -> None:
        """Send every token to `k` experts from here on; a save keeps it.

        Raises:
            ValueError: not a whole number from 1 to all experts of a layer.
        """
        experts = self.config.moe.num_experts
        if type(k) is not int or not 1 <= k <= experts:
            raise ValueError(f"k must be a whole number from 1 to the {experts} experts of a layer, got {k!r}.")
        self.config = replace(self.config, moe=replace(self.config.moe, k=k))
        for layer in routed_layers(self).values():
            layer.config = self.config.moe

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | CheckpointFiles,
        revision: str | None = None,
        *,
        config: VMoEConfig | None = None,
        k: int | None = None,
    ) -> "VMoE":
        """As Published.from_pretrained, and with another number of experts per token.

        Args:
            k: in place of those it was trained with, from 1 to all: fewer are faster and less exact.
        """
        model = super().from_pretrained(source, revision, config=config)
        if k is not None:
            model.set_k(k)
        return model


def load_expert_parallel(
    source: str | Path,
    ep_size: int,
    ep_rank: int,
    revision: str | None = None,
    *,
    config: VMoEConfig | None = None,
) -> VMoE:
    """A saved V-MoE with the experts of one rank only: the bytes of the others are not read.

    Their parameters stay on the meta device, where models.moe.expert_parallel(model, ep_size), which every rank has to
    call next, leaves them behind.

    Args:
        ep_size, ep_rank: ranks that share the experts, and which of them this is: rank % ep_size.
        source, revision, config: as VMoE.from_pretrained.

    Raises:
        ValueError: an ep_size that does not divide the experts, and whatever VMoE.from_pretrained raises.
    """
    experts = read(FORMAT, CheckpointFiles(str(source), revision))[0].moe.num_experts
    if ep_size < 1 or experts % ep_size or not 0 <= ep_rank < ep_size:
        raise ValueError(
            f"rank {ep_rank} of ep_size {ep_size} cannot share {experts} experts of {source}: ep_size must divide them."
        )
    per_rank = experts // ep_size

    def needed(name: str) -> bool:
        expert = re.search(r"\.mlp\.experts\.(\d+)\.", name)
        return expert is None or int(expert[1]) // per_rank == ep_rank

    return VMoE._load(source, revision, config, needed)


def _block(config: VMoEConfig, dim: int, depth: int, **options: Any) -> VMoEBlock:
    """Block number `depth` (timm's word) of a V-MoE."""
    routes = depth in moe_numbers(config.moe_blocks, config.depth)

    def mlp(act_layer: type[nn.Module], drop: float, **_timm: Any) -> nn.Module:
        if routes:
            return MoE(dim, config.mlp_dim, config.moe, config.activation, layer=depth, seed=config.seed)
        if config.swiglu:
            return SwiGLU(dim, config.mlp_dim, drop=drop)
        return Mlp(dim, config.mlp_dim, act_layer=act_layer, drop=drop)

    options["mlp_layer"] = mlp
    if config.rope:
        options["attn_layer"] = AttentionRope
    block = VMoEBlock(dim=dim, depth=depth, routes=routes, **options)
    if config.rope:  # what timm's block has no arguments for
        block.attn.num_prefix_tokens = config.tokens.prefix_tokens
        block.attn.rotate_half = config.rope.rotate_half
    width = (config.stitch_blocks or {}).get(str(depth))
    if width == FOLDED:
        block.stitch = nn.Linear(dim, dim)
    elif width is not None:
        block.stitch = nn.Sequential(stitch(dim, width), stitch(width, dim))
    return block


@torch.no_grad()
def _initialise(model: VMoE, config: VMoEConfig) -> None:
    """The official initial values (facts of google-research/vmoe); MoE layers have their own already."""
    for name, parameter in model.named_parameters():
        where, _, kind = name.rpartition(".")
        started = any(part in name for part in (".mlp.experts.", ".mlp.router.", ".stitch.", ".ls1.", ".ls2."))
        if started or ".norm" in f".{where}":
            continue  # norms are 1 and 0 from torch
        if name == "pos_embed":
            draw(parameter, nn.init.normal_, config.seed, name, std=0.02)
        elif where.endswith(MLP_LAYERS) and kind == "bias":
            draw(parameter, nn.init.normal_, config.seed, name, std=1e-6)
        elif where == "head":
            continue
        elif kind == "bias" or name in ("cls_token", "reg_token"):
            parameter.zero_()
        elif where.endswith(".qkv"):  # query, key and value are layers of their own in the official code
            for part, chunk in zip("qkv", parameter.chunk(3)):
                draw(chunk, nn.init.xavier_uniform_, config.seed, name, part)
        elif name == "feature_head.weight":  # small, so that it starts at an error of 1, as stitches do
            draw(parameter, nn.init.normal_, config.seed, name, std=0.02)
        elif where in ("patch_embed.proj", "pre_logits"):
            draw(parameter, lecun_normal_, config.seed, name)
        else:
            draw(parameter, nn.init.xavier_uniform_, config.seed, name)
    if config.num_classes:
        reset_head(model.head)


@torch.no_grad()
def reset_head(head: nn.Linear) -> None:
    """The official start: every class equally likely under a sigmoid loss, whatever the features."""
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, -math.log(head.out_features))
