"""Phase expert: teach every expert of a module alone, as a dense module. Experimental (docs/studies.md).

Every expert is an independent job: it needs teacher, meta model and clusters, and nothing of another expert.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from models.modules.meta import MetaModel
from models.modules.stitch import StudentModule
from trainer.context import Run, Trained
from trainer.loop.fit import Outcome
from trainer.objectives import Distill
from trainer.objectives.distill import DistillTokens
from trainer.teaching import clusters, experts
from trainer.teaching.clusters import Clusters
from trainer.teaching.estimate import Known, Rehearsed, of_training
from trainer.teaching.meta import new_meta, trained_meta

log = logging.getLogger(__name__)


def run(run: Run, module: int, expert: int) -> None:
    """Train OUT/expert_<module>_<expert>, a dense module; without weights where no image belongs to its cluster."""
    recipe, schedule = run.recipe, run.recipe.expert
    folder, complete = run.open("expert", module, expert=expert)
    if complete:
        return
    needed_by = f"--phase expert --module {module} --expert {expert}"
    rule = clusters.ensure(run, module, needed_by)
    meta, meta_result = trained_meta(run, needed_by)
    settings = run.settings("expert")
    data = experts.share_of(run, rule, module, expert, settings.global_batch)
    student = experts.dense_modules(run, schedule.drop_path)[module]
    made_with = {"expert": expert, "teacher": run.teacher_record, "meta": meta_result["files"]["model.safetensors"]}
    if data is None:
        if run.dist.main:
            log.warning("no image belongs to expert %d of module %d: there is nothing to teach it", expert, module)
        images = 0
        trained = Trained(Outcome({}, 0.0, steps=0, images_seen=0), {}, epochs=0, flops_per_image=0)
    else:
        images = len(run.data.train) if rule.train is None else int((rule.train == expert).sum())
        what = f"module {module + 1}/{recipe.modules}, expert {expert + 1}/{recipe.student.moe.num_experts}"
        pair = objective(run, rule, module, expert, student, meta)
        trained = run.train(pair, data, schedule, settings, folder, what)
    metrics = dict(trained.outcome.evaluation)
    if "images" in metrics:
        metrics["val_images"] = metrics.pop("images")
    run.finish(
        folder,
        "expert",
        module,
        trained,
        settings,
        metrics=metrics | {"images": images, "share": rule.shares[expert]},
        weights=trained.weights or None,
        made_with=made_with,
    )


def objective(run: Run, rule: Clusters, module: int, expert: int, student: StudentModule, meta: MetaModel) -> Distill:
    """How an expert is taught: as a module is, but where tokens are shared out, at the border on its own ones only."""
    config = replace(run.recipe.distill, routing_weight=0.0)  # there is no router yet
    stages = run.teacher_stages()
    pair = (student, stages[module], meta, module, config)
    smoothing = run.recipe.augment.label_smoothing
    whole = None if run.classifies else MetaModel(stages)
    if rule.train is not None:
        return Distill(*pair, run.tokens, smoothing, teacher=whole)
    is_own = experts.belongs_to(rule, meta, module, expert)
    return DistillTokens(is_own, *pair, tokens=run.tokens, label_smoothing=smoothing, teacher=whole)


def check(run: Run) -> None:
    """Whether experts can be taught one by one."""
    experts.check(run)


def taught(run: Run, module: int) -> Distill:
    """What the phase trains of each expert of a module, before any training."""
    student = experts.dense_modules(run)[module]
    return objective(run, clusters.untrained(run, module), module, 0, student, new_meta(run))


def rehearse(run: Run, module: int, known: Known) -> Rehearsed:
    """The experts of a module, each a dense module that learns from an equal share of the images."""
    count = run.recipe.student.moe.num_experts
    if module == 0:
        experts.check(run)
    student = experts.dense_modules(run)[module]
    rule = clusters.untrained(run, module)
    flops_per_image = objective(run, rule, module, 0, student, new_meta(run)).flops_per_image
    images = len(run.sources[0])
    if rule.train is not None:
        images = max(images // count, run.settings("expert").global_batch)
    costs, text, problem = {}, "", ""
    for expert in range(count):
        found = of_training(run, "expert", f"expert_{module}_{expert}", flops_per_image, images=images)
        costs |= found.costs
        text = text or found.text
        problem = problem or found.problem
    apart = count * sum(p.numel() for p in student.parameters())
    return Rehearsed(f"{count} experts, each about {text}", costs, apart=apart, problem=problem)
