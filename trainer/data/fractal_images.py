"""Pictures of iterated function systems, drawn with numpy alone; run as a script it fills a part of a data set.

A class is 2 to 5 affine maps; a picture is the density of points that random chains of these maps visit (the chaos
game; Barnsley, Fractals Everywhere, 1988; for image classes Kataoka et al., Pre-training without Natural Images, 2020).
The same parameters give the same bytes on every machine: random bits come from Philox, whose stream is fixed, and all
is made of exactly rounded operations (+ - * / sqrt, integers) and sums of integers.
N = images of a batch, M = maps of a class, K = N x M, W = walkers, T = steps, S = size.
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
LEAST_SCALE = 0.55  # smallest scale at full spread
SHIFT = 0.15  # largest shift at full spread, half image widths
COVERAGE = (0.25, 0.8)  # share of a 16 x 16 grid that the attractor of a class covers
CELLS = 8  # the ranges of rotation and scale are cut into 8 x 8 cells, black and white like a chessboard
POINTS = 1.5  # per pixel
WALKERS = 128  # chains side by side
WARM_UP = 16  # steps of a chain until it is on the attractor; they are not drawn
BATCH_POINTS = 1 << 20  # points drawn at a time: what the memory of a process goes by
# a stored value v stands for (v - ZERO) / UNIT standard deviations above the mean of the picture
ZERO = 64
UNIT = 32
LEVEL = (70, 150)  # lowest and highest mean of a channel, 0 to 255
CONTRAST = (16, 44)  # lowest and highest standard deviation of a channel
NOISE = 0.5  # largest amplitude of the noise, standard deviations
CLASS, TRAIN, VAL = range(3)  # what a random stream is for
FIXED_POINT = 1 << 14  # whole numbers per unit of x and y: sums of integers are the same in any order
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
        # M evenly from the range, then 7 fractions of each map
        count = MAPS[0] + int(_fractions(bits, 1)[0] * (MAPS[1] - MAPS[0] + 1))
        u_M7 = _fractions(bits, count * 7).reshape(count, 7)
        cos_a, sin_a = direction(u_M7[:, 0])
        cos_b, sin_b = direction(u_M7[:, 1])
        # singular values s1 and s2; half of the maps are mirror images
        s1, s2 = (STRETCH[0] + (STRETCH[1] - STRETCH[0]) * u_M7[:, 2:4]).T
        flipped = np.where(u_M7[:, 4] < 0.5, -s2, s2)
        # (a b; c d) = rotation a x diag(s1, flipped) x rotation b
        matrix = (
            cos_a * s1 * cos_b - sin_a * flipped * sin_b,
            -cos_a * s1 * sin_b - sin_a * flipped * cos_b,
            sin_a * s1 * cos_b + cos_a * flipped * sin_b,
            -sin_a * s1 * sin_b + cos_a * flipped * cos_b,
        )
        # (e, f) evenly from (-1, 1)
        e, f = (2 * u_M7[:, 5:7] - 1).T
        # area of the image of the unit square = s1 s2; a little more, so that a flat map is chosen too
        maps = Maps(numbers_M6=np.stack([*matrix, e, f], axis=1), chosen_256=_choices(s1 * s2 + 0.02))
        # share of the cells of a 16 x 16 grid that a short walk meets, upright, at scale 1, not shifted
        points_2TNW = _walk(maps.numbers_M6[None], maps.chosen_256, [bits], steps=16)
        upright_2N = np.array([[1.0], [0.0]])
        counts_NSS = _counts(points_2TNW, upright_2N, scale_N=np.ones(1), shift_2N=np.zeros((2, 1)), size=16)
        if COVERAGE[0] < (counts_NSS > 0).mean() < COVERAGE[1]:
            return maps


def draw_poses(bits: list[np.random.Philox], kind: int, maps: int) -> Poses:
    """Parameters of one image per stream. Training images (kind TRAIN) lie in the black cells, validation in the white.

    Both splits cover each range evenly, but no pair of rotation and scale can occur in both.
    """
    u = np.stack([_fractions(one, 13 + 6 * maps) for one in bits])
    # a cell of the chessboard: any row, and of the columns every second one; black where row + column is even
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
    batch = max(1, BATCH_POINTS // (steps * WALKERS))
    images = []
    palettes = []
    for start in range(0, len(indices), batch):
        bits = [stream(seed, kind, label, index) for index in indices[start : start + batch]]
        images_NSS, palettes_N23 = _draw_batch(maps, bits, kind, steps, size, difficulty)
        images.append(images_NSS)
        palettes.append(palettes_N23)
    return np.concatenate(images), np.concatenate(palettes)


def colours(palette_23: np.ndarray) -> np.ndarray:
    """(256, 3) uint8 RGB of each stored value, for the level and contrast of an image."""
    level_3, contrast_3 = palette_23.astype(np.int64)
    # level + contrast x (v - ZERO) / UNIT, rounded down
    table_V3 = level_3 + (np.arange(256)[:, None] - ZERO) * contrast_3 // UNIT
    return table_V3.clip(0, 255).astype(np.uint8)


def direction(turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of 2 pi x turns, by Taylor's series within an eighth of a turn: libraries differ in rounding."""
    # turns = quarter / 4 + x / 2 pi with |x| <= pi / 4
    quarter = np.floor(turns * 4 + 0.5)
    x = (turns - quarter / 4) * (2 * 3.141592653589793)
    # Horner's rule: cos x = 1 - x^2 / (1 2) (1 - x^2 / (3 4) (...))
    #                sin x = x (1 - x^2 / (2 3) (1 - x^2 / (4 5) (...)))
    cos = np.zeros_like(x)
    sin = np.zeros_like(x)
    for k in range(16, -1, -2):
        cos = 1 - cos * x * x / ((k + 1) * (k + 2))
        sin = 1 - sin * x * x / ((k + 2) * (k + 3))
    sin = sin * x
    # a quarter turn more: (cos, sin) -> (-sin, cos)
    quarters = quarter.astype(np.int64) % 4
    cosine = np.choose(quarters, [cos, -sin, -cos, sin])
    sine = np.choose(quarters, [sin, cos, -sin, -cos])
    return cosine, sine


