"""Phase evaluate: load the trained student as a user would, measure it on every validation image, and analyse it."""

from __future__ import annotations

import time

from trainer import artifacts, disk
from trainer.context import Run
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.evaluation.analysis import Analysis
from trainer.loop.fit import Outcome
from trainer.request import graph
from trainer.teaching.families import family_of


def run(run: Run, start: str) -> None:
    """Write OUT/evaluate (or evaluate_scratch...) with analysis.json; always measures anew, whatever was there."""
    name = graph.artifact_name("train", start=start)
    trained, _ = artifacts.require(run.out, name, run.recipe, "--phase evaluate")
    folder, _ = run.open("evaluate", start=start)
    started = time.perf_counter()
    settings = run.settings("train", run.recipe.train, run.recipe.student.moe.num_experts)
    with artifacts.reading(trained):
        student = family_of(run.recipe).load(str(trained)).to(run.dist.device)
    data = run.data_for(student.preprocessing)
    analysis = Analysis(student, data.val, student.preprocessing, run.dist)
    metrics = evaluate(Predictor(student, student), data, next(student.parameters()).dtype,
                       run.eval_batch(settings), run.dist, observe=analysis.observe)  # fmt: skip
    found = analysis.summary()
    if run.dist.main:
        disk.write_json(folder / "analysis.json", found)
    outcome = Outcome(metrics, time.perf_counter() - started, steps=0, images_seen=int(metrics["images"]))
    run.finish(folder, "evaluate", None, outcome, settings, epochs=0, flops_per_image=0, metrics=metrics)
