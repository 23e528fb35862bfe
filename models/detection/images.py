"""What a detector does to an image before it looks, and to boxes after."""

import math

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..preprocessing import INTERPOLATIONS, Preprocessing
from .config import DetectorConfig


def resized_size(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """Height and width with the shorter side at `shorter`, or smaller where the longer one would exceed `longest`."""
    scale = min(shorter / min(height, width), longest / max(height, width))
    return max(1, math.floor(height * scale + 0.5)), max(1, math.floor(width * scale + 0.5))


def as_tensor(image: Image.Image, config: DetectorConfig) -> Tensor:
    """An RGB image as the detector looks at it, resized and normalised: (3, H, W) float32."""
    size = resized_size(image.height, image.width, config.shorter_side, config.longest_side)
    return normalised(resized(image, size, config.preprocessing), config.preprocessing)


def resized(image: Image.Image, size: tuple[int, int], pre: Preprocessing) -> Tensor:
    """An RGB image of another height and width, (3, H, W) uint8."""
    return pil_to_tensor(image.resize((size[1], size[0]), INTERPOLATIONS[pre.interpolation]))


def normalised(picture_CHW: Tensor, pre: Preprocessing, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes (C, H, W) as the backbone takes them, computed in float32 on their device."""
    values = picture_CHW.float() / 255
    mean, std = (torch.tensor(numbers, device=values.device)[:, None, None] for numbers in (pre.mean, pre.std))
    return ((values - mean) / std).to(dtype)


def in_pixels(box_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes as centre and size, shares of an image, -> left, top, right, bottom in pixels, cut at its edges.

    Args:
        size: height and width of the image.
    """
    height, width = size
    centre, extent = box_N4[:, :2], box_N4[:, 2:]
    corners = torch.cat((centre - extent / 2, centre + extent / 2), dim=1).clamp(0, 1)
    return corners * torch.tensor([width, height, width, height], dtype=corners.dtype, device=corners.device)
