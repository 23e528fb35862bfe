"""Image settings of a checkpoint, timm's or those of a transformers image processor -> Preprocessing; and back.

What a Preprocessing cannot say is refused by name. A processor is also tried: one picture goes through it and through
what was read of it, so a processor with a step of its own is found whatever its settings are called.
"""

import math
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from ..preprocessing import INTERPOLATIONS, Preprocessing, crop_pct_of, plausible

# settings of an image processor that are read here, or that change no pixel of an RGB picture
READ = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
        "image_mean", "image_std", "rescale_offset", "include_top", "crop_pct")  # fmt: skip
HARMLESS = ("image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format",
            "input_data_format", "default_to_square", "device", "return_tensors", "disable_grouping")  # fmt: skip
PIXEL_TOLERANCE = 0.02  # of the step between two neighbouring values of an 8-bit pixel
# The same where a processor knows no PIL (DINOv3's): it resizes floats, and PIL rounds to 8 bits, once for each axis.
ROUNDING_TOLERANCE = 1.1


def from_timm_config(model: nn.Module) -> Preprocessing:
    """Image settings of a timm model, from the data configuration saved with it.

    Raises:
        ValueError: images that are not square, or a crop mode other than center and squash.
    """
    data = timm.data.resolve_model_data_config(model)
    height, width = model.patch_embed.img_size
    if height != width:
        raise ValueError(
            f"the model takes {height}x{width} images; only square ones are supported: set teacher.image_size."
        )
    return Preprocessing(
        image_size=height,
        mean=data["mean"],
        std=data["std"],
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        crop_mode=data["crop_mode"],
        in_chans=model.in_chans,
    )


def size_of(processor: Any) -> int:
    """Side in pixels of the square images that a transformers image processor makes.

    Raises:
        ValueError: images that are not square, or of any size.
    """
    _, _, (height, width) = _geometry(processor)
    if height != width:
        raise ValueError(f"the image processor gives {height}x{width} images; only square ones are supported.")
    return height


def from_processor(processor: Any, model: nn.Module, *, image_size: int | None = None) -> Preprocessing:
    """Image settings of a transformers image processor (ViTImageProcessor, DeiTImageProcessor or one like them).

    Args:
        processor: on the PIL backend its pixels are those of `evaluation_pixels` but for float rounding.
        model: for its image size and channels.
        image_size: that the model is going to have, in pixels; None = its present one.

    Raises:
        ValueError: steps other than resize, centre crop, rescale and normalise, statistics that do not fit the values
            they are used on, or not the model's image size.
    """
    if image_size is None:
        image_size = model.patch_embed.img_size[0]
    crop_mode, resize, output = _geometry(processor)
    if output != (image_size, image_size) or resize < image_size:
        raise ValueError(
            f"the image processor gives {output[0]}x{output[1]} images (resized to {resize}), "
            f"the model takes {image_size}x{image_size}."
        )
    crop_pct = getattr(processor, "crop_pct", None)  # written by to_processor
    if crop_pct is None or math.floor(image_size / crop_pct) != resize:
        crop_pct = crop_pct_of(image_size, resize)
    names = {number: name for name, number in INTERPOLATIONS.items()}
    if processor.resample not in names:
        raise ValueError(f"the image processor's resample is {processor.resample!r}, expected one of {INTERPOLATIONS}.")
    mean, std = _statistics(processor, model.in_chans)
    preprocessing = Preprocessing(
        image_size=image_size,
        mean=mean,
        std=std,
        interpolation=names[processor.resample],
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        in_chans=model.in_chans,
    )
    if model.in_chans == 3:
        _check_same_pixels(processor, preprocessing)
    return preprocessing


