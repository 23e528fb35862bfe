"""From images to what a NAC reads: the first stages of a ConvNeXt (timm's) and a learned positional grid beside them.

B images, V tokens, P channels of the grid.
"""

import functools

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerNorm2d
from timm.models.convnext import ConvNeXtStage
from torch import Tensor, nn

from ..moe.layer import draw

STEM = 4  # pixels of a token behind the stem; each further stage halves the grid
CONV_EPS = 1e-6  # of every LayerNorm in a ConvNeXt
# blocks per stage, by the name of a tokenizer; as many of them as it has stages
DEPTHS = {
    "tiny": (3, 3, 9),
    "mini": (3, 3, 6),
    "micro": (3, 3, 3),
    "nano": (1, 1, 1),
    "pico": (1, 1, 0),
    "femto": (1, 0, 0),
    "atto": (0, 0, 0),
}


class Tokenizer(nn.Module):
    """Images (B, channels, H, W) -> tokens (B, V, width + P), row by row: no norm behind, no path drop.

    Args:
        widths, depths: channels and blocks of each stage.
        grid_size: tokens down and across that the positions are learned for; for images of other sizes they are
            resampled (the published code takes one size only).
    """

    def __init__(
        self, in_chans: int, widths: tuple[int, ...], depths: tuple[int, ...], grid_dim: int, grid_size: tuple[int, int]
    ) -> None:
        super().__init__()
        norm_2d = functools.partial(LayerNorm2d, eps=CONV_EPS)
        norm = functools.partial(LayerNorm, eps=CONV_EPS)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, widths[0], STEM, STEM), norm_2d(widths[0]))
        stages = []
        width_in = widths[0]
        for number, (width, depth) in enumerate(zip(widths, depths)):
            stage = ConvNeXtStage(
                width_in,
                width,
                stride=2 if number else 1,
                depth=depth,
                ls_init_value=1e-6,
                norm_layer=norm_2d,
                norm_layer_cl=norm,
            )
            stages.append(stage)
            width_in = width
        self.stages = nn.Sequential(*stages)
        self.grid = nn.Parameter(torch.empty(grid_dim, *grid_size))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) -> tokens (B, V, width + P)."""
        features = self.stages(self.stem(images))
        grid = self.grid
        if features.shape[-2:] != grid.shape[-2:]:
            size = features.shape[-2:]
            grid = F.interpolate(grid[None].float(), size, mode="bicubic", antialias=True)[0].to(grid.dtype)
        positions = grid.expand(features.shape[0], -1, -1, -1)
        return torch.cat([features, positions.to(features.dtype)], dim=1).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def initialise(self, seed: int, name: str) -> None:
        """Weights from a truncated normal of 0.02, biases 0, positions from N(0, 1); drawn from `seed` and names."""
        for key, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                draw(module.weight, nn.init.trunc_normal_, seed, name, key, std=0.02)
                module.bias.zero_()
        draw(self.grid, nn.init.normal_, seed, name, "grid")
