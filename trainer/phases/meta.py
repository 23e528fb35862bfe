"""Phase meta: train the meta model, then measure every teacher module inside it (hybrid accuracy)."""

from __future__ import annotations

from trainer.context import Run, save_weights
from trainer.distributed.engine import working_type
from trainer.evaluation.accuracy import Predictor
from trainer.objectives import meta_objective
from trainer.teaching import bases, hybrids, reuse
from trainer.teaching.meta import new_meta
from trainer.teaching.teachers import with_seedling


def run(run: Run) -> None:
    """Train OUT/meta, take it from meta.source, or let the teacher be it (meta.blocks_per_module=0)."""
    recipe, m = run.recipe, run.recipe.meta
    folder, done = run.open("meta")
    if done:
        return
    if m.source:
        reuse.take_meta(run, folder)
        return
    grown = recipe.teacher.grown
    if grown:
        run = with_seedling(run)
    made_with = {} if grown else {"teacher": run.teacher_record}
    settings = run.settings("meta", m)
    meta, stages = new_meta(run), run.teacher_stages()
    trained = m.blocks_per_module > 0
    if trained:
        objective = meta_objective(meta, stages, m, run.tokens, recipe.augment.label_smoothing, recipe.seed)
        outcome, state, engine = run.train(objective, run.data, m, settings, folder, "meta")
    else:
        state = {name: tensor.clone() for name, tensor in meta.state_dict().items()}
        outcome = run.measure(Predictor(meta, meta), settings)
    # a teacher that is grown is not there yet: phase assemble measures its hybrids
    measured = {} if grown else hybrids.measure(run, meta, stages, settings)
    found = bases.measure(meta, run.data, working_type(settings), run.eval_batch(settings), run.dist)
    if trained:
        engine.close()
    if run.dist.main:
        bases.save(folder, found)
        save_weights(folder / "model.safetensors", {name.removeprefix("meta."): t for name, t in state.items()})
        if measured:
            hybrids.report(measured, recipe.modules)
    run.finish(
        folder, "meta", None, outcome, settings, epochs=m.epochs if trained else 0,
        flops_per_image=objective.flops_per_image if trained else 0, metrics=outcome.evaluation | measured,
        made_with=made_with,
    )  # fmt: skip
