"""Pictures of several shapes on textured ground, with a mask of each, drawn with numpy alone (detect.data.path empty).

Colours, sizes and rotations say nothing of the class: only the outline does. Later shapes cover earlier ones. The same
parameters give the same bytes on every machine (common.py says how).
H, W = height and width, K = shapes of a picture.
"""

from typing import NamedTuple

import numpy as np

from .common import direction, fractions, random_bytes, stream

SHAPES = ("disc", "square", "triangle", "ring", "cross", "star")
RADIUS = (0.14, 0.3)  # smallest and largest radius of a shape, shares of the shorter side
LEAST_SEEN = 0.4  # share of a shape that must be left to be seen; of what is covered more, nothing is told
CONTRAST = 60  # levels by which a shape's colour differs from the ground in one channel at least
NOISE = 24  # levels from darkest to brightest of the grain
HALF = 0.8660254037844386  # sin 60 degrees


class Drawn(NamedTuple):
    """One picture."""

    image_HWC: np.ndarray  # uint8
    shape_K: np.ndarray  # int64, index in SHAPES
    mask_KHW: np.ndarray  # bool, what is seen of each


def draw(seed: int, kind: int, index: int, size: int, shapes: int, objects: int) -> Drawn:
    """Picture `index` of a split (kind TRAIN or VAL).

    Args:
        size: of the longer side, pixels; pictures are square, wide and high in turn.
        shapes: how many of SHAPES there are.
        objects: in a picture at most; each has at least one.
    """
    bits = stream(seed, kind, 0, index)
    height, width = size_of(index, size)
    # of the picture: number of shapes, ground and its gradient; of each shape: class, place, radius, rotation, colour
    u = fractions(bits, 8 + 9 * objects)
    count = 1 + int(u[0] * objects)
    ground_3 = 40 + np.floor(176 * u[1:4])
    slope_3 = np.floor(60 * (u[4:7] - 0.5))
    row_H = (np.arange(height) + 0.5) / height
    image = ground_3 + slope_3 * row_H[:, None, None] + np.zeros((height, width, 3))
    label_HW = np.full((height, width), -1)
    whole = []
    chosen = []
    for number in range(count):
        v = u[8 + 9 * number : 17 + 9 * number]
        shape = int(v[0] * shapes)
        inside_HW = _inside(SHAPES[shape], v, height, width)
        colour_3 = np.floor(256 * v[5:8])
        channel = int(v[8] * 3)
        # one channel is far from the ground: brighter where there is room, else darker
        bright = ground_3[channel] + CONTRAST + np.floor((196 - ground_3[channel]) * v[5])
        dark = ground_3[channel] - CONTRAST
        colour_3[channel] = bright if ground_3[channel] < 128 else max(dark, 0)
        image[inside_HW] = colour_3
        label_HW[inside_HW] = number
        whole.append(int(inside_HW.sum()))
        chosen.append(shape)
    grain = random_bytes(bits, height * width * 3).reshape(height, width, 3)
    image = (image + (grain.astype(np.int64) * NOISE >> 8) - NOISE // 2).clip(0, 255).astype(np.uint8)
    seen = [number for number in range(count) if (label_HW == number).sum() > LEAST_SEEN * whole[number]]
    masks = np.stack([label_HW == number for number in seen])  # the last one is never covered
    return Drawn(image, np.array([chosen[number] for number in seen]), masks)


def size_of(index: int, size: int) -> tuple[int, int]:
    """Height and width of picture `index`, the longer side being `size` pixels."""
    shorter = size * 3 // 4
    return ((size, size), (shorter, size), (size, shorter))[index % 3]


def _inside(shape: str, v: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) bool, the pixels of a shape whose place, radius and rotation are v[1:5], fractions of their ranges."""
    radius = (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * v[3]) * min(height, width)
    row = radius + (height - 2 * radius) * v[1]
    column = radius + (width - 2 * radius) * v[2]
    cos, sin = direction(v[4:5])
    y_H1 = ((np.arange(height) + 0.5 - row) / radius)[:, None]
    x_W = (np.arange(width) + 0.5 - column) / radius
    # place in the shape's own axes, its radius being 1
    a = np.abs(cos * x_W + sin * y_H1)
    signed = cos * y_H1 - sin * x_W
    b = np.abs(signed)
    square = a * a + b * b
    if shape == "disc":
        return square <= 1
    if shape == "square":
        return np.maximum(a, b) <= 0.75
    if shape == "triangle":  # equilateral, a corner at signed = 1
        return (signed >= -0.5) & (HALF * a + 0.5 * signed <= 0.5)
    if shape == "ring":
        return (square <= 1) & (square >= 0.3)
    if shape == "cross":
        return (np.minimum(a, b) <= 0.25) & (np.maximum(a, b) <= 0.95)
    return np.sqrt(a) + np.sqrt(b) <= 1.05  # a star of four points