def _draw_batch(
    maps: Maps, bits: list[np.random.Philox], kind: int, steps: int, size: int, difficulty: float
) -> tuple[np.ndarray, np.ndarray]:
    """(N, S, S) brightness and (N, 2, 3) palette of the images of these streams, which are read in this order."""
    poses = draw_poses(bits, kind, len(maps.numbers_M6))
    spread = LEAST_SPREAD + (1 - LEAST_SPREAD) * difficulty
    # each number of a map x (1 - spread JITTER ... 1 + spread JITTER)
    numbers_NM6 = maps.numbers_M6 * (1 + spread * JITTER * (2 * poses.jitter_NM6 - 1))
    points_2TNW = _walk(numbers_NM6, maps.chosen_256, bits, steps)
    # rotation by up to half a turn either way, scale from 1 down, shift either way
    turned_2N = np.stack(direction(spread * (poses.rotation_N - 0.5)))
    scale_N = 1 - spread * (1 - LEAST_SCALE) * poses.scale_N
    shift_2N = spread * SHIFT * (2 * poses.shift_N2.T - 1)
    counts_NSS = _counts(points_2TNW, turned_2N, scale_N, shift_2N, size)
    noise_NSS = np.stack([_bytes(one, size * size).reshape(size, size) for one in bits])
    images_NSS = _standardised(counts_NSS, noise_NSS, NOISE * poses.noise_N)
    # level and contrast of each channel evenly from their ranges, rounded
    low_21, high_21 = np.array([LEVEL, CONTRAST], dtype=np.float64).T[..., None]
    palette_N23 = np.floor(low_21 + (high_21 - low_21) * poses.palette_N23 + 0.5).astype(np.uint8)
    return images_NSS, palette_N23


def _walk(numbers_NM6: np.ndarray, chosen_256: np.ndarray, bits: list[np.random.Philox], steps: int) -> np.ndarray:
    """(2, T, N, W) float32: x and y of every walker at every step, after a warm-up from the origin."""
    n, count = numbers_NM6.shape[:2]
    total = steps + WARM_UP
    bytes_NTW = np.stack([_bytes(one, total * WALKERS) for one in bits]).reshape(n, total, WALKERS)
    # the maps of all images in one table, those of an image from its number x M on
    first_map_N1 = (np.arange(n) * count)[:, None]
    numbers_6K = np.ascontiguousarray(numbers_NM6.reshape(n * count, 6).T, dtype=np.float32)
    points_2TNW = np.empty((2, steps, n, WALKERS), np.float32)
    x = np.zeros((n, WALKERS), np.float32)
    y = np.zeros((n, WALKERS), np.float32)
    for step in range(total):
        # each walker's byte chooses its map
        a, b, c, d, e, f = numbers_6K.take(chosen_256[bytes_NTW[:, step]] + first_map_N1, axis=1)
        # (x, y) <- (a x + b y + e, c x + d y + f), in the memory of a and c
        a *= x
        b *= y
        c *= x
        d *= y
        a += b
        c += d
        x = np.add(a, e, out=a)
        y = np.add(c, f, out=c)
        if step >= WARM_UP:
            points_2TNW[0, step - WARM_UP] = x
            points_2TNW[1, step - WARM_UP] = y
    return points_2TNW


