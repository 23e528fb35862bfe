"""Another image size for a model: its positions follow, as in timm."""

import warnings

import torch
from torch import Tensor, nn


def set_image_size(model: nn.Module, image_size: int) -> dict[str, Tensor]:
    """Give a timm model images of this side in pixels, in place.

    Learned positions are resampled as timm does it (resample_abs_pos_embed: bicubic, with antialiasing; tables of
    relative positions by resize_rel_pos_bias_table), also where transformers' own model interpolates otherwise. Rotary
    embeddings are computed for the new grid.

    Returns:
        those tensors of its state dict that changed, as they were.

    Raises:
        ValueError: a size that is no multiple of the patch size; the nearest ones are named.
    """
    _check_multiple(image_size, model.patch_embed.patch_size[0])
    if (image_size, image_size) == tuple(model.patch_embed.img_size):
        return {}
    before = dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of how timm indexes the tables of relative positions
        model.set_input_size(img_size=(image_size, image_size))
    return {name: before[name] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def _check_multiple(image_size: int, patch_size: int) -> None:
    if image_size >= patch_size and image_size % patch_size == 0:
        return
    below = image_size // patch_size * patch_size
    nearest = [str(size) for size in (below, below + patch_size) if size >= patch_size]
    raise ValueError(
        f"teacher.image_size {image_size} is no multiple of the teacher's patch size {patch_size}: "
        f"the nearest are {' and '.join(nearest)}."
    )
