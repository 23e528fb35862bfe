"""A teacher that is grown inside the meta model (teacher.grown), as in Deep Incubation (arXiv 2212.04129).

The phases in order: meta (labels, from scratch), incubate 0..N-1 (independent of each other), assemble.
"""

from __future__ import annotations

from models.convert import to_timm
from models.teacher import Teacher
from trainer.context import Run
from trainer.dist import seed_everything
from trainer.preflight import new_teacher_of, trained_preprocessing


def with_seedling(run: Run) -> Run:
    """The same run with the teacher as it is before it grows: drawn from the recipe's seed, the same in every job.

    Raises:
        ValueError: teacher.* sizes that do not fit together.
    """
    r = run.recipe
    seed_everything(r.seed, 0, r.run.deterministic)
    model = to_timm(new_teacher_of(r.teacher, run.labels).classifier).requires_grad_(False)
    preprocessing = trained_preprocessing(r.teacher)
    return run.with_teacher(Teacher(model, preprocessing, "being grown", run.labels, len(run.labels)))
