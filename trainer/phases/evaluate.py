"""Phase evaluate: load the trained student as a user would, measure it on every validation image, and analyse it.

On any number of ranks, each with the whole student. What is measured is what was saved, the fp32 masters, in the type
that phase train worked in ("dtype" in its result.json): a bf16 run has one accuracy. A student without classes is
measured beside its teacher, and where the images have labels by what its features tell of them. One with classes is
timed beside dense models, for the model card (run.inference). What evaluate.tasks asks for beside it is in judged.json.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.labels import refuse_other_classes
from models.moe.layer import routed_layers
from trainer import artifacts
from trainer.config.tasks import parse_tasks
from trainer.context import Run, Trained
from trainer.data.loader import eval_batches
from trainer.disk import write_json
from trainer.distributed.engine import working_type
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.evaluation.analysis import Analysis
from trainer.evaluation.inference import Candidate, inference
from trainer.evaluation.pooled import class_accuracies
from trainer.judge.outputs import Bench
from trainer.judge.subjects import Subject
from trainer.judge.table import check_images, judge
from trainer.loop.fit import Data, Outcome
from trainer.report.judged import JUDGED
from trainer.request.graph import artifact_name
from trainer.teaching import comparison
from trainer.teaching.families import family_of

log = logging.getLogger(__name__)
FEW_IMAGES = 8  # that a family describes its student on


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
    summary |= _of_the_family(run, student, data, dtype, batch)
    if run.dist.main:
        write_json(folder / "analysis.json", summary)
    outcome = Outcome(metrics, time.perf_counter() - started, steps=0, images_seen=int(metrics["images"]))
    made_with = {"judged": _judged(run, student, str(trained), dtype, batch, folder)}
    if run.recipe.run.inference and run.classifies and hasattr(student, "set_k") and routed_layers(student):
        dense = _dense_models(run, student) if run.dist.main else []
        made_with["inference"] = inference(student, dense, metrics["accuracy"], data, dtype, batch, run.dist)
    nothing_trained = Trained(outcome, {}, epochs=0, flops_per_image=0)
    run.finish(folder, "evaluate", None, nothing_trained, settings, metrics=metrics, made_with=made_with)


def check(run: Run) -> None:
    """Whether the images of evaluate.tasks are there, and enough of them.

    Raises:
        ValueError: they are not.
    """
    for spec in parse_tasks(run.recipe.evaluate.tasks):
        check_images(spec, _bench(run, torch.float32, 1))


def _bench(run: Run, dtype: torch.dtype, batch: int) -> Bench:
    recipe = run.recipe
    data = replace(recipe.data, path=run.pinned(recipe.data.path))
    return Bench(
        run.dist, data, dtype, batch, run.workers, recipe.seed, recipe.evaluate.resamples, cache=run.out / "features"
    )


def _judged(
    run: Run, student: nn.Module, source: str, dtype: torch.dtype, batch: int, folder: Path
) -> dict[str, dict[str, float]]:
    """The figures of evaluate.tasks by evaluation; all of it is in judged.json (collective)."""
    specs = parse_tasks(run.recipe.evaluate.tasks)
    if not specs:
        if run.dist.main:
            (folder / JUDGED).unlink(missing_ok=True)  # of an evaluation before
        return {}
    subject = Subject("student", source, source, student.FORMAT.name, student, student.preprocessing, student.labels)
    judged = judge([subject], specs, _bench(run, dtype, batch))
    if run.dist.main:
        write_json(folder / JUDGED, judged)
    figures = {}
    for task in judged["tasks"]:
        of_student = task["results"]["student"]["figures"]
        figures[task["text"]] = {name: figure["value"] for name, figure in of_student.items()}
    return figures


def _dense_models(run: Run, student: nn.Module) -> list[Candidate]:
    """What the student's speed is compared with: its teacher where it is at hand, and a dense ViT of equal FLOPs."""
    models = []
    record = run.out / "meta" / "result.json"
    accuracy = None
    if record.is_file():
        accuracy = json.loads(record.read_text())["metrics"].get("teacher_accuracy")
    try:
        models.append(Candidate("dense teacher", run.load_teacher().model, accuracy=accuracy))
    except (ValueError, OSError) as error:  # a student from scratch, or of weights that somebody else trained
        log.info("the teacher is not timed beside the student: %s", error)
    equal = family_of(run.recipe).dense_of_equal_flops(student)
    return [*models, Candidate("dense ViT of equal FLOPs", equal)]


def _of_the_family(run: Run, student: nn.Module, data: Data, dtype: torch.dtype, batch: int) -> dict[str, Any]:
    """What the student's family shows of it, and the accuracies of its smaller forms (collective)."""
    family = family_of(run.recipe)
    found: dict[str, Any] = {}
    for kept, small in family.smaller(student).items():
        measured = evaluate(Predictor(small, small), data, dtype, batch, run.dist)
        found.setdefault("smaller", {})[kept] = measured["accuracy"]
    if run.dist.main:
        source = data.val.spread(min(FEW_IMAGES, len(data.val)))
        images = next(eval_batches(source, data.preprocessing, batch=len(source))).images
        found |= family.describe(student, images.to(run.dist.device, dtype))
    return found


def _of_labels(run: Run, student: nn.Module, data: Data, dtype: torch.dtype, batch: int) -> dict[str, float]:
    """What the pooled features of student and teacher tell of the data's labels (collective)."""
    teacher = run.teacher.model.to(run.dist.device, dtype)
    seed = run.recipe.seed
    of_student = class_accuracies(student, "the student", data, dtype, batch, run.dist, seed=seed)
    what = f"teacher {run.teacher.source}"
    of_teacher = class_accuracies(teacher, what, data, dtype, batch, run.dist, seed=seed)
    return of_student | {f"teacher_{name}": accuracy for name, accuracy in of_teacher.items()}
