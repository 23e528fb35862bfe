"""Feature maps of a vision transformer for images of any sizes, each as if it were alone.

An image passes through the backbone at its own size, padded to whole patches only: neither its positions (resampled to
its own grid), nor its attention, nor what its experts are sent depend on the images beside it. Images of one size share
a pass. B images, D width; h, w patches down and across.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Format
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..flops import Flops, flops, of_states
from ..modules.positions import block_positions, embed
from ..modules.stages import run_blocks
from ..moe.out import Out
from ..moe.routing import Routing, joined
from .windows import InWindows, global_numbers


class FeatureMaps(nn.Module):
    """The normalised outputs of a few blocks, as maps.

    Args:
        vit: timm's VisionTransformer or Eva, or a V-MoE; changed in place: it takes images of any size from here on,
            and its head and pooling are gone.
        maps: how many blocks are read, evenly spread; the last one is among them.
        window, global_blocks: see models/detection/windows.py; window 0 = all attention is global.

    Raises:
        ValueError: another kind of model, or windows for a model with rotary positions.
    """

    def __init__(self, vit: nn.Module, maps: int = 4, window: int = 0, global_blocks: int = 4) -> None:
        super().__init__()
        if not isinstance(vit, VisionTransformer | Eva):
            raise ValueError(
                f"a detector reads feature maps of a V-MoE or of timm's VisionTransformer or Eva, got a "
                f"{type(vit).__name__}: choose another backbone."
            )
        rotary = getattr(vit, "rope", None) is not None
        if window and (rotary or not all(isinstance(block, Block) for block in vit.blocks)):
            raise ValueError(
                f"windows of {window} patches are built for blocks of VisionTransformer and V-MoE without rotary "
                f"positions, got a {type(vit).__name__}{' with them' if rotary else ''}: use window 0."
            )
        self.vit = without_head(vit)
        _take_any_size(self.vit)
        depth = len(vit.blocks)
        self.read = sorted(global_numbers(depth, maps))
        self.window = window
        self.global_numbers = global_numbers(depth, global_blocks)
        self.grad_checkpointing = False

    @property
    def width(self) -> int:
        """Channels of a map."""
        return self.vit.embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a patch, pixels."""
        return self.vit.patch_embed.patch_size[0]

    def forward(self, pictures: Sequence[Tensor], out: Out | None = None) -> list[list[Tensor]]:
        """Maps (D, h, w) of every picture, one per block that is read, first block first.

        Args:
            pictures: (C, H, W) each, of any sizes, normalised; padded with zeros to whole patches.
            out: takes what the MoE layers tell, of all pictures together (models/moe/out.py).
        """
        padded = [self._whole_patches(picture) for picture in pictures]
        found: list[list[Tensor]] = [[] for _ in pictures]
        told: list[Out] = []
        for numbers in self._passes(padded):
            of_pass: Out = {}
            images = torch.stack([padded[number] for number in numbers])
            for row, maps in zip(numbers, self._maps(images, of_pass)):
                found[row] = maps
            told.append(of_pass)
        if out is not None:
            out["vit"] = told[0] if len(told) == 1 else together(told)
        return found

    def count_flops(self, tokens: int) -> Flops:
        """FLOPs of one square image of so many tokens, prefix tokens included; see models/flops.py."""
        return flops(self.vit, tokens) + self.count_windows(tokens)

    def count_windows(self, tokens: int) -> Flops:
        """What the windows change of the FLOPs of its blocks, which models/flops.py counts with global attention."""
        total = Flops()
        # T^2 D multiply-adds, twice; in windows it is W times (P + S^2)^2 D
        in_windows = self.tokens_of_windows(tokens) * (self.vit.num_prefix_tokens + self.window**2)
        difference = of_states(2 * self.width * (in_windows - tokens**2))
        for _ in range(self.blocks_in_windows(tokens)):
            total = total + difference
        return total

    def blocks_in_windows(self, tokens: int) -> int:
        """Blocks whose attention is cut into windows in a square image of so many tokens."""
        inside = not self.window or self._side(tokens) <= self.window
        return 0 if inside else len(self.vit.blocks) - len(self.global_numbers)

    def tokens_of_windows(self, tokens: int) -> int:
        """Tokens of all windows of a square image, each with its copy of the prefix; `tokens` without windows."""
        if not self.blocks_in_windows(tokens):
            return tokens
        windows = (-(-self._side(tokens) // self.window)) ** 2
        return windows * (self.vit.num_prefix_tokens + self.window**2)

    def _side(self, tokens: int) -> int:
        return max(1, round((tokens - self.vit.num_prefix_tokens) ** 0.5))

    def _passes(self, padded: Sequence[Tensor]) -> list[list[int]]:
        """Numbers of the pictures that go through the backbone together: those of one size.

        Where experts are spread over ranks, each alone: every rank has to make as many passes as the others.
        """
        if any(getattr(module, "ep_size", 1) > 1 for module in self.vit.modules()):
            return [[number] for number in range(len(padded))]
        by_size: dict[tuple[int, ...], list[int]] = {}
        for number, picture in enumerate(padded):
            by_size.setdefault(tuple(picture.shape), []).append(number)
        return list(by_size.values())

    def _maps(self, images: Tensor, out: Out) -> list[list[Tensor]]:
        """Per image its maps (D, h, w)."""
        vit = self.vit
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        prefix = vit.num_prefix_tokens
        blocks: dict[str, Any] = {}
        for number, block in enumerate(vit.blocks):
            in_windows = self.window and number not in self.global_numbers and max(grid) > self.window
            blocks[str(number)] = InWindows(block, grid, self.window, prefix) if in_windows else block
        positions = block_positions(getattr(vit, "rope", None), None, grid, blocks)
        # activation checkpointing is set on whatever has this flag; the backbone's own is read nowhere else
        recompute = self.grad_checkpointing
        run_blocks(blocks, embed(vit, images), recompute, out, self.read, positions=positions)
        states = []
        for number in self.read:
            states.append(vit.norm(out["blocks"][str(number)].pop("state"))[:, prefix:])
        per_image = []
        for row in range(len(images)):
            per_image.append([state[row].T.reshape(-1, *grid) for state in states])
        return per_image

    def _whole_patches(self, picture: Tensor) -> Tensor:
        side = self.patch_size
        return F.pad(picture, (0, -picture.shape[-1] % side, 0, -picture.shape[-2] % side))


def without_head(vit: nn.Module) -> nn.Module:
    """The same model, in place, without what comes behind its last norm."""
    vit.reset_classifier(0)
    for name in ("pre_logits", "feature_head", "fc_norm", "head_drop"):
        if hasattr(vit, name):
            setattr(vit, name, nn.Identity())
    if getattr(vit, "attn_pool", None) is not None:
        vit.attn_pool = None
    return vit


def together(told: Sequence[Out]) -> Out:
    """What several passes told, as if it had been one: the routing of every layer, of all images."""
    merged: Out = {}
    for name, value in told[0].items():
        of_all = [each[name] for each in told]
        if isinstance(value, Routing):
            merged[name] = joined(of_all)
        elif isinstance(value, Mapping):
            merged[name] = together(of_all)
    return merged


def _take_any_size(vit: nn.Module) -> None:
    """What timm's dynamic_img_size=True does when a model is built: positions are resampled to every image's grid."""
    vit.dynamic_img_size = True
    vit.patch_embed.strict_img_size = False
    vit.patch_embed.flatten = False
    vit.patch_embed.output_fmt = Format.NHWC
