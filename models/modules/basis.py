"""Principal components of the hidden state at a module border: a basis that every module at that border shares.

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
    """Mean (D_t,) and orthonormal directions (D_t, D_t), columns by falling variance, of one border."""

    mean: Tensor
    directions: Tensor
    variance: Tensor  # (D_t,), of each direction

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

    def explained(self, width: int) -> float:
        """Share of the variance in the first `width` directions, 0 to 1."""
        return float(self.variance[:width].sum() / self.variance.sum())


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


def basis_of(count: Tensor, total: Tensor, products: Tensor) -> Basis:
    """The basis of vectors h known by their number n (a scalar), their sum (D,) and their sum of h h^T (D, D).

    All three in float64: the covariance is a difference of numbers far larger than itself.
    """
    # mean = sum h / n
    mean = total / count
    # covariance = sum h h^T / n - mean mean^T
    covariance = products / count - mean.outer(mean)
    # covariance = U diag(variance) U^T; eigh gives the variances rising, a basis has them falling
    variance, directions = torch.linalg.eigh(covariance)
    directions = directions.flip(1)
    variance = variance.flip(0).clamp_min(0)  # rounding may leave one just below 0
    # a direction's sign is free: its largest entry made positive, so that every machine makes the same basis
    largest_1D = directions.abs().argmax(0, keepdim=True)
    signs = directions.gather(0, largest_1D).sign()
    return Basis(mean.float(), (directions * signs).float().contiguous(), variance.float())


def to_tensors(bases: Sequence[Basis]) -> dict[str, Tensor]:
    """For a safetensors file: "{border}.{part}" for every part of the basis of every border."""
    tensors = {}
    for border, basis in enumerate(bases):
        for part in PARTS:
            tensors[f"{border}.{part}"] = getattr(basis, part)
    return tensors


def from_tensors(tensors: dict[str, Tensor], borders: int, width: int) -> list[Basis]:
    """What to_tensors wrote.

    Args:
        borders: number of bases.
        width: D_t.

    Raises:
        ValueError: a tensor is missing, of another shape, or not finite.
    """
    shapes = {"mean": (width,), "directions": (width, width), "variance": (width,)}
    bases = []
    for border in range(borders):
        parts = {}
        for part, shape in shapes.items():
            tensor = tensors.get(f"{border}.{part}")
            if tensor is None or tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{border}.{part} is missing, not of shape {shape}, or not finite")
            parts[part] = tensor
        bases.append(Basis(**parts))
    return bases


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
