"""What is looked at before anything of a checkpoint is used: its JSON, its sizes, every number of its weights.

A config.json can ask for a billion layers, and a weight that is not finite spreads to everything it teaches.
"""

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .hub import CheckpointFiles, NotCached, Weights

BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers?)\.(\d+)\.")
DAMAGED = "Download it again, or save it anew with the library it comes from."
NOTHING = r"(?!)"  # matches no name
REASON_SHOWN = 300  # characters of what a library says
LARGEST_PATCH = 32  # pixels, of timm's architectures, whose config.json need not say it


def read_object(path: Path, files: CheckpointFiles) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        files: the checkpoint it belongs to, for messages.

    Raises:
        ValueError: not JSON, or no object; the file is named.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} of {files} is truncated or no JSON: {one_line(error)}. {DAMAGED}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} of {files} holds a {type(values).__name__}, expected an object of settings.")
    return values


def checked_weights(
    files: CheckpointFiles, config: Mapping[str, Any], keys: Mapping[str, str], left_out: str = NOTHING
) -> Weights:
    """The weights, once they are known to be as many as `config` asks for, floats, and finite; names without wrappers.

    Args:
        config: settings of a config.json.
        keys: what it calls depth, width, mlp_dim, heads, image_size, patch_size, in_chans and num_classes.
        left_out: regular expression of tensors that nobody uses: they may be anything.

    Raises:
        ValueError: naming the setting or the tensor that is wrong.
    """
    weights = _opened(files)
    weights.unwrap()
    sizes = {}
    for name, key in keys.items():
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, list) and value:  # libraries allow [224, 224]; sides that differ are refused by name later
            value = value[0]
        sizes[name] = value
    for name, value in sizes.items():
        smallest = 0 if name == "num_classes" else 1
        if type(value) is not int or value < smallest:
            raise ValueError(
                f"config.json of {files} has {keys[name]}={reprlib.repr(value)}, expected a whole number of at least 1."
            )
    used = [name for name in weights.names() if not re.search(left_out, name)]
    _check_counts(files, sizes, keys, weights, used)
    for name in used:
        try:
            tensor = weights.read(name)
        except ValueError as error:  # values that are not finite
            raise ValueError(f"{error} {DAMAGED}") from None
        if not tensor.is_floating_point():
            raise ValueError(f"{files} has {name} as {tensor.dtype}; expected floating-point weights.")
    return weights


def load_state(directory: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of DIRECTORY/model.safetensors, once names, shapes and types are those of `expected`.

    Raises:
        ValueError: naming the first tensor that differs or is not finite.
    """
    weights = Weights(CheckpointFiles(str(directory)))
    weights.check(dict(expected))
    return {name: weights.read(name) for name in expected}


def _opened(files: CheckpointFiles) -> Weights:
    try:
        files.weights()  # says itself what to do with pickled weights
    except RecursionError:
        raise ValueError(f"{files}: the index of its weights is nested too deeply. {DAMAGED}") from None
    try:
        return Weights(files)
    except NotCached:
        raise
    except ValueError as error:
        raise ValueError(f"{error} {DAMAGED}") from None


def _check_counts(
    files: CheckpointFiles, sizes: Mapping[str, int], keys: Mapping[str, str], weights: Weights, used: Sequence[str]
) -> None:
    """Refuse sizes that take more weights than there are in `used`; what is not given counts as 1, or not at all."""
    width = sizes.get("width", 1)
    patch = sizes.get("patch_size", 1)
    # numbers that a model of this size holds at the very least
    at_least = {
        # attention of one block: query, key, value and output, D x D each
        "width": 4 * width**2,
        # attention and both layers of the MLP, D x H each, in every block
        "depth": sizes.get("depth", 0) * (4 * width**2 + 2 * width * sizes.get("mlp_dim", 0)),
        # the head, classes x D
        "num_classes": sizes.get("num_classes", 0) * width,
        # the patch embedding, D kernels of channels x patch x patch
        "in_chans": sizes.get("in_chans", 0) * patch**2 * width,
        # position embeddings, D for each of (image / patch)^2 patches
        "image_size": (sizes.get("image_size", 0) // sizes.get("patch_size", LARGEST_PATCH)) ** 2 * width,
    }
    held = sum(math.prod(weights.shape(name)) for name in used)
    numbered = (BLOCK.search(name) for name in used)
    blocks = len({int(match[1]) for match in numbered if match})
    too_large = [name for name, count in at_least.items() if name in sizes and count > held]
    if blocks and sizes.get("depth", blocks) != blocks:
        setting = "depth"
        available = f"{blocks} blocks"
    elif too_large:
        setting = too_large[0]
        available = f"{held:,} weights"
    else:
        return
    raise ValueError(
        f"config.json of {files} has {keys[setting]}={sizes[setting]}, which does not fit the {available} there are. "
        f"Take the config.json that was saved with these weights."
    )


def one_line(error: Exception) -> str:
    """What a library says, without line breaks and of a length that can be read."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).split())
    if len(text) > REASON_SHOWN:
        return f"{text[:REASON_SHOWN]} ..."
    return text
