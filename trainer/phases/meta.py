"""Phase meta: train the meta model, then measure every teacher module inside it (hybrid accuracy)."""

from __future__ import annotations

import logging

from torch import nn

from models.meta import MetaModel
from trainer import reuse
from trainer.context import Run, save_weights
from trainer.loop import Predictor, evaluate
from trainer.objectives import Classify, MatchTeacher

log = logging.getLogger(__name__)
FAR_BELOW = 0.9  # a hybrid under this share of the teacher's accuracy teaches little


def run(run: Run) -> None:
    """Train OUT/meta, or take it from meta.source."""
    recipe, m = run.recipe, run.recipe.meta
    folder, done = run.open("meta")
    if done:
        return
    if m.source:
        reuse.take_meta(run, folder)
        return
    made_with = {"teacher": run.teacher_record}
    settings = run.settings("meta", m)
    meta, stages = run.new_meta(), run.teacher_stages()
    smoothing = recipe.augment.label_smoothing
    if m.objective == "labels":
        objective = Classify(meta, run.tokens, smoothing)
    else:
        objective = MatchTeacher(meta, run.teacher.model, stages, m, run.tokens, smoothing)
    outcome, state, engine = run.train(objective, run.data, m, settings, folder, "meta")
    metrics = outcome.evaluation | _hybrids(run, meta, stages, engine.dtype, run.eval_batch(settings))
    engine.close()
    prefix = "" if m.objective == "labels" else "meta."
    if run.dist.main:
        save_weights(folder / "model.safetensors", {name.removeprefix(prefix): t for name, t in state.items()})
        _report(metrics, recipe.modules)
    run.finish(
        folder, "meta", None, outcome, settings,
        epochs=m.epochs, flops_per_image=objective.flops_per_image, metrics=metrics, made_with=made_with,
    )  # fmt: skip


def _hybrids(run: Run, meta: MetaModel, stages: list[nn.Module], dtype, batch: int) -> dict[str, float]:
    """Accuracy of the teacher, and of the meta model with each teacher module in its place."""
    teacher = run.teacher.model.to(run.dist.device, dtype)
    cases = {"teacher_accuracy": Predictor(meta, teacher, (teacher,))}
    for i, stage in enumerate(stages):
        cases[f"hybrid_accuracy/{i}"] = Predictor(
            meta, lambda x, i=i, stage=stage: meta.back(stage(meta.front(x, i)), i), (stage,)
        )
    return {name: evaluate(case, run.data, dtype, batch, run.dist)["accuracy"] for name, case in cases.items()}


def _report(metrics: dict[str, float], modules: int) -> None:
    teacher = metrics["teacher_accuracy"]
    hybrids = [metrics[f"hybrid_accuracy/{i}"] for i in range(modules)]
    shown = ", ".join(f"{i}: {100 * h:.1f}%" for i, h in enumerate(hybrids))
    log.info("teacher %.1f%%, meta model %.1f%%, hybrids %s", 100 * teacher, 100 * metrics["accuracy"], shown)
    for i, hybrid in enumerate(hybrids):
        if hybrid < FAR_BELOW * teacher:
            log.warning(
                "teacher module %d reaches only %.1f%% inside the meta model (teacher %.1f%%): its student will learn "
                "from a broken teacher. Use meta.objective=matching, meta.init=teacher, or more meta.epochs",
                i, 100 * hybrid, 100 * teacher,
            )  # fmt: skip
