"""Attention inside windows of an image, for images of many patches (Li et al. 2022, ViTDet, arXiv 2203.16527).

Only attention is cut: MLPs and experts see every image whole, so routing, capacities and balance are those of images.
B images, T = P + N tokens (prefix, then patches), D width; windows of S x S patches.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..modules.attention import quick_attention
from ..moe.out import Out, inside


@dataclass(frozen=True)
class InWindows:
    """Stands for a block: the same function of the same weights, but that its attention stays inside windows.

    Attributes:
        grid: patches of the images down and across.
        window: patches of a side of a window; the last ones reach over the edge, where zeros stand, as in ViTDet.
        prefix: tokens before the patches. Every window has a copy of them; afterwards they are the mean of the copies.
    """

    block: Block
    grid: tuple[int, int]
    window: int
    prefix: int

    @property
    def routes(self) -> bool:
        """Whether its MLP is an MoE, which takes `out`."""
        return getattr(self.block, "routes", False)

    def __call__(self, x: Tensor, out: Out | None = None) -> Tensor:
        """(B, T, D) in and out, as models.vmoe's and timm's blocks."""
        block = self.block
        x = getattr(block, "stitch", nn.Identity())(x)
        x = x + block.drop_path1(block.ls1(self._attention(block.norm1(x))))
        normed = block.norm2(x)
        hidden = block.mlp(normed, inside(out, "mlp")) if self.routes else block.mlp(normed)
        return x + block.drop_path2(block.ls2(hidden))

    def _attention(self, x_BTD: Tensor) -> Tensor:
        (height, width), side, prefix = self.grid, self.window, self.prefix
        batch, _, dim = x_BTD.shape
        down, across = -(-height // side), -(-width // side)
        patches = x_BTD[:, prefix:].reshape(batch, height, width, dim)
        patches = F.pad(patches, (0, 0, 0, across * side - width, 0, down * side - height))
        # (B, down, S, across, S, D) -> a window per row, with its copy of the prefix
        windows = patches.reshape(batch, down, side, across, side, dim).transpose(2, 3)
        windows = windows.reshape(batch, down * across, side * side, dim)
        copies = x_BTD[:, None, :prefix].expand(-1, down * across, -1, -1)
        joined = torch.cat((copies, windows), dim=2).flatten(0, 1)
        with quick_attention(self.block.attn, joined):
            attended = self.block.attn(joined)
        attended = attended.reshape(batch, down * across, prefix + side * side, dim)
        # back to rows of patches, without what reached over the edge
        windows = attended[:, :, prefix:].reshape(batch, down, across, side, side, dim).transpose(2, 3)
        patches = windows.reshape(batch, down * side, across * side, dim)[:, :height, :width]
        return torch.cat((attended[:, :, :prefix].mean(1), patches.reshape(batch, height * width, dim)), dim=1)


def global_numbers(depth: int, count: int) -> set[int]:
    """Numbers of the blocks whose attention stays global: evenly spread, the last block among them."""
    count = min(count, depth)
    return {round((i + 1) * depth / count) - 1 for i in range(count)}