def to_processor(preprocessing: Preprocessing):
    """The ViTImageProcessor that `from_processor` reads back as an equal Preprocessing."""
    from transformers import ViTImageProcessor

    image_size = preprocessing.image_size
    resize = preprocessing.resize_size
    squash = preprocessing.crop_mode == "squash"
    size = {"height": resize, "width": resize} if squash else {"shortest_edge": resize}
    return ViTImageProcessor(
        do_resize=True,
        size=size,
        resample=INTERPOLATIONS[preprocessing.interpolation],
        do_center_crop=not squash or resize != image_size,
        crop_size={"height": image_size, "width": image_size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(preprocessing.mean),
        image_std=list(preprocessing.std),
        crop_pct=preprocessing.crop_pct,  # transformers does not use it; pixels alone do not give its digits back
    )


def evaluation_pixels(preprocessing: Preprocessing, picture: Image.Image) -> torch.Tensor:
    """An RGB picture as `preprocessing` says, (3, image_size, image_size), by the library's transform that runs use."""
    transform = create_transform(
        input_size=(preprocessing.in_chans, preprocessing.image_size, preprocessing.image_size),
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )
    return transform(picture)


def _geometry(processor: Any) -> tuple[str, int, tuple[int, int]]:
    """How a picture becomes a square: crop mode, the (shorter) side it is resized to, height and width; pixels."""
    if not processor.do_resize:
        raise ValueError(
            f"the image processor has do_resize={processor.do_resize!r}: pictures would reach the model in any size. "
            f"Set it to true, with the size the model was trained with."
        )
    size = processor.size
    crop = processor.crop_size if getattr(processor, "do_center_crop", None) else None
    for side in (size.height, size.width, size.shortest_edge):
        if side is not None and type(side) is not int:
            raise ValueError(f"the image processor's size is {size}, expected whole numbers of pixels.")
    if size.height and size.height == size.width:
        resize = size.height
        crop_mode = "squash"
    elif size.shortest_edge and not size.longest_edge and crop:
        resize = size.shortest_edge
        crop_mode = "center"
    else:
        raise ValueError(f"the image processor's size {size} gives no square images (crop_size {crop}).")
    output = (crop.height, crop.width) if crop else (resize, resize)
    return crop_mode, resize, output


def _statistics(processor: Any, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel, of pixels in 0..1, by which the processor's steps from 8-bit pixels on are one step."""
    # rescale: pixel in 0..1 -> pixel x scale - offset
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise ValueError(f"the image processor's rescale_factor is {factor!r}, expected a number, usually 1/255.")
    scale = factor * 255
    if abs(scale - 1) < 1e-6:  # 1/255 has been written with few digits
        scale = 1.0
    offset = 1.0 if processor.do_rescale and getattr(processor, "rescale_offset", False) else 0.0
    # normalise: (value - mean) / std
    mean = (0.0,) * in_chans
    std = (1.0,) * in_chans
    if processor.do_normalize:
        mean = _per_channel("image_mean", processor.image_mean, in_chans)
        std = _per_channel("image_std", processor.image_std, in_chans)
    if getattr(processor, "include_top", False):  # EfficientNet's divides by std once more
        extra = _per_channel("image_std", processor.image_std, in_chans)
        std = tuple(first * second for first, second in zip(std, extra))
    # (x scale - offset - mean) / std = (x - (mean + offset) / scale) / (std / scale)
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"the image processor's rescale_factor is {factor!r}, expected a number above 0.")
    folded_mean = tuple((value + offset) / scale for value in mean)
    folded_std = tuple(value / scale for value in std)
    if not plausible(folded_mean, folded_std):
        raise ValueError(
            f"the image processor has do_rescale={processor.do_rescale!r} and "
            f"rescale_factor={processor.rescale_factor!r}: white ends at {scale:.3g}, and mean {mean}, std {std} are "
            "not of such values. Correct preprocessor_config.json: usually it is do_rescale true, rescale_factor 1/255."
        )
    return folded_mean, folded_std


def _per_channel(name: str, value: Any, in_chans: int) -> tuple[float, ...]:
    """One number for all channels, or a list of one for each."""
    values = list(value) if isinstance(value, list | tuple) else [value] * in_chans
    numbers = [number for number in values if isinstance(number, int | float) and not isinstance(number, bool)]
    if len(values) != in_chans or len(numbers) != in_chans:
        raise ValueError(
            f"the image processor's {name} is {value!r}, expected one number or {in_chans}, one for each channel."
        )
    return tuple(float(number) for number in numbers)


def _check_same_pixels(processor: Any, preprocessing: Preprocessing) -> None:
    """Refuse a processor that makes other pixels of a noisy picture than what was read of it."""
    resize = preprocessing.resize_size
    height = resize + resize // 2
    width = 2 * resize
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    ours = evaluation_pixels(preprocessing, picture)
    try:
        theirs = processor(images=picture, return_tensors="pt").pixel_values[0]
    except Exception as error:  # whatever a strange setting leads to
        raise ValueError(f"the image processor fails on a picture of {width}x{height}: {error!r}.") from error
    # a crop that leaves an odd number of pixels: timm rounds half of it to even, transformers down
    resized_width = resize if preprocessing.crop_mode == "squash" else int(resize * width / height)
    down = _half_to_even(resize - preprocessing.image_size)
    right = _half_to_even(resized_width - preprocessing.image_size)
    size = preprocessing.image_size
    different = True
    if theirs.shape == ours.shape:
        difference = (ours[:, : size - down, : size - right] - theirs[:, down:, right:]).abs()
        std_C11 = torch.tensor(preprocessing.std).view(-1, 1, 1)
        rounds = getattr(processor, "backend", "pil") == "pil"
        tolerance = PIXEL_TOLERANCE if rounds else ROUNDING_TOLERANCE
        different = not bool((difference * std_C11 * 255 < tolerance).all())
    if not different:
        return
    settings = processor.to_dict().items()
    others = [f"{key}={value!r}" for key, value in settings if value and key not in (*READ, *HARMLESS)]
    reason = f", maybe by its {', '.join(others)}" if others else ""
    raise ValueError(
        f"the image processor ({type(processor).__name__}) gives other pixels than resizing, cropping, rescaling and "
        f"normalising by its settings{reason}. Save a ViTImageProcessor that does what the model was trained with."
    )


def _half_to_even(remainder: int) -> int:
    """How many pixels further timm's crop starts than transformers', when so many are left over: 0 or 1."""
    return round(remainder / 2) - remainder // 2
