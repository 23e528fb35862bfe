"""Principal components of the hidden states at the module borders: a basis that all modules share.

With stitches tied to it, `embed` of one module followed by `project` of the next is the identity, so that dropping them
at assembly changes nothing (not in the paper). D_t is the teacher's width, D_s the student's, at most D_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PARTS = ("mean", "directions", "variance")  # of a Basis


@dataclass(frozen=True)
class Basis:
    """Mean (D_t,) and directions (D_t, K) of one border.

    K is D_t, orthonormal columns by falling variance, of which a student takes the first ones.
    """

    mean: Tensor
    directions: Tensor
    variance: Tensor  # (K,), of each direction

    def leading(self, width: int) -> tuple[Tensor, Tensor]:
        """Mean (D_t,) and the first `width` directions (D_t, width).

        Where the widths agree it is the identity (mean 0): nothing is lost by any basis, and layers that were copied
        from the teacher keep their meaning.

        Raises:
            ValueError: the student is wider than the teacher.
        """
        check_width(len(self.mean), width)
        if width == len(self.mean):
            return torch.zeros_like(self.mean), torch.eye(width, dtype=self.mean.dtype)
        return self.mean, self.directions[:, :width]

    def turns(self, width: int) -> bool:
        """Whether a student of this width has other coordinates than the teacher, and something is to be computed."""
        return width != len(self.mean)

    def explained(self, width: int) -> float:
        """Share of the variance in the first `width` directions, 0 to 1."""
        return float(self.variance[:width].sum() / self.variance.sum())


class FittedBasis(Basis):
    """That of a student whose start was projected into it (models/experts/projection.py): K is the student's width.

    It turns the states where the widths agree, too.
    """

    def leading(self, width: int) -> tuple[Tensor, Tensor]:
        """Mean (D_t,) and all directions (D_t, K).

        Raises:
            ValueError: a student of another width.
        """
        if width != self.directions.shape[1]:
            raise ValueError(f"the basis was made for a student of width {self.directions.shape[1]}, not {width}.")
        return self.mean, self.directions

    def turns(self, width: int) -> bool:
        """Whatever the width."""
        return True


def check_width(teacher_width: int, student_width: int) -> None:
    """Refuse a student that is wider than the basis has directions.

    Raises:
        ValueError: naming both widths.
    """
    if student_width > teacher_width:
        raise ValueError(
            f"stitches in a shared basis need a student at most as wide as the teacher: student.width is "
            f"{student_width}, the teacher's {teacher_width}. Set distill.stitches=linear, or a smaller student.width."
        )


def shared_bases(sums: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Basis]:
    """One basis for all borders, each with its own mean, of vectors h known by sums.

    The directions are the eigenvectors of the mean of the borders' covariances, each of trace 1: with bases of their
    own the stream of a student would turn at every border, and its skip connections with it.

    Args:
        sums: of each border the number n of vectors (a scalar), their sum (D,) and their sum of h h^T (D, D), in
            float64: the covariance is a difference of numbers far larger than itself.
    """
    means = []
    covariances = []
    for count, total, products in sums:
        # mean = sum h / n; covariance = sum h h^T / n - mean mean^T
        mean = total / count
        means.append(mean)
        covariances.append(products / count - mean.outer(mean))
    together = sum(covariance / covariance.trace().clamp_min(1e-300) for covariance in covariances)
    # covariance = U diag(variance) U^T; eigh gives the variances rising, a basis has them falling
    directions = largest_positive(torch.linalg.eigh(together).eigenvectors.flip(1))
    bases = []
    for mean, covariance in zip(means, covariances):
        variance = ((covariance @ directions) * directions).sum(0).clamp_min(0)  # rounding may leave one just below 0
        bases.append(Basis(mean.float(), directions.float().contiguous(), variance.float()))
    return bases


def largest_positive(vectors: Tensor) -> Tensor:
    """Columns with their largest entry positive: a direction's sign is free, and so every machine makes the same."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def to_tensors(bases: Sequence[Basis]) -> dict[str, Tensor]:
    """For a safetensors file: "{border}.{part}" for every part of the basis of every border."""
    tensors = {}
    for border, basis in enumerate(bases):
        for part in PARTS:
            tensors[f"{border}.{part}"] = getattr(basis, part).clone()  # borders may share them, a file may not
    return tensors


def from_tensors(tensors: dict[str, Tensor], borders: int, width: int) -> list[Basis]:
    """What to_tensors wrote.

    Args:
        borders: number of bases.
        width: D_t.

    Raises:
        ValueError: a tensor is missing, of another shape, or not finite.
    """
    bases = []
    for border in range(borders):
        variance = tensors.get(f"{border}.variance")
        directions = width if variance is None else len(variance)
        shapes = {"mean": (width,), "directions": (width, directions), "variance": (directions,)}
        parts = {}
        for part, shape in shapes.items():
            tensor = tensors.get(f"{border}.{part}")
            if tensor is None or tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{border}.{part} is missing, not of shape {shape}, or not finite")
            parts[part] = tensor
        bases.append(Basis(**parts))
    return bases


def projection(basis: Basis, width: int) -> nn.Module:
    """Teacher's states to the student's, (..., D_t) -> (..., width); where they are the same nothing is computed.

    Raises:
        ValueError: the student is wider than the basis.
    """
    if not basis.turns(width):
        return nn.Identity()
    return Project(*basis.leading(width))


class Project(nn.Module):
    """Teacher's width to the student's, fixed: (h - mean) U; (..., D_t) -> (..., D_s)."""

    def __init__(self, mean: Tensor, directions: Tensor) -> None:
        super().__init__()
        # not in the state dict: the meta model's artifact has them
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("directions", directions, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        # float32: DeepSpeed leaves buffers as they are under bf16, and a border's mean is far larger than its spread
        centred = h.float() - self.mean.float()
        return (centred @ self.directions.float()).to(h.dtype)


class Embed(nn.Module):
    """Student's width to the teacher's, fixed: mean + z U^T; (..., D_s) -> (..., D_t)."""

    def __init__(self, mean: Tensor, directions: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("directions", directions, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        return (self.mean.float() + z.float() @ self.directions.float().T).to(z.dtype)
