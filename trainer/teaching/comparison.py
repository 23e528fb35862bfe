"""Students and hybrids without classes beside their teacher: what evaluation compares."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor, nn

from models.flops import num_tokens
from models.modules.basis import projection
from models.modules.meta import MetaModel
from trainer.context import Run
from trainer.evaluation.accuracy import Predictor
from trainer.objectives import Borders, LearnFeatures
from trainer.teaching.meta import border_bases
from trainer.teaching.students import student_depths


def predictor(module: nn.Module, teacher: MetaModel, tokens: Callable[[Tensor], Tensor] | None = None) -> Predictor:
    """Final tokens of a model beside the teacher's, for evaluation.

    Args:
        module: what is measured.
        teacher: the whole of it, as a chain of its modules.
        tokens: images -> final tokens (B, T, D_t); None = what `module` gives.
    """
    tokens = tokens or module
    return Predictor(module, tokens, (teacher,), compare=lambda images: {"": (tokens(images), teacher(images))})


def beside_teacher(run: Run, student: nn.Module) -> LearnFeatures:
    """A whole student beside the teacher: final tokens, and inner borders where tied stitches put them in its basis."""
    borders = None
    if run.recipe.distill.stitches == "tied" and not run.recipe.train.init:
        borders = borders_of(run, student)
    teacher = MetaModel(run.teacher_stages())
    return LearnFeatures(student, teacher, run.recipe.train, num_tokens(student), borders=borders)


def borders_of(run: Run, student: nn.Module) -> Borders | None:
    """Where a student's states are compared with the teacher's: before each module but the first.

    None while there is no meta model, whose bases they are compared in.
    """
    bases = border_bases(run)
    if bases is None:
        return None
    first_blocks = list(itertools.accumulate(student_depths(run.recipe, student.config.depth)))[:-1]
    return Borders(first_blocks, [projection(basis, student.embed_dim) for basis in bases])
