"""The training transform: timm's, with every draw in timm's order, on bytes instead of floats.

What a picture goes through, and what each part is:
- the random crop is drawn by timm from the size alone, before pixels are decoded, and resized by torch, whose bytes are
  Pillow's to a level in less than a value of a hundred; a JPEG whose crop is many times larger than the result is
  decoded smaller;
- flip, RandAugment or colour jitter are timm's and torchvision's on the 8-bit result, with the shears and translations
  of warps.py;
- random erasing is drawn by timm, and laid over the batch after it is normalised, on the device that trains.

B = batch, C = channels, H, W = height and width, P = rectangles, N = all values in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor

from models.pictures.transform import create_options
from models.preprocessing import INTERPOLATIONS, Preprocessing
from trainer.config.data import AugmentConfig
from trainer.data.decode import Pixels
from trainer.data.warps import FASTER

# a crop is decoded at 1/2, 1/4 or 1/8 where that leaves it at least so many times the size it is resized to: at less
# the filter of the decoder would show beside that of the resize
SPARE = 2
SHRINKS = (8, 4, 2)
CACHED = 2**18  # float32 values, 1 MiB
TORCH_MODES = ("bilinear", "bicubic")  # those that torch resizes as Pillow does


@dataclass(frozen=True)
class Crop:
    """A part of a picture, in pixels of the one that is stored."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Erased:
    """Rectangles of a batch that noise takes the place of."""

    places_P5: Tensor  # int64: image, top, left, height, width
    noise_N: Tensor  # float32, one rectangle (C, height, width) after the other


class TrainTransform:
    """One picture at a time: crop() draws, view() and rectangles() draw on, in this order, from one seeded state."""

    def __init__(self, pre: Preprocessing, aug: AugmentConfig):
        self.pre = pre
        primary, secondary, final = create_transform(
            **create_options(pre),
            is_training=True,
            separate=True,
            scale=aug.scale,
            ratio=aug.ratio,
            hflip=aug.hflip,
            color_jitter=aug.color_jitter or None,
            auto_augment=aug.rand_augment or None,
            re_prob=aug.random_erasing,
            re_mode="pixel",  # noise per pixel, as DeiT and the m2mKD recipe
        )
        self.transforms = [*primary.transforms, *secondary.transforms, *final.transforms]  # as timm would have them
        self.scale, self.ratio = aug.scale, aug.ratio
        self.hflip = aug.hflip
        self.colours = secondary.transforms
        self.erasing = final.transforms[-1] if aug.random_erasing else None
        _mend(self.colours, pre)

    def __call__(self, image: Image.Image) -> Tensor:
        """A PIL RGB image -> float32 (C, image_size, image_size), drawn from the state as it is."""
        crop = self.crop(image.width, image.height)
        view_CHW = self.view(Pixels(np.array(image), image.width, image.height), crop)
        erased = gathered([self.rectangle()])
        return finish(view_CHW[None], erased, self.pre)[0]

    def crop(self, width: int, height: int) -> Crop:
        """Draw the part of a picture of this size that is taken."""
        size_only = torch.empty(1).expand(height, width)  # takes no memory
        top, left, crop_height, crop_width = RandomResizedCropAndInterpolation.get_params(
            size_only, self.scale, self.ratio
        )
        # of 1 x 1 pixels, or of 8 x 8 at a scale of 0.001, timm rounds to a crop of none, which would be black
        return Crop(min(top, height - 1), min(left, width - 1), max(crop_height, 1), max(crop_width, 1))

    def shrink(self, crop: Crop) -> int:
        """How many times smaller a picture may be decoded for this crop."""
        wanted = SPARE * self.pre.image_size
        for shrink in SHRINKS:
            if min(crop.height, crop.width) >= wanted * shrink:
                return shrink
        return 1

    def view(self, pixels: Pixels, crop: Crop) -> Tensor:
        """Crop and resize, flip, and change colours: uint8 (C, image_size, image_size)."""
        view_CHW = self._resized(_part(pixels, crop))
        if self.hflip > 0 and torch.rand(1) < self.hflip:  # as torchvision's RandomHorizontalFlip
            view_CHW = view_CHW.flip(-1)
        return self.coloured(view_CHW) if self.colours else view_CHW

    def coloured(self, view_CHW: Tensor) -> Tensor:
        """RandAugment or colour jitter of a picture of bytes."""
        # channel by channel: a quarter of the time of bringing the channels of every pixel together
        image = Image.merge("RGB", [Image.fromarray(channel_HW) for channel_HW in view_CHW.numpy()])
        for change in self.colours:
            image = change(image)
        return torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))

    def rectangle(self) -> list[tuple[tuple[slice, ...], Tensor]]:
        """Draw what random erasing lays over the picture: places in it and the noise for each."""
        if self.erasing is None:
            return []
        canvas = _Canvas(self.pre)
        self.erasing(canvas)
        return canvas.written

    def _resized(self, part_HWC: np.ndarray) -> Tensor:
        size = self.pre.image_size
        if part_HWC.shape[:2] == (size, size):  # Pillow leaves it as it is, too
            return torch.from_numpy(part_HWC).permute(2, 0, 1)
        if self.pre.interpolation in TORCH_MODES:
            part_1CHW = torch.from_numpy(part_HWC).permute(2, 0, 1)[None]
            return F.interpolate(part_1CHW, (size, size), mode=self.pre.interpolation, antialias=True)[0]
        image = Image.fromarray(np.ascontiguousarray(part_HWC))
        resized = image.resize((size, size), INTERPOLATIONS[self.pre.interpolation])
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def gathered(rectangles: Sequence[Sequence[tuple[tuple[slice, ...], Tensor]]]) -> Erased:
    """The rectangles of a batch in two tensors: one each would need a file handle each between processes."""
    places = []
    noise = [torch.empty(0)]
    for number, written in enumerate(rectangles):
        for (_, rows, columns), values_CHW in written:
            places.append((number, rows.start, columns.start, *values_CHW.shape[1:]))
            noise.append(values_CHW.flatten())
    return Erased(torch.tensor(places, dtype=torch.int64).reshape(-1, 5), torch.cat(noise))


