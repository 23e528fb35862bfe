"""Principal components of the hidden state at a module border: a basis that every module at that border shares.

With stitches tied to it, `embed` of one module followed by `project` of the next is the identity, so that dropping them
at assembly changes nothing (not in the paper). D_t is the teacher's width, D_s the student's, at most D_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
        """Share of the variance in the first `width` directions."""
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
    """The basis of vectors known by their number, sum (D,) and sum of outer products (D, D), in float64."""
    mean = total / count
    covariance = products / count - mean.outer(mean)
    variance, directions = torch.linalg.eigh(covariance)
    directions, variance = directions.flip(1), variance.flip(0).clamp_min(0)
    # a direction's sign is free: fixed here, so that every machine makes the same basis
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    return Basis(mean.float(), (directions * signs).float().contiguous(), variance.float())


def to_tensors(bases: Sequence[Basis]) -> dict[str, Tensor]:
    """For a safetensors file."""
    return {f"{b}.{name}": getattr(basis, name) for b, basis in enumerate(bases)
            for name in ("mean", "directions", "variance")}  # fmt: skip


def from_tensors(tensors: dict[str, Tensor], borders: int, width: int) -> list[Basis]:
    """What to_tensors wrote.

    Raises:
        ValueError: a tensor is missing, of another shape, or not finite.
    """
    shapes = {"mean": (width,), "directions": (width, width), "variance": (width,)}
    for b in range(borders):
        for name, shape in shapes.items():
            tensor = tensors.get(f"{b}.{name}")
            if tensor is None or tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{b}.{name} is missing, not of shape {shape}, or not finite")
    return [Basis(*(tensors[f"{b}.{name}"] for name in shapes)) for b in range(borders)]


class Project(nn.Module):
    """Teacher's width to the student's, fixed: (h - mean) U; (..., D_t) -> (..., D_s)."""

    def __init__(self, mean: Tensor, directions: Tensor) -> None:
        super().__init__()
        # not in the state dict: the meta model's artifact has them
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("directions", directions, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        # float32: DeepSpeed leaves buffers as they are under bf16, and a border's mean is far larger than its spread
        return ((h.float() - self.mean.float()) @ self.directions.float()).to(h.dtype)


class Embed(nn.Module):
    """Student's width to the teacher's, fixed: mean + z U^T; (..., D_s) -> (..., D_t)."""

    def __init__(self, mean: Tensor, directions: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("directions", directions, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        return (self.mean.float() + z.float() @ self.directions.float().T).to(z.dtype)
