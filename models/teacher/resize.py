"""Another image size for a teacher: its positions follow as in timm, its weights stay those of the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch


def with_image_size(teacher: Any, image_size: int) -> Any:
    """The same Teacher (load.py), changed in place so that its images have this side in pixels.

    Learned positions are resampled as timm does it (resample_abs_pos_embed: bicubic, with antialiasing; tables of
    relative positions by resize_rel_pos_bias_table), also where transformers' own model interpolates otherwise; rotary
    embeddings are computed for the new grid. The crop of its preprocessing keeps its share of the image. What the
    checkpoint has otherwise is kept in `as_saved`, so that the fingerprint stays that of its weights.

    Args:
        teacher: its preprocessing may be None as yet.

    Raises:
        ValueError: a size that is no multiple of the patch size; the nearest ones are named.
    """
    model = teacher.model
    _check_multiple(image_size, model.patch_embed.patch_size[0])
    before = dict(model.state_dict())
    if (image_size, image_size) != tuple(model.patch_embed.img_size):
        model.set_input_size(img_size=(image_size, image_size))
        for name, value in model.state_dict().items():
            if not torch.equal(value, before[name]) and name not in teacher.as_saved:
                teacher.as_saved[name] = before[name]
    if teacher.preprocessing is not None:
        teacher.preprocessing = replace(teacher.preprocessing, image_size=image_size)
    return teacher


def _check_multiple(image_size: int, patch_size: int) -> None:
    if image_size >= patch_size and image_size % patch_size == 0:
        return
    below = image_size // patch_size * patch_size
    nearest = [str(size) for size in (below, below + patch_size) if size >= patch_size]
    raise ValueError(
        f"teacher.image_size {image_size} is no multiple of the teacher's patch size {patch_size}: "
        f"the nearest are {' and '.join(nearest)}."
    )
