"""The table of student families: what a recipe calls a kind of student, and the module of models/ that builds it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from models.files.hub import CheckpointFiles
from models.forms import StudentForm
from models.modules.basis import Basis
from models.modules.tokens import TokenLayout
from models.preprocessing import Preprocessing
from trainer.config.recipe import Recipe

FAMILIES = {
    "vmoe": "models.vmoe.family",
    "nac": "models.nac.family",
}


class Family(Protocol):
    """What a family's module has.

    A student has `config`, `preprocessing`, `source`, `head` and `save_pretrained(folder, preprocessing=, labels=,
    state=)`. Its config is a frozen dataclass with `depth`, `drop_path_rate`, `image_size`, `in_chans`, `tokens` (a
    TokenLayout) and `on_weights_of(saved, source)`. One that tells something beside its logits (routing, regularisers)
    takes `out` as VMoE.forward does.

    Of an ALIGNED family it is a timm VisionTransformer, or behaves like one (blocks, embed_dim, patch_embed,
    num_prefix_tokens); one whose states are compared at borders takes `states`, and one that is built for 0 classes has
    `feature_head`, from its normalised tokens to the teacher's width, and takes `as_teacher`, as VMoE.forward does. Of
    another family it has `num_tokens` and `grid_size`, and where types of layers do not tell its cost, `count_flops`
    (models/flops.py), as its modules have.

    Attributes:
        ALIGNED: whether it reads an image as the same tokens as its teacher, so that the recipe's sizes follow the
            teacher's and both must have the same patches.
        ENDS: blocks of the first and of the last module, where they are of another kind than those between; else 0.
        STITCHES: what can become of the stitches when modules are put together, of models.modules.stitch.STITCHES.
    """

    ALIGNED: bool
    ENDS: int
    STITCHES: tuple[str, ...]

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
        *,
        section: Mapping[str, Any],
        tokens: int,
    ) -> list[nn.Module]:
        """The student's modules between stitch layers of the teacher's width.

        Args:
            section: plain values of the recipe's section student.
            tokens: of the teacher, prefix tokens included.
        """

    def assemble(self, modules: Sequence[nn.Module], stitches: str, states: Sequence[Tensor] | None) -> nn.Module:
        """One student from its learned modules."""

    def forms(self, student: nn.Module) -> Sequence[StudentForm]:
        """In which forms a trained student can be used, for the table of speeds and accuracies; none = one alone."""

    def rivals(self, student: nn.Module) -> Mapping[str, nn.Module]:
        """New models that are timed beside it there, by name."""

    def describe(self, student: nn.Module, images: Tensor) -> dict[str, Any]:
        """What analysis.json holds of a trained student beside its classes and routing, on some images (B, C, H, W)."""

    def read_config(self, files: CheckpointFiles) -> tuple[Any, Preprocessing | None, list[str] | None]:
        """Configuration, preprocessing and class names of a saved student."""

    def write_config(self, folder: Path, config: Any, preprocessing: Preprocessing, labels: Sequence[str]) -> None:
        """Write what makes a model of weights that are put beside it."""

    def load(self, source: str, *, config: Any = None, ep_size: int = 1, ep_rank: int = 0) -> nn.Module:
        """A saved student, with the experts of one rank only where ep_size is above 1."""


def family_of(recipe: Recipe) -> Family:
    """The family of a recipe's student."""
    return importlib.import_module(FAMILIES[recipe.student.kind])
