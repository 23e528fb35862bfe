"""Hybrid accuracy: the meta model with one of its stages replaced by the teacher's module."""

from __future__ import annotations

import logging

from torch import nn

from models.modules.meta import MetaModel
from trainer.config.ds_config import Settings
from trainer.context import Run
from trainer.distributed.engine import working_type
from trainer.evaluation.accuracy import Predictor, evaluate

log = logging.getLogger(__name__)
FAR_BELOW = 0.9  # a hybrid under this share of the teacher's accuracy teaches little


def measure(run: Run, meta: MetaModel, stages: list[nn.Module], settings: Settings) -> dict[str, float]:
    """Accuracy of the teacher, and of the meta model with each teacher module in its place (collective)."""
    dtype, batch = working_type(settings), run.eval_batch(settings)
    meta.to(run.dist.device, dtype)
    teacher = run.teacher.model.to(run.dist.device, dtype)
    predictors = {"teacher_accuracy": Predictor(meta, teacher, (teacher,))}
    for i, stage in enumerate(stages):
        predictors[f"hybrid_accuracy/{i}"] = _hybrid(meta, stage, i)
    accuracies = {}
    for name, predictor in predictors.items():
        accuracies[name] = evaluate(predictor, run.data, dtype, batch, run.dist)["accuracy"]
    return accuracies


def _hybrid(meta: MetaModel, stage: nn.Module, i: int) -> Predictor:
    """The meta model with the teacher's module in place i."""
    return Predictor(meta, lambda x: meta.back(stage(meta.front(x, i)), i), (stage,))


def report(metrics: dict[str, float], modules: int) -> None:
    """Log what `measure` found, and warn of a module that is broken inside the meta model."""
    teacher = metrics["teacher_accuracy"]
    hybrids = [metrics[f"hybrid_accuracy/{i}"] for i in range(modules)]
    shown = ", ".join(f"{i}: {100 * h:.1f}%" for i, h in enumerate(hybrids))
    log.info("teacher %.1f%%, hybrids %s", 100 * teacher, shown)
    for i, hybrid in enumerate(hybrids):
        if hybrid < FAR_BELOW * teacher:
            log.warning(
                "teacher module %d reaches only %.1f%% inside the meta model (teacher %.1f%%): its student will learn "
                "from a broken teacher. Use meta.objective=theseus, meta.init=teacher, more meta.epochs, or "
                "meta.blocks_per_module=0",
                i,
                100 * hybrid,
                100 * teacher,
            )
