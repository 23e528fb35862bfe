"""Pictures of waves without a place, drawn with numpy alone (data.source=textures).

A class is a few waves, each of one direction and wavelength. A picture adds them up with random phases, each swelling
and fading over the picture and stronger or weaker than in the next one, among other waves that belong to no class. So
no pixel and no place says anything, as its mean over the pictures of any class is that of all: only the spectrum does,
and several waves have to be there together. The same parameters give the same bytes on every machine (common.py).
N = images of a batch, K = waves of a picture, S = size.
"""

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

WAVES = 4  # of a class
OTHERS = 4  # waves of a picture that are not of its class, at most as strong as those
CYCLES = (2.0, 12.0)  # fewest and most cycles of a wave over the picture
TURN = 0.08  # largest rotation of a picture at full spread, turns to either side
ZOOM = 0.2  # largest change of its wavelengths at full spread, relative
FADE = (0.3, 1.5)  # fewest and most cycles of the swelling of a wave over the picture
LEAST_SPREAD = 0.05  # of difficulty 0: room for two disjoint splits
FIXED_POINT = 1 << 10  # whole numbers per unit of brightness: sums of integers are the same in any order
BATCH = 64  # images drawn at a time


def draw_waves(seed: int, label: int) -> np.ndarray:
    """(WAVES, 2): direction in turns and cycles over the picture of each wave of class `label`."""
    u_K2 = fractions(stream(seed, CLASS, label), 2 * WAVES).reshape(WAVES, 2)
    # evenly over the ring of frequencies: any direction of a half turn, cycles = sqrt(least^2 + u (most^2 - least^2))
    least, most = CYCLES
    cycles_K = np.sqrt(least**2 + u_K2[:, 1] * (most**2 - least**2))
    return np.stack([u_K2[:, 0] / 2, cycles_K], axis=1)


def draw_images(
    seed: int, kind: int, label: int, indices: range, size: int, difficulty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Images `indices` of class `label` in a split (kind TRAIN or VAL).

    Returns:
        (N, size, size) uint8 brightness, in units told by ZERO and UNIT; (N, 2, 3) uint8 level and contrast of each
        channel, which `colours` applies.
    """
    waves_K2 = draw_waves(seed, label)
    images = []
    palettes = []
    for start in range(0, len(indices), BATCH):
        bits = [stream(seed, kind, label, index) for index in indices[start : start + BATCH]]
        images_NSS, palettes_N23 = _draw_batch(waves_K2, bits, kind, size, difficulty)
        images.append(images_NSS)
        palettes.append(palettes_N23)
    return np.concatenate(images), np.concatenate(palettes)


def _draw_batch(
    waves_K2: np.ndarray, bits: list[np.random.Philox], kind: int, size: int, difficulty: float
) -> tuple[np.ndarray, np.ndarray]:
    """(N, S, S) brightness and (N, 2, 3) palette of the images of these streams, which are read in this order."""
    spread = LEAST_SPREAD + (1 - LEAST_SPREAD) * difficulty
    count = WAVES + OTHERS
    # of an image: rotation and scale (4), noise, palette (6); of each wave: direction and cycles if it is of no class,
    # phase, strength, direction, cycles and phases of its swelling
    u = np.stack([fractions(one, 11 + 8 * count) for one in bits])
    rotation_N, scale_N = chessboard(u[:, :4], kind)
    u_NK8 = u[:, 11:].reshape(len(bits), count, 8)

    # directions and cycles: those of the class turned and zoomed with the picture, the others at random
    least, most = CYCLES
    turns_NK = u_NK8[:, :, 0] / 2
    cycles_NK = np.sqrt(least**2 + u_NK8[:, :, 1] * (most**2 - least**2))
    turns_NK[:, :WAVES] = waves_K2[:, 0] + spread * TURN * (2 * rotation_N[:, None] - 1)
    cycles_NK[:, :WAVES] = waves_K2[:, 1] * (1 + spread * ZOOM * (2 * scale_N[:, None] - 1))

    # strengths: of the class from 1 down to 1 - spread, of the others from 0 up to spread
    strength_NK = spread * u_NK8[:, :, 3]
    strength_NK[:, :WAVES] = 1 - strength_NK[:, :WAVES]

    carrier = _factors(turns_NK, cycles_NK, u_NK8[:, :, 2], np.zeros_like(turns_NK), size)
    swelling_turns_NK = u_NK8[:, :, 4]
    swelling_cycles_NK = FADE[0] + (FADE[1] - FADE[0]) * u_NK8[:, :, 5]
    swelling = _factors(swelling_turns_NK, swelling_cycles_NK, u_NK8[:, :, 6], u_NK8[:, :, 7], size)

    # brightness = sum over the waves of strength x (1 + swelling) x carrier
    tone_NSS = np.zeros((len(bits), size, size))
    for k in range(count):
        wave_NSS = _product(carrier, k)
        wave_NSS *= 1 + spread * _product(swelling, k)
        wave_NSS *= strength_NK[:, k, None, None]
        tone_NSS += wave_NSS
    whole_NSS = np.floor(tone_NSS * FIXED_POINT + 0.5).astype(np.int64)
    noise_NSS = np.stack([random_bytes(one, size * size).reshape(size, size) for one in bits])
    images_NSS = standardised(whole_NSS, noise_NSS, NOISE * u[:, 4])
    return images_NSS, draw_palettes(u[:, 5:11].reshape(-1, 2, 3))


def _factors(
    turns_NK: np.ndarray, cycles_NK: np.ndarray, phase_NK: np.ndarray, column_phase_NK: np.ndarray, size: int
) -> tuple[np.ndarray, ...]:
    """Cosine and sine of each wave along the rows and along the columns, each (N, K, S)."""
    cos_NK, sin_NK = direction(turns_NK)
    place_S = (np.arange(size) + 0.5) / size
    rows = direction((cycles_NK * sin_NK)[..., None] * place_S + phase_NK[..., None])
    columns = direction((cycles_NK * cos_NK)[..., None] * place_S + column_phase_NK[..., None])
    return (*rows, *columns)


def _product(factors: tuple[np.ndarray, ...], k: int) -> np.ndarray:
    """(N, S, S) wave k: cos(row + column) = cos(row) cos(column) - sin(row) sin(column)."""
    cos_row, sin_row, cos_column, sin_column = (factor[:, k] for factor in factors)
    wave_NSS = cos_row[:, :, None] * cos_column[:, None, :]
    wave_NSS -= sin_row[:, :, None] * sin_column[:, None, :]
    return wave_NSS
