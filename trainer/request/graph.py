"""The phases and what links them: names, order, results, and the sections of the recipe that define a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.config.recipe import Recipe

# The sections of the recipe an artifact depends on (evaluate: those of what it measures); others may change.
_TEACHER = ("seed", "data", "augment", "teacher")


_META = (*_TEACHER, "modules", "meta")


_STUDENT = (*_META, "distill", "expert", "student")


_ALL = (*_STUDENT, "refine", "train")


DEFINED_BY = {
    "teacher": _TEACHER,
    "meta": _META,
    "incubate": (*_META, "incubate"),
    "assemble": (*_META, "incubate", "assemble"),
    "cluster": (*_META, "expert", "student"),
    "expert": _STUDENT,
    "distill": _STUDENT,
    "refine": (*_STUDENT, "refine"),
    "train": _ALL,
    "train_scratch": (*_TEACHER, "student", "train"),
    "train_upcycled": (*_TEACHER, "modules", "student", "train"),
    "train_scratch_equal_cost": _ALL,
    "push": _ALL,
}


BY_MODULE = ("incubate", "cluster", "expert", "distill", "refine")  # each module is a job and an artifact of its own


NOT_DEFINING = {"data": ("workers", "fractals.cache"), "train": ("start", "baselines")}


def preparation(recipe: Recipe) -> list[str]:
    """Names of every artifact that is made on the way from the teacher to the student's end-to-end training."""
    modules, apart = range(recipe.modules), taught_by_expert(recipe)
    refined = [f"refine_{i}" for i in modules] if recipe.refine.epochs else []
    experts = range(recipe.student.moe.num_experts)
    parts = [name for i in modules for name in (f"cluster_{i}", *(f"expert_{i}_{j}" for j in experts)) if apart]
    return ["meta", *parts, *(f"distill_{i}" for i in modules), *refined]


def own_teacher(recipe: Recipe) -> tuple[str, ...]:
    """The artifact that holds the teacher a run makes itself, which is also its phase; empty when it is given."""
    if recipe.teacher.source:
        return ()
    return ("assemble",) if recipe.teacher.grown else ("teacher",)


def taught_by_expert(recipe: Recipe) -> bool:
    """Whether this run teaches the experts of its modules one by one before the modules."""
    return recipe.distill.level == "expert" and not recipe.distill.source


def in_one_job(recipe: Recipe, phase: str) -> bool:
    """Whether a phase that goes by module makes those of all modules in one training, and takes no module."""
    return phase == "refine" and recipe.refine.order == "together"


def trained_again(recipe: Recipe, module: int) -> bool:
    """Whether the second round trains this module: the first is fed images either way, but has to be taught once."""
    return module > 0 or not recipe.distill.epochs or in_one_job(recipe, "refine")


def taught_in(recipe: Recipe) -> str:
    """The phase whose result tells what a module has learned: the first round, unless it was left out."""
    return "distill" if recipe.distill.epochs or not recipe.refine.epochs else "refine"


def artifact_name(phase: str, module: int | None = None, start: str = "distilled", expert: int | None = None) -> str:
    """Folder name of a phase's artifact: distill_2, expert_2_0, train, train_scratch."""
    if phase in ("train", "evaluate") and start != "distilled":
        return f"{phase}_{start}"
    return "_".join(str(part) for part in (phase, module, expert) if part is not None)


def _command(name: str) -> str:
    """The flags that make an artifact."""
    phase, _, rest = name.partition("_")
    if phase == "upcycle":  # made by whichever phase needs it first
        return "the phase"
    if not rest:
        return f"--phase {phase}"
    if phase == "expert":
        return "--phase expert --module {} --expert {}".format(*rest.split("_"))
    if phase in BY_MODULE:
        return f"--phase {phase} --module {rest}"
    return f"--phase {phase} train.start={rest}"


def defining(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of a recipe (as from to_dict) that decides what the artifact `name` holds."""
    phase = name.partition("_")[0]
    kind = phase if phase in BY_MODULE else name.replace("evaluate", "train")
    keys = DEFINED_BY[kind]
    if recipe["teacher"]["grown"] and kind not in ("meta", "incubate"):  # those come before the teacher
        keys = dict.fromkeys((*keys, *DEFINED_BY["assemble"]))
    kept = {}
    for key in keys:
        if key == "expert" and recipe["distill"]["level"] == "module":
            continue  # has no effect there
        value = recipe.get(key)
        if isinstance(value, dict):
            whole = kind == key == "teacher"  # it is cut into modules later
            value = _without(value, ("depths",) if whole else NOT_DEFINING.get(key, ()))
        kept[key] = value
    return kept


def _without(section: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A section without these keys; dotted ones lie in a section inside it."""
    kept = {key: value for key, value in section.items() if key not in keys}
    for inner, _, key in (dotted.partition(".") for dotted in keys if "." in dotted):
        if isinstance(kept.get(inner), dict):
            kept[inner] = _without(kept[inner], (key,))
    return kept


PHASES = {
    "teacher": "train a small ViT as the teacher; only for recipes without teacher.source and teacher.grown",
    "meta": "train the meta model, N shallow stages of the teacher's width",
    "incubate": "grow teacher module --module i (or all) inside the frozen meta model; only with teacher.grown",
    "assemble": "put the incubated modules together and fine-tune the teacher; only with teacher.grown",
    "cluster": "assign the images of module --module i (or of all) to its experts; only with distill.level=expert",
    "expert": "teach expert --expert j of module --module i (or all of them) alone; only with distill.level=expert",
    "distill": "teach student module --module i (or all of them) inside the frozen meta model",
    "refine": "second round: teach module --module i (or all) on what the modules before it really send",
    "train": "put the modules together and train the student end to end; train.start=scratch leaves out the teaching",
    "evaluate": "load the trained student as a user would and measure it on every validation image",
    "push": "push the student (or every stage, see hub.stages) to hub.repo with a model card",
    "all": "all of these one after another, baselines and report included; push only when hub.repo is set",
}


BY_EXPERT = ("cluster", "expert")  # phases of distill.level=expert


GROWING = ("incubate", "assemble")  # phases of teacher.grown
