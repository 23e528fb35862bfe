"""The meta model of a run: new, or as phase meta left it, with the bases of its borders."""

from __future__ import annotations

from typing import Any

from models.modules.basis import Basis
from models.modules.meta import MetaModel
from trainer import artifacts
from trainer.context import Run
from trainer.teaching import bases, upcycling


def new_meta(run: Run) -> MetaModel:
    """The meta model before training."""
    m = run.recipe.meta
    return MetaModel.from_teacher(
        run.teacher.model,
        run.recipe.modules,
        m.blocks_per_module,
        m.init,
        teacher_depths=run.teacher_depths,
        seed=run.recipe.seed,
    )


def trained_meta(run: Run, needed_by: str) -> tuple[MetaModel, dict[str, Any]]:
    """The meta model of phase meta and its result.

    Raises:
        ValueError: it is missing, damaged, or of another recipe; `needed_by` is named.
    """
    folder, result = artifacts.require(run.out, "meta", run.recipe, needed_by)
    meta = new_meta(run).cpu().float()  # phases before may have left the teacher elsewhere, in another type
    meta.load_state_dict(artifacts.load_weights(folder, meta.state_dict()))
    if run.recipe.teacher.grown and run.planned_teacher is None:  # its hybrids are younger than the meta model
        _, grown = artifacts.require(run.out, "assemble", run.recipe, needed_by)
        result["metrics"] |= {k: v for k, v in grown["metrics"].items() if k.startswith("hybrid_accuracy/")}
    return meta, result


def border_bases(run: Run) -> list[Basis] | None:
    """The basis of each inner border: that of the student's start where it was projected, else of phase meta.

    None while the meta model is not trained yet.
    """
    projected = upcycling.start_bases(run)
    if projected is not None:
        return projected
    if not (run.out / "meta" / "result.json").is_file():
        return None
    return bases.load(run.out / "meta", run.recipe.modules - 1, run.teacher.model.embed_dim)