def _counts(
    points_2TNW: np.ndarray, turned_2N: np.ndarray, scale_N: np.ndarray, shift_2N: np.ndarray, size: int
) -> np.ndarray:
    """How many points fall on each pixel, (N, S, S). Points outside are lost.

    The points are centred on their mean, brought to a root mean square radius of scale / 2 half widths, turned (cosine
    and sine in turned_2N) and shifted (half widths).
    """
    # mean and root mean square radius in fixed point (+ 1: a single point has no radius)
    whole = (points_2TNW * np.float32(FIXED_POINT)).astype(np.int64)
    amount = whole.shape[1] * whole.shape[3]
    mean_2N = whole.sum(axis=(1, 3)) // amount
    whole -= mean_2N[:, None, :, None]
    radius_N = np.sqrt((whole * whole).sum(axis=(0, 1, 3)) / amount) + 1
    # scale / 2 half widths = scale x size / 4 pixels per radius
    cos_N, sin_N = turned_2N * (scale_N * (0.25 * size) * FIXED_POINT / radius_N)
    middle_2N = mean_2N / FIXED_POINT
    offset_2N = (1 + shift_2N) * (0.5 * size) + 1  # one pixel more on each side takes what falls outside
    # row = cos (x - mean x) - sin (y - mean y) + offset, column = sin (x - mean x) + cos (y - mean y) + offset
    places = []
    for of_x_N, of_y_N, offset_N in zip((cos_N, sin_N), (-sin_N, cos_N), offset_2N):
        constant_N = offset_N - of_x_N * middle_2N[0] - of_y_N * middle_2N[1]
        place_TNW = points_2TNW[0] * of_x_N.astype(np.float32)[:, None]
        place_TNW += points_2TNW[1] * of_y_N.astype(np.float32)[:, None]
        place_TNW += constant_N.astype(np.float32)[:, None]
        places.append(place_TNW.clip(0, size + 1.5, out=place_TNW).astype(np.int32))
    row_TNW, column_TNW = places
    # a histogram over (image, row, column), its margin cut off
    n = points_2TNW.shape[2]
    wide = size + 2
    flat_TNW = (np.arange(n, dtype=np.int32)[:, None] * wide + row_TNW) * wide + column_TNW
    counts = np.bincount(flat_TNW.ravel(), minlength=n * wide * wide).reshape(n, wide, wide)
    return counts[:, 1:-1, 1:-1]


def _standardised(counts_NSS: np.ndarray, noise_NSS: np.ndarray, amplitude_N: np.ndarray) -> np.ndarray:
    """Logarithm of the counts plus noise, as uint8 of the same mean and (nearly) standard deviation for every image."""
    tone_NSS = _TONE[np.minimum(counts_NSS, 255)]
    pixels = tone_NSS.shape[1] * tone_NSS.shape[2]
    sum_N = tone_NSS.sum(axis=(1, 2))
    square_N = (tone_NSS * tone_NSS).sum(axis=(1, 2))
    # UNIT per standard deviation sqrt(E[t^2] - E[t]^2) (+ 1: an even picture has none)
    gain_N = UNIT / (np.sqrt((square_N / pixels) - (sum_N / pixels) ** 2) + 1)
    # ZERO + gain (tone - mean) + amplitude UNIT (2 noise / 255 - 1), and 0.5 to round
    start_N = ZERO + 0.5 - gain_N * (sum_N / pixels) - amplitude_N * UNIT
    value = tone_NSS * gain_N[:, None, None]
    value += noise_NSS * (amplitude_N * (2 * UNIT / 255))[:, None, None]
    value += start_N[:, None, None]
    return value.clip(0, 255, out=value).astype(np.uint8)


def _choices(areas_M: np.ndarray) -> np.ndarray:
    """(256,) the map of each random byte, in proportion to the areas."""
    areas = areas_M.tolist()
    total = sum(areas)
    # rounded down; what is left of the 256 goes to the largest
    shares = [int(256 * area / total) for area in areas]
    shares[int(np.argmax(areas_M))] += 256 - sum(shares)
    return np.repeat(np.arange(len(shares)), shares)


def _bytes(bits: np.random.Philox, count: int) -> np.ndarray:
    """(count,) uint8 from whole 64-bit words, the lowest byte of a word first on every machine."""
    return bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]


def _fractions(bits: np.random.Philox, count: int) -> np.ndarray:
    """`count` float64 from 0 to below 1: the upper 53 bits of a word / 2^53."""
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


def _fill(asked: dict) -> None:
    """Draw all images of some classes into the prepared files of a folder."""
    folder = Path(asked["folder"])
    per_class = asked["per_class"]
    images_NSS = np.load(folder / "images.npy", mmap_mode="r+")
    palettes_N23 = np.load(folder / "palettes.npy", mmap_mode="r+")
    for label in range(*asked["labels"]):
        if os.getppid() != asked["maker"]:  # it was killed: nobody waits for the rest
            sys.exit(1)
        rows = slice(label * per_class, (label + 1) * per_class)  # sorted by class
        images_NSS[rows], palettes_N23[rows] = draw_images(
            asked["seed"], asked["kind"], label, range(per_class), asked["size"], asked["difficulty"]
        )


if __name__ == "__main__":
    for warning in (signal.SIGTERM, signal.SIGUSR1):  # sent to a whole job step, and meant for its ranks
        signal.signal(warning, signal.SIG_IGN)
    _fill(json.loads(sys.argv[1]))
