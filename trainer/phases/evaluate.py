"""Phase evaluate: load the trained student as a user would, and measure it on every validation image."""

from __future__ import annotations

import time

from models.vmoe import VMoE
from trainer import artifacts
from trainer.context import Run
from trainer.loop import Outcome, Predictor, evaluate


def run(run: Run, start: str) -> None:
    """Write OUT/evaluate (or evaluate_scratch...); always measures anew, whatever was there."""
    name = artifacts.artifact_name("train", start=start)
    trained, _ = artifacts.require(run.out, name, run.recipe, "--phase evaluate")
    folder, _ = run.open("evaluate", start=start)
    started = time.perf_counter()
    settings = run.settings("train", run.recipe.train, run.recipe.student.moe.num_experts)
    student = VMoE.from_pretrained(str(trained)).to(run.dist.device)
    data = run.data_for(student.preprocessing)
    metrics = evaluate(Predictor(student, student), data, next(student.parameters()).dtype,
                       run.eval_batch(settings), run.dist)  # fmt: skip
    outcome = Outcome(metrics, time.perf_counter() - started, steps=0, images_seen=int(metrics["images"]))
    run.finish(folder, "evaluate", None, outcome, settings, epochs=0, flops_per_image=0, metrics=metrics)
