"""Phase evaluate: load the trained student as a user would, measure it on every validation image, and analyse it.

On any number of ranks, each with the whole student. What is measured is what was saved, the fp32 masters, in the type
that phase train worked in ("dtype" in its result.json): a bf16 run has one accuracy. A student without classes is
measured beside its teacher, and where the images have labels by what its features tell of them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch
from torch import nn

from models.labels import refuse_other_classes
from trainer import artifacts
from trainer.context import Run, Trained
from trainer.disk import write_json
from trainer.distributed.engine import working_type
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.evaluation.analysis import Analysis
from trainer.evaluation.pooled import class_accuracies
from trainer.loop.fit import Data, Outcome
from trainer.request.graph import artifact_name
from trainer.teaching import comparison
from trainer.teaching.families import family_of

log = logging.getLogger(__name__)


def run(run: Run, start: str) -> None:
    """Write OUT/evaluate (or evaluate_scratch...) with analysis.json; always measures anew, whatever was there."""
    name = artifact_name("train", start=start)
    trained, made = artifacts.require(run.out, name, run.recipe, "--phase evaluate")
    folder, _ = run.open("evaluate", start=start)
    started = time.perf_counter()
    settings = run.settings_without_training()
    if "dtype" in made:
        settings = replace(settings, bf16=made["dtype"] == "bfloat16")
    dtype = working_type(settings)
    with artifacts.reading(trained):
        student = family_of(run.recipe).load(str(trained)).to(run.dist.device, dtype)
        step = "Use the data it was trained on"
        note = ""
        if run.classifies:
            where = run.sources[0].name
            note = refuse_other_classes(run.labels, student.labels, what=str(trained), where=where, step=step)
        if note:
            log.warning(note)
    data = run.data_for(student.preprocessing)
    analysis = Analysis(student, data.val, student.preprocessing, run.dist, classifies=run.classifies)
    batch = run.eval_batch(settings)
    measured = Predictor(student, student)
    if not run.classifies:
        measured = comparison.beside_teacher(run, student)
        for module in measured.frozen:
            module.to(run.dist.device, dtype)
    metrics = evaluate(measured, data, dtype, batch, run.dist, observe=analysis.observe)
    if not run.classifies and run.labels:
        metrics |= _of_labels(run, student, data, dtype, batch)
    summary = analysis.summary()
    if run.dist.main:
        write_json(folder / "analysis.json", summary)
    outcome = Outcome(metrics, time.perf_counter() - started, steps=0, images_seen=int(metrics["images"]))
    nothing_trained = Trained(outcome, {}, epochs=0, flops_per_image=0)
    run.finish(folder, "evaluate", None, nothing_trained, settings, metrics=metrics)


def _of_labels(run: Run, student: nn.Module, data: Data, dtype: torch.dtype, batch: int) -> dict[str, float]:
    """What the pooled features of student and teacher tell of the data's labels (collective)."""
    teacher = run.teacher.model.to(run.dist.device, dtype)
    seed = run.recipe.seed
    of_student = class_accuracies(student, "the student", data, dtype, batch, run.dist, seed=seed)
    what = f"teacher {run.teacher.source}"
    of_teacher = class_accuracies(teacher, what, data, dtype, batch, run.dist, seed=seed)
    return of_student | {f"teacher_{name}": accuracy for name, accuracy in of_teacher.items()}
