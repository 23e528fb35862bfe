"""Phases cluster and expert: share a module's images out among its experts, and teach each expert alone.

Every expert is an independent job: it needs teacher, meta model and clusters, and nothing of another expert.
"""

from __future__ import annotations

import logging

from trainer.context import Run, save_weights
from trainer.loop.fit import Outcome
from trainer.request.graph import artifact_name
from trainer.teaching import clusters, experts
from trainer.teaching.meta import trained_meta

log = logging.getLogger(__name__)


def run_clusters(run: Run, module: int) -> None:
    """Make OUT/cluster_<module>."""
    folder = run.out / artifact_name("cluster", module)
    there = run.dist.gather(folder.is_dir())[0]
    clusters.ensure(run, module, f"--phase cluster --module {module}")
    if there and run.dist.main:
        log.info("%s is complete: nothing to do", folder)


def run(run: Run, module: int, expert: int) -> None:
    """Train OUT/expert_<module>_<expert>, a dense module; without weights where no image belongs to its cluster."""
    recipe, e = run.recipe, run.recipe.expert
    folder, done = run.open("expert", module, expert=expert)
    if done:
        return
    needed_by = f"--phase expert --module {module} --expert {expert}"
    found = clusters.ensure(run, module, needed_by)
    meta, meta_result = trained_meta(run, needed_by)
    settings = run.settings("expert", e)
    data = experts.share_of(run, found, module, expert, settings.global_batch)
    objective = experts.objective(run, found, meta, module, expert, experts.dense_modules(run, e.drop_path)[module])
    made_with = {"expert": expert, "teacher": run.teacher_record, "meta": meta_result["files"]["model.safetensors"]}
    outcome, images = Outcome({}, 0.0, steps=0, images_seen=0), 0
    if data is not None:
        name = f"module {module + 1}/{recipe.modules}, expert {expert + 1}/{recipe.student.moe.num_experts}"
        outcome, state, engine = run.train(objective, data, e, settings, folder, name)
        engine.close()
        images = len(run.data.train) if found.train is None else int((found.train == expert).sum())
        if run.dist.main:
            save_weights(folder / "model.safetensors", state)
    elif run.dist.main:
        log.warning("no image belongs to expert %d of module %d: there is nothing to teach it", expert, module)
    evaluated = {"val_images" if name == "images" else name: value for name, value in outcome.evaluation.items()}
    run.finish(
        folder, "expert", module, outcome, settings,
        epochs=e.epochs if images else 0, flops_per_image=objective.flops_per_image,
        metrics=evaluated | {"images": images, "share": found.shares[expert]}, made_with=made_with,
    )  # fmt: skip
