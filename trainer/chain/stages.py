"""Which jobs make up the chain of a recipe, what each needs on disk, and what of it is already there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.artifacts import artifact_name, require
from trainer.schema import Recipe

FOLLOWING = ("evaluate", "push")  # done again when what they look at was made anew


@dataclass(frozen=True)
class Stage:
    """One submission: a job, or an array with one element per module."""

    name: str  # of the job, its logs and its settings
    phase: str  # --phase of trainer/run.py; download is the chain's own
    needs: tuple[str, ...]  # stages that must end well before
    inputs: tuple[str, ...]  # artifacts that must lie complete on disk before
    artifacts: tuple[str, ...]  # what it makes, one per array element
    overrides: tuple[str, ...] = ()
    array: bool = False


def chain(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe in an order in which each stands behind what it needs.

    The same phases as --phase all, with the baselines as jobs of their own.
    """
    stages, first, teacher = [], (), ()
    if hub_names(recipe) or recipe.hub.repo:
        stages.append(Stage("download", "download", (), (), ("download",)))
        first = ("download",)
    if not recipe.teacher.source:
        stages.append(Stage("teacher", "teacher", first, (), ("teacher",)))
        first, teacher = ("teacher",), ("teacher",)
    modules = tuple(artifact_name("distill", i) for i in range(recipe.modules))
    trained = artifact_name("train", start=recipe.train.start)
    stages += [
        Stage("meta", "meta", first, teacher, ("meta",)),
        Stage("distill", "distill", ("meta",), (*teacher, "meta"), modules, array=True),
        Stage("train", "train", ("distill",), (*teacher, "meta", *modules), (trained,)),
    ]
    for start in recipe.train.baselines:
        name = artifact_name("train", start=start)
        if start != recipe.train.start:
            after, inputs = (first, teacher) if start == "scratch" else (("distill",), (*teacher, "meta", *modules))
            stages.append(Stage(name, "train", after, inputs, (name,), (f"train.start={start}",)))
    evaluated = artifact_name("evaluate", start=recipe.train.start)
    stages.append(Stage("evaluate", "evaluate", ("train",), (trained,), (evaluated,)))
    if recipe.hub.repo:
        stages.append(Stage("push", "push", ("download", "evaluate"), (trained, evaluated), ("push",)))
    return stages


def hub_names(recipe: Recipe) -> list[str]:
    """What has to be downloaded before compute nodes can work offline."""
    names = [recipe.teacher.source, recipe.data.path if recipe.data.source == "hub" else ""]
    return [name for name in names if name and not Path(name).exists()]


def missing(stage: Stage, out: Path, recipe: Recipe) -> list[int]:
    """Array elements (0 for a plain job) whose artifact is not complete yet.

    Raises:
        ValueError: there is one of another recipe, or a file of it is damaged.
    """
    todo = []
    for i, name in enumerate(stage.artifacts):
        if not (out / name / "result.json").is_file():
            todo.append(i)
        elif stage.phase in FOLLOWING:
            made = [(out / n / "result.json").stat().st_mtime for n in (*stage.inputs, name) if (out / n).is_dir()]
            elsewhere = stage.phase == "push" and _pushed_to(out, recipe) != [recipe.hub.repo, recipe.hub.revision]
            if made != sorted(made) or elsewhere:  # an input was made anew since
                todo.append(i)
        elif stage.phase != "download":
            require(out, name, recipe, "the chain")
    return todo


def _pushed_to(out: Path, recipe: Recipe) -> list[str]:
    _, result = require(out, "push", recipe, "the chain")
    return [result["repo"], result["revision"]]