def finish(images_BCHW: Tensor, erased: Erased, pre: Preprocessing, device: torch.device | str = "cpu") -> Tensor:
    """Bytes to normalised float32 with what is erased, on the device; the bytes travel, a quarter of the floats.

    The same values as (x / 255 - mean) / std to a few units of the last place.
    """
    bytes_BCHW = images_BCHW.to(device, non_blocking=True)
    mean_C11, std_C11 = (
        torch.tensor(values, dtype=torch.float64).mul(255).float()[:, None, None].to(device, non_blocking=True)
        for values in (pre.mean, pre.std)
    )
    images_BCHW = torch.empty(bytes_BCHW.shape, device=device)
    # on a processor as many images at a time as its cache holds
    together = len(bytes_BCHW)
    if images_BCHW.device.type == "cpu":
        together = max(1, CACHED // images_BCHW[0].numel())
    for part, values in zip(images_BCHW.split(together), bytes_BCHW.split(together), strict=True):
        part.copy_(values).sub_(mean_C11).div_(std_C11)
    noise_N = erased.noise_N.to(device, non_blocking=True)
    start = 0
    for image, top, left, height, width in erased.places_P5.tolist():
        end = start + pre.in_chans * height * width
        noise_CHW = noise_N[start:end].view(pre.in_chans, height, width)
        images_BCHW[image, :, top : top + height, left : left + width] = noise_CHW
        start = end
    return images_BCHW


class _Canvas:
    """What timm's RandomErasing takes for a normalised picture: it notes what is written to it."""

    dtype = torch.float32

    def __init__(self, pre: Preprocessing):
        self.shape = (pre.in_chans, pre.image_size, pre.image_size)
        self.written: list[tuple[tuple[slice, ...], Tensor]] = []

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, place: tuple[slice, ...], noise: Tensor) -> None:
        self.written.append((place, noise))


def _part(pixels: Pixels, crop: Crop) -> np.ndarray:
    """The crop of a picture that may be decoded smaller: its edges to the nearest pixel there, and one at the least."""
    height, width, _ = pixels.values_HWC.shape
    top = min(round(crop.top / pixels.shrink), height - 1)
    left = min(round(crop.left / pixels.shrink), width - 1)
    bottom = max(top + 1, round((crop.top + crop.height) / pixels.shrink))
    right = max(left + 1, round((crop.left + crop.width) / pixels.shrink))
    return pixels.values_HWC[top:bottom, left:right]


def _mend(steps: Sequence[Any], pre: Preprocessing) -> None:
    """Give timm's operations what follows, in place, where they have it not.

    - Posterize to 0 bits: at its greatest strength (about one image in a thousand of rand-m9-mstd0.5-inc1) timm 1.0.31
      asks Pillow for 0 bits, which was a black image until Pillow 13: "bits must be between or equal to 1 and 8". To go
      when timm does not ask.
    - Shears and translations in a fraction of the time.
    - Lanczos, box and hamming can resize a picture but not turn or shear it: Pillow refuses; bicubic takes their place.
    """
    for step in steps:
        ops = list(getattr(step, "ops", ()))  # RandAugment, AugMix
        for pair in getattr(step, "policy", ()):  # AutoAugment
            ops += pair
        for op in ops:
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = posterize
            op.aug_fn = FASTER.get(op.aug_fn, op.aug_fn)
            if pre.interpolation in ("lanczos", "box", "hamming"):
                op.kwargs["resample"] = Image.Resampling.BICUBIC


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)  # as Pillow before 13
    return auto_augment.posterize(image, bits_to_keep, **options)
