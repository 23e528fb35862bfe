"""What the procedural images have in common: random numbers, poses, brightness and colours. numpy alone.

The same parameters give the same bytes on every machine: random bits come from Philox, whose stream is fixed, and all
is made of exactly rounded operations (+ - * / sqrt, integers) and sums of integers.
N = images of a batch, S = size.
"""

import numpy as np

CELLS = 8  # the ranges of rotation and scale are cut into 8 x 8 cells, black and white like a chessboard
# a stored value v stands for (v - ZERO) / UNIT standard deviations above the mean of the picture
ZERO = 64
UNIT = 32
LEVEL = (70, 150)  # lowest and highest mean of a channel, 0 to 255
CONTRAST = (16, 44)  # lowest and highest standard deviation of a channel
NOISE = 0.5  # largest amplitude of the noise, standard deviations
CLASS, TRAIN, VAL = range(3)  # what a random stream is for


def stream(seed: int, kind: int, label: int, index: int = 0) -> np.random.Philox:
    """Random bits of one class (kind CLASS) or of one image of a split (TRAIN, VAL)."""
    return np.random.Philox(key=np.array([seed % 2**64, kind << 60 | label << 32 | index], dtype=np.uint64))


def chessboard(u_N4: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and scale of N images, each as a fraction of its range, from four random fractions of each image.

    Training images (kind TRAIN) lie in the black cells, validation in the white: both splits cover each range evenly,
    but no pair of rotation and scale can occur in both.
    """
    # a cell of the chessboard: any row, and of the columns every second one; black where row + column is even
    row_N = (u_N4[:, 0] * CELLS).astype(np.int64)
    column_N = 2 * (u_N4[:, 1] * (CELLS // 2)).astype(np.int64) + (row_N + (kind == VAL)) % 2
    return (row_N + u_N4[:, 2]) / CELLS, (column_N + u_N4[:, 3]) / CELLS


def draw_palettes(u_N23: np.ndarray) -> np.ndarray:
    """(N, 2, 3) uint8 level and contrast of each channel, evenly from their ranges and rounded."""
    low_21, high_21 = np.array([LEVEL, CONTRAST], dtype=np.float64).T[..., None]
    return np.floor(low_21 + (high_21 - low_21) * u_N23 + 0.5).astype(np.uint8)


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


def standardised(tone_NSS: np.ndarray, noise_NSS: np.ndarray, amplitude_N: np.ndarray) -> np.ndarray:
    """Brightness plus noise, as uint8 of the same mean and (nearly) standard deviation for every image.

    Args:
        tone_NSS: (N, S, S) whole numbers, whose sums are the same in any order.
        noise_NSS: (N, S, S) uint8.
        amplitude_N: of the noise, standard deviations.
    """
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


def random_bytes(bits: np.random.Philox, count: int) -> np.ndarray:
    """(count,) uint8 from whole 64-bit words, the lowest byte of a word first on every machine."""
    return bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]


def fractions(bits: np.random.Philox, count: int) -> np.ndarray:
    """`count` float64 from 0 to below 1: the upper 53 bits of a word / 2^53."""
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53
