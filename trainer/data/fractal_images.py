"""Pictures of iterated function systems, drawn with numpy alone; run as a script it fills a part of a data set.

A class is 2 to 5 affine maps; a picture is the density of points that random chains of these maps visit (the chaos
game; Barnsley, Fractals Everywhere, 1988; for image classes Kataoka et al., Pre-training without Natural Images, 2020).
The same parameters give the same bytes on every machine: random bits come from Philox, whose stream is fixed, and all
is made of exactly rounded operations (+ - * / sqrt, integers) and sums of integers.
N = images of a batch, M = maps of a class, W = walkers, T = steps, S = size.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAPS = (2, 5)  # fewest and most maps of a class
STRETCH = (0.35, 0.85)  # singular values of a map: below 1, so that every chain ends on the attractor
JITTER = 0.12  # relative change of each number of a map at full spread; 0.85 x (1 + sqrt(2) x 0.12) < 1 keeps the above
LEAST_SPREAD = 0.05  # of difficulty 0: room for two disjoint splits
LEAST_SCALE, SHIFT = 0.55, 0.15  # smallest scale, and largest shift in half image widths, at full spread
COVERAGE = (0.25, 0.8)  # share of a 16 x 16 grid that the attractor of a class covers
CELLS = 8  # the ranges of rotation and scale are cut into 8 x 8 cells, black and white like a chessboard
POINTS = 1.5  # per pixel
WALKERS, WARM_UP = 128, 16
BATCH_POINTS = 1 << 20
ZERO, UNIT = 64, 32  # a stored value v stands for (v - 64) / 32 standard deviations above the mean of the picture
LEVEL, CONTRAST = (70, 150), (16, 44)  # mean and standard deviation of a channel, 0 to 255
NOISE = 0.5  # largest amplitude of the noise, standard deviations
CLASS, TRAIN, VAL = range(3)  # what a random stream is for
FIXED_POINT = 1 << 14
_TONE = np.round(256 * np.log2(1 + np.arange(256))).astype(np.int64)  # points in a pixel -> brightness


class Maps(NamedTuple):
    """The iterated function system of a class."""

    numbers_M6: np.ndarray  # (x, y) -> (a x + b y + e, c x + d y + f) as a, b, c, d, e, f
    chosen_256: np.ndarray  # random byte -> the map it chooses; maps are chosen by the area of their image


class Poses(NamedTuple):
    """What tells the images of a class apart, each as a fraction of its range, 0 to below 1."""

    rotation_N: np.ndarray
    scale_N: np.ndarray
    shift_N2: np.ndarray
    noise_N: np.ndarray
    palette_N23: np.ndarray  # level and contrast of the three channels
    jitter_NM6: np.ndarray


def stream(seed: int, kind: int, label: int, index: int = 0) -> np.random.Philox:
    """Random bits of one class (kind CLASS) or of one image of a split (TRAIN, VAL)."""
    return np.random.Philox(key=np.array([seed % 2**64, kind << 60 | label << 32 | index], dtype=np.uint64))


def draw_maps(seed: int, label: int) -> Maps:
    """The maps of class `label`: drawn until their attractor covers enough of the picture, and not too much."""
    bits = stream(seed, CLASS, label)
    while True:
        count = MAPS[0] + int(_fractions(bits, 1)[0] * (MAPS[1] - MAPS[0] + 1))
        u_M7 = _fractions(bits, count * 7).reshape(count, 7)
        cos_a, sin_a = direction(u_M7[:, 0])
        cos_b, sin_b = direction(u_M7[:, 1])
        s1, s2 = (STRETCH[0] + (STRETCH[1] - STRETCH[0]) * u_M7[:, 2:4]).T
        flipped = np.where(u_M7[:, 4] < 0.5, -s2, s2)
        matrix = (  # rotation a x diag(s1, flipped) x rotation b
            cos_a * s1 * cos_b - sin_a * flipped * sin_b,
            -cos_a * s1 * sin_b - sin_a * flipped * cos_b,
            sin_a * s1 * cos_b + cos_a * flipped * sin_b,
            -sin_a * s1 * sin_b + cos_a * flipped * cos_b,
        )
        maps = Maps(np.stack([*matrix, *(2 * u_M7[:, 5:7] - 1).T], axis=1), _choices(s1 * s2 + 0.02))
        points_2TNW = _walk(maps.numbers_M6[None], maps.chosen_256, [bits], steps=16)
        upright = np.array([[1.0], [0.0]]), np.ones(1), np.zeros((2, 1))
        if COVERAGE[0] < (_counts(points_2TNW, *upright, 16) > 0).mean() < COVERAGE[1]:
            return maps


def draw_poses(bits: list[np.random.Philox], kind: int, maps: int) -> Poses:
    """Parameters of one image per stream. Training images (kind TRAIN) lie in the black cells, validation in the white.

    Both splits cover each range evenly, but no pair of rotation and scale can occur in both.
    """
    u = np.stack([_fractions(one, 13 + 6 * maps) for one in bits])
    row_N = (u[:, 0] * CELLS).astype(np.int64)
    column_N = 2 * (u[:, 1] * (CELLS // 2)).astype(np.int64) + (row_N + (kind == VAL)) % 2
    return Poses(
        rotation_N=(row_N + u[:, 2]) / CELLS,
        scale_N=(column_N + u[:, 3]) / CELLS,
        shift_N2=u[:, 4:6],
        noise_N=u[:, 6],
        palette_N23=u[:, 7:13].reshape(-1, 2, 3),
        jitter_NM6=u[:, 13:].reshape(-1, maps, 6),
    )


def draw_images(
    seed: int, kind: int, label: int, indices: range, size: int, difficulty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Images `indices` of class `label` in a split (kind TRAIN or VAL).

    Returns:
        (N, size, size) uint8 brightness, in units told by ZERO and UNIT; (N, 2, 3) uint8 level and contrast of each
        channel, which `colours` applies.
    """
    maps = draw_maps(seed, label)
    steps = max(8, round(POINTS * size**2 / WALKERS))
    each = max(1, BATCH_POINTS // (steps * WALKERS))
    made = []
    for at in range(0, len(indices), each):
        bits = [stream(seed, kind, label, index) for index in indices[at : at + each]]
        made.append(_draw_batch(maps, bits, kind, steps, size, difficulty))
    images, palettes = zip(*made)
    return np.concatenate(images), np.concatenate(palettes)


def colours(palette_23: np.ndarray) -> np.ndarray:
    """(256, 3) uint8 RGB of each stored value, for the level and contrast of an image."""
    level_3, contrast_3 = palette_23.astype(np.int64)
    table_V3 = level_3 + (np.arange(256)[:, None] - ZERO) * contrast_3 // UNIT
    return table_V3.clip(0, 255).astype(np.uint8)


def direction(turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of 2 pi x turns, by Taylor's series within an eighth of a turn: libraries differ in rounding."""
    quarter = np.floor(turns * 4 + 0.5)
    x = (turns - quarter / 4) * (2 * 3.141592653589793)
    cos, sin = np.zeros_like(x), np.zeros_like(x)
    for k in range(16, -1, -2):  # Horner's rule on the even and the odd powers
        cos = 1 - cos * x * x / ((k + 1) * (k + 2))
        sin = 1 - sin * x * x / ((k + 2) * (k + 3))
    sin = sin * x
    q = quarter.astype(np.int64) % 4
    return np.choose(q, [cos, -sin, -cos, sin]), np.choose(q, [sin, cos, -sin, -cos])


def _draw_batch(
    maps: Maps, bits: list[np.random.Philox], kind: int, steps: int, size: int, difficulty: float
) -> tuple[np.ndarray, np.ndarray]:
    poses = draw_poses(bits, kind, len(maps.numbers_M6))
    spread = LEAST_SPREAD + (1 - LEAST_SPREAD) * difficulty
    numbers_NM6 = maps.numbers_M6 * (1 + spread * JITTER * (2 * poses.jitter_NM6 - 1))
    points_2TNW = _walk(numbers_NM6, maps.chosen_256, bits, steps)
    turned_2N = np.stack(direction(spread * (poses.rotation_N - 0.5)))
    scale_N = 1 - spread * (1 - LEAST_SCALE) * poses.scale_N
    shift_2N = spread * SHIFT * (2 * poses.shift_N2.T - 1)
    counts_NSS = _counts(points_2TNW, turned_2N, scale_N, shift_2N, size)
    noise_NSS = np.stack([_bytes(one, size * size).reshape(size, size) for one in bits])
    images_NSS = _standardised(counts_NSS, noise_NSS, NOISE * poses.noise_N)
    low, high = (np.array(pair, dtype=np.float64)[:, None] for pair in zip(LEVEL, CONTRAST))
    return images_NSS, np.floor(low + (high - low) * poses.palette_N23 + 0.5).astype(np.uint8)


def _walk(numbers_NM6: np.ndarray, chosen_256: np.ndarray, bits: list[np.random.Philox], steps: int) -> np.ndarray:
    """(2, T, N, W) float32: x and y of every walker at every step, after a warm-up from the origin."""
    n, count = numbers_NM6.shape[:2]
    total = steps + WARM_UP
    bytes_NTW = np.stack([_bytes(one, total * WALKERS) for one in bits]).reshape(n, total, WALKERS)
    of_image_N1 = (np.arange(n) * count)[:, None]
    numbers = np.ascontiguousarray(numbers_NM6.reshape(n * count, 6).T, dtype=np.float32)
    points = np.empty((2, steps, n, WALKERS), np.float32)
    x = y = np.zeros((n, WALKERS), np.float32)
    for step in range(total):
        a, b, c, d, e, f = numbers.take(chosen_256[bytes_NTW[:, step]] + of_image_N1, axis=1)
        a *= x
        b *= y
        c *= x
        d *= y
        a += b
        c += d
        x, y = np.add(a, e, out=a), np.add(c, f, out=c)
        if step >= WARM_UP:
            points[:, step - WARM_UP] = x, y
    return points


def _counts(
    points_2TNW: np.ndarray, turned_2N: np.ndarray, scale_N: np.ndarray, shift_2N: np.ndarray, size: int
) -> np.ndarray:
    """How many points fall on each pixel, (N, S, S). Points outside are lost.

    The points are centred on their mean, brought to a root mean square radius of scale / 2 half widths, turned (cosine
    and sine in turned_2N) and shifted (half widths).
    """
    whole = (points_2TNW * np.float32(FIXED_POINT)).astype(np.int64)
    amount = whole.shape[1] * whole.shape[3]
    mean_2N = whole.sum(axis=(1, 3)) // amount
    whole -= mean_2N[:, None, :, None]
    radius_N = np.sqrt((whole * whole).sum(axis=(0, 1, 3)) / amount) + 1
    cos_N, sin_N = turned_2N * (scale_N * (0.25 * size) * FIXED_POINT / radius_N)
    middle_2N = mean_2N / FIXED_POINT
    offset_2N = (1 + shift_2N) * (0.5 * size) + 1  # one pixel more on each side takes what falls outside
    places = []
    for of_x_N, of_y_N, offset_N in zip((cos_N, sin_N), (-sin_N, cos_N), offset_2N):
        constant_N = offset_N - of_x_N * middle_2N[0] - of_y_N * middle_2N[1]
        place_TNW = points_2TNW[0] * of_x_N.astype(np.float32)[:, None]
        place_TNW += points_2TNW[1] * of_y_N.astype(np.float32)[:, None]
        place_TNW += constant_N.astype(np.float32)[:, None]
        places.append(place_TNW.clip(0, size + 1.5, out=place_TNW).astype(np.int32))
    n, wide = points_2TNW.shape[2], size + 2
    flat_TNW = (np.arange(n, dtype=np.int32)[:, None] * wide + places[0]) * wide + places[1]
    counts = np.bincount(flat_TNW.ravel(), minlength=n * wide * wide).reshape(n, wide, wide)
    return counts[:, 1:-1, 1:-1]


def _standardised(counts_NSS: np.ndarray, noise_NSS: np.ndarray, amplitude_N: np.ndarray) -> np.ndarray:
    """Logarithm of the counts plus noise, as uint8 of the same mean and (nearly) standard deviation for every image."""
    tone_NSS = _TONE[np.minimum(counts_NSS, 255)]
    pixels = tone_NSS.shape[1] * tone_NSS.shape[2]
    sum_N = tone_NSS.sum(axis=(1, 2))
    square_N = (tone_NSS * tone_NSS).sum(axis=(1, 2))
    gain_N = UNIT / (np.sqrt((square_N / pixels) - (sum_N / pixels) ** 2) + 1)
    start_N = ZERO + 0.5 - gain_N * (sum_N / pixels) - amplitude_N * UNIT
    value = tone_NSS * gain_N[:, None, None]
    value += noise_NSS * (amplitude_N * (2 * UNIT / 255))[:, None, None]
    value += start_N[:, None, None]
    return value.clip(0, 255, out=value).astype(np.uint8)


def _choices(areas_M: np.ndarray) -> np.ndarray:
    """(256,) the map of each random byte, in proportion to the areas."""
    shares = [int(256 * area / sum(areas_M.tolist())) for area in areas_M.tolist()]
    shares[int(np.argmax(areas_M))] += 256 - sum(shares)
    return np.repeat(np.arange(len(shares)), shares)


def _bytes(bits: np.random.Philox, count: int) -> np.ndarray:
    return bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]


def _fractions(bits: np.random.Philox, count: int) -> np.ndarray:
    """`count` float64 from 0 to below 1."""
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


def _fill(asked: dict) -> None:
    """Draw all images of some classes into the prepared files of a folder."""
    folder, per_class = Path(asked["folder"]), asked["per_class"]
    images, palettes = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("images", "palettes"))
    for label in range(*asked["labels"]):
        if os.getppid() != asked["maker"]:  # it was killed: nobody waits for the rest
            sys.exit(1)
        rows, indices = slice(label * per_class, (label + 1) * per_class), range(per_class)
        images[rows], palettes[rows] = draw_images(
            asked["seed"], asked["kind"], label, indices, asked["size"], asked["difficulty"]
        )


if __name__ == "__main__":
    for warning in (signal.SIGTERM, signal.SIGUSR1):  # sent to a whole job step, and meant for its ranks
        signal.signal(warning, signal.SIG_IGN)
    _fill(json.loads(sys.argv[1]))
