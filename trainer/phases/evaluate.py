"""Phase evaluate: load the trained student as a user would, measure it on every validation image, and analyse it.

On any number of ranks, each with the whole student. What is measured is what was saved, the fp32 masters, in the type
that phase train worked in ("dtype" in its result.json): a bf16 run has one accuracy. A student without classes is
measured beside its teacher, and where the images have labels by what its features tell of them. One with classes is
measured and timed in all forms it can be used in, beside dense models, for card and report (run.inference). What
evaluate.tasks asks for beside it is in judged.json.
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
from trainer import artifacts
from trainer.config.tasks import parse_tasks
from trainer.context import Run, Trained
from trainer.data.loader import eval_batches
from trainer.disk import write_json
from trainer.distributed.engine import working_type
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.evaluation.analysis import Analysis
from trainer.evaluation.inference import Candidate, inference, measured
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
    predictor = Predictor(student, student)
    if not run.classifies:
        predictor = comparison.beside_teacher(run, student)
        for module in predictor.frozen:
            module.to(run.dist.device, dtype)
    metrics = evaluate(predictor, data, dtype, batch, run.dist, observe=analysis.observe)
    if not run.classifies and run.labels:
        metrics |= _of_labels(run, student, data, dtype, batch)
    outcome = Outcome(metrics, time.perf_counter() - started, steps=0, images_seen=int(metrics["images"]))
    forms, candidates = [], []
    if run.recipe.run.inference and run.classifies:
        forms = family_of(run.recipe).forms(student)
        candidates = measured(forms, metrics["accuracy"], data, dtype, batch, run.dist)
    summary = analysis.summary()
    smaller = {form.kept: candidate.accuracy for form, candidate in zip(forms, candidates) if form.kept}
    if smaller:
        summary["smaller"] = smaller
    if run.dist.main:
        summary |= _of_the_family(run, student, data, dtype)
        write_json(folder / "analysis.json", summary)
    made_with = {"judged": _judged(run, student, str(trained), dtype, batch, folder)}
    if candidates:
        others = _others(run, student) if run.dist.main else []
        made_with["inference"] = inference(candidates, others, data, dtype, batch, run.dist)
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


def _others(run: Run, student: nn.Module) -> list[Candidate]:
    """What the student's speed is compared with: its teacher where it is at hand, and what its family names."""
    models = []
    record = run.out / "meta" / "result.json"
    accuracy = None
    if record.is_file():
        accuracy = json.loads(record.read_text())["metrics"].get("teacher_accuracy")
    try:
        models.append(Candidate("dense teacher", run.load_teacher().model, accuracy=accuracy))
    except (ValueError, OSError) as error:  # a student from scratch, or of weights that somebody else trained
        log.info("the teacher is not timed beside the student: %s", error)
    rivals = family_of(run.recipe).rivals(student)
    return models + [Candidate(name, rival) for name, rival in rivals.items()]


def _of_the_family(run: Run, student: nn.Module, data: Data, dtype: torch.dtype) -> dict[str, Any]:
    """What the student's family shows of it, on a few images."""
    source = data.val.spread(min(FEW_IMAGES, len(data.val)))
    images = next(eval_batches(source, data.preprocessing, batch=len(source))).images
    return family_of(run.recipe).describe(student, images.to(run.dist.device, dtype))


def _of_labels(run: Run, student: nn.Module, data: Data, dtype: torch.dtype, batch: int) -> dict[str, float]:
    """What the pooled features of student and teacher tell of the data's labels (collective)."""
    teacher = run.teacher.model.to(run.dist.device, dtype)
    seed = run.recipe.seed
    of_student = class_accuracies(student, "the student", data, dtype, batch, run.dist, seed=seed)
    what = f"teacher {run.teacher.source}"
    of_teacher = class_accuracies(teacher, what, data, dtype, batch, run.dist, seed=seed)
    return of_student | {f"teacher_{name}": accuracy for name, accuracy in of_teacher.items()}
