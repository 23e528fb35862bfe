"""Phase evaluate: load the trained student as a user would, measure it on every validation image, and analyse it.

On any number of ranks, each with the whole student. What is measured is what was saved, the fp32 masters, in the type
that phase train worked in ("dtype" in its result.json): a bf16 run has one accuracy.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from models.labels import refuse_other_classes
from trainer import artifacts
from trainer.context import Run, Trained
from trainer.disk import write_json
from trainer.distributed.engine import working_type
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.evaluation.analysis import Analysis
from trainer.loop.fit import Outcome
from trainer.request.graph import artifact_name
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
        note = refuse_other_classes(run.labels, student.labels, what=str(trained), where=run.sources[0].name, step=step)
        if note:
            log.warning(note)
    data = run.data_for(student.preprocessing)
    analysis = Analysis(student, data.val, student.preprocessing, run.dist)
    batch = run.eval_batch(settings)
    metrics = evaluate(Predictor(student, student), data, dtype, batch, run.dist, observe=analysis.observe)
    summary = analysis.summary()
    if run.dist.main:
        write_json(folder / "analysis.json", summary)
    outcome = Outcome(metrics, time.perf_counter() - started, steps=0, images_seen=int(metrics["images"]))
    measured = Trained(outcome, {}, epochs=0, flops_per_image=0)
    run.finish(folder, "evaluate", None, measured, settings, metrics=metrics)
