"""Pictures of iterated function systems, drawn with numpy alone (data.source=fractals).

A class is 2 to 5 affine maps; a picture is the density of points that random chains of these maps visit (the chaos
game; Barnsley, Fractals Everywhere, 1988; for image classes Kataoka et al., Pre-training without Natural Images, 2020).
The same parameters give the same bytes on every machine (common.py says how).
N = images of a batch, M = maps of a class, K = N x M, W = walkers, T = steps, S = size.
"""

from typing import NamedTuple

import numpy as np

from .common import (
    CLASS,
    NOISE,
    chessboard,
    direction,
    draw_palettes,
    fractions,
    random_bytes,
    standardised,
    stream,
)

MAPS = (2, 5)  # fewest and most maps of a class
STRETCH = (0.35, 0.85)  # singular values of a map: below 1, so that every chain ends on the attractor
JITTER = 0.12  # relative change of each number of a map at full spread; 0.85 x (1 + sqrt(2) x 0.12) < 1 keeps the above
LEAST_SPREAD = 0.05  # of difficulty 0: room for two disjoint splits
LEAST_SCALE = 0.55  # smallest scale at full spread
SHIFT = 0.15  # largest shift at full spread, half image widths
COVERAGE = (0.25, 0.8)  # share of a 16 x 16 grid that the attractor of a class covers
POINTS = 1.5  # per pixel
WALKERS = 128  # chains side by side
WARM_UP = 16  # steps of a chain until it is on the attractor; they are not drawn
BATCH_POINTS = 1 << 20  # points drawn at a time: what the memory of a process goes by
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


def draw_maps(seed: int, label: int) -> Maps:
    """The maps of class `label`: drawn until their attractor covers enough of the picture, and not too much."""
    bits = stream(seed, CLASS, label)
    while True:
        # M evenly from the range, then 7 fractions of each map
        count = MAPS[0] + int(fractions(bits, 1)[0] * (MAPS[1] - MAPS[0] + 1))
        u_M7 = fractions(bits, count * 7).reshape(count, 7)
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
    u = np.stack([fractions(one, 13 + 6 * maps) for one in bits])
    rotation_N, scale_N = chessboard(u[:, :4], kind)
    return Poses(
        rotation_N=rotation_N,
        scale_N=scale_N,
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
    noise_NSS = np.stack([random_bytes(one, size * size).reshape(size, size) for one in bits])
    tone_NSS = _TONE[np.minimum(counts_NSS, 255)]
    images_NSS = standardised(tone_NSS, noise_NSS, NOISE * poses.noise_N)
    return images_NSS, draw_palettes(poses.palette_N23)


def _walk(numbers_NM6: np.ndarray, chosen_256: np.ndarray, bits: list[np.random.Philox], steps: int) -> np.ndarray:
    """(2, T, N, W) float32: x and y of every walker at every step, after a warm-up from the origin."""
    n, count = numbers_NM6.shape[:2]
    total = steps + WARM_UP
    bytes_NTW = np.stack([random_bytes(one, total * WALKERS) for one in bits]).reshape(n, total, WALKERS)
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


def _choices(areas_M: np.ndarray) -> np.ndarray:
    """(256,) the map of each random byte, in proportion to the areas."""
    areas = areas_M.tolist()
    total = sum(areas)
    # rounded down; what is left of the 256 goes to the largest
    shares = [int(256 * area / total) for area in areas]
    shares[int(np.argmax(areas_M))] += 256 - sum(shares)
    return np.repeat(np.arange(len(shares)), shares)
