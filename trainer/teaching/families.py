"""The table of student families: what a recipe calls a kind of student, and the module of models/ that builds it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from models.files.hub import CheckpointFiles
from models.modules.basis import Basis
from models.modules.stitch import StudentModule
from models.modules.tokens import TokenLayout
from models.preprocessing import Preprocessing
from trainer.config.recipe import Recipe

FAMILIES = {
    "vmoe": "models.vmoe.family",
}


class Family(Protocol):
    """The functions a family's module has.

    A student is a timm VisionTransformer (or behaves like one: blocks, embed_dim, patch_embed, num_prefix_tokens) with
    `config`, `preprocessing`, `source` and `save_pretrained(folder, preprocessing=, labels=)`. Its config is a frozen
    dataclass with `depth`, `drop_path_rate`, `tokens` (a TokenLayout) and `on_weights_of(saved, source)`. A student
    with MoE layers, or one whose states are compared at borders, takes `out` and `states` as VMoE.forward does. One
    that is built for 0 classes has `feature_head`, from its normalised tokens to the teacher's width, and takes
    `as_teacher`, as VMoE.forward does.
    """

    def config(
        self,
        section: Mapping[str, Any],
        *,
        num_classes: int,
        drop_path: float,
        image_size: int,
        in_chans: int,
        tokens: TokenLayout,
        seed: int,
        teacher_width: int = 0,
    ) -> Any:
        """The configuration that section student of a recipe asks for, on images and tokens like the teacher's.

        Args:
            num_classes: 0 = a student that gives features, and learns the final tokens of a teacher of `teacher_width`.
        """

    def build(self, config: Any) -> nn.Module:
        """A student before training."""

    def modules(
        self,
        student: nn.Module,
        depths: Sequence[int],
        teacher_width: int,
        seed: int,
        stitches: str,
        bases: Sequence[Basis] | None,
    ) -> list[StudentModule]:
        """The student's modules between stitch layers of the teacher's width."""

    def assemble(self, modules: Sequence[nn.Module], stitches: str, states: Sequence[Tensor] | None) -> nn.Module:
        """One student from its learned modules."""

    def read_config(self, files: CheckpointFiles) -> tuple[Any, Preprocessing | None, list[str] | None]:
        """Configuration, preprocessing and class names of a saved student."""

    def write_config(self, folder: Path, config: Any, preprocessing: Preprocessing, labels: Sequence[str]) -> None:
        """Write what makes a model of weights that are put beside it."""

    def load(self, source: str, *, config: Any = None, ep_size: int = 1, ep_rank: int = 0) -> nn.Module:
        """A saved student, with the experts of one rank only where ep_size is above 1."""


class SparseFamily(Family, Protocol):
    """A family whose students have MoE layers and `set_k`, as VMoE: phase evaluate compares their speed."""

    def dense_of_equal_flops(self, student: nn.Module) -> nn.Module:
        """A new student without experts that costs as much per image."""


def family_of(recipe: Recipe) -> Family:
    """The family of a recipe's student."""
    return importlib.import_module(FAMILIES[recipe.student.kind])
