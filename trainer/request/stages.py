"""Which jobs make up the chain of a recipe, what each needs on disk, and what of it is already there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.config.recipe import Recipe
from trainer.request.graph import BY_MODULE, artifact_name, in_one_job, own_teacher, preparation, taught_by_expert

FOLLOWING = ("evaluate", "push")  # done again when what they look at was made anew


@dataclass(frozen=True)
class Stage:
    """One submission: a job, or an array with one element per artifact."""

    name: str  # of the job and its logs
    phase: str  # --phase of trainer/run.py; download is the chain's own
    needs: tuple[str, ...]  # stages that must end well before
    inputs: tuple[str, ...]  # artifacts that must lie complete on disk before
    artifacts: tuple[str, ...]  # what it makes, one per array element; a plain job's first one tells how far it is
    arguments: tuple[str, ...] = ()  # more of trainer/run.py
    array: bool = False
    experts: int = 0  # of an array over modules x experts: element e is expert e % experts of module e // experts

    @property
    def setting(self) -> str:
        """What `nodes` and `time` per stage call it."""
        return self.phase if self.phase in BY_MODULE else self.name


def chain(recipe: Recipe) -> list[Stage]:
    """The stages that the student of a recipe and its baselines need, each behind what it needs itself.

    Those of --phase all, but for what is of no use to a training that does not start from distilled modules.
    """
    every = {stage.name: stage for stage in stages(recipe)}
    needed, found = [name for name, stage in every.items() if stage.phase in ("train", *FOLLOWING)], set()
    while needed:
        name = needed.pop()
        found.add(name)
        needed += every[name].needs
    return [stage for name, stage in every.items() if name in found]


def stages(recipe: Recipe) -> list[Stage]:
    """Every phase of --phase all as a job, with the baselines as jobs of their own."""
    online = ("download",) if hub_names(recipe) or recipe.hub.repo else ()
    found = [Stage("download", "download", (), (), ("download",))] if online else []
    found += [*_to_meta(recipe, online), *_to_modules(recipe), *_second_round(recipe)]
    last = found[-1].name
    for start in dict.fromkeys((recipe.train.start, *recipe.train.baselines)):
        found.append(_training(recipe, start, online, last))
    trained, evaluated = (artifact_name(phase, start=recipe.train.start) for phase in ("train", "evaluate"))
    found.append(Stage("evaluate", "evaluate", ("train",), (trained,), (evaluated,)))
    if recipe.hub.repo:
        found.append(Stage("push", "push", ("download", "evaluate"), (trained, evaluated), ("push",)))
    return found


def _names(recipe: Recipe, phase: str) -> tuple[str, ...]:
    return tuple(artifact_name(phase, i) for i in range(recipe.modules))


def _by_module(recipe: Recipe, phase: str, needs: tuple[str, ...], inputs: tuple[str, ...]) -> Stage:
    return Stage(phase, phase, needs, inputs, _names(recipe, phase), array=True)


def _to_meta(recipe: Recipe, online: tuple[str, ...]) -> list[Stage]:
    """The teacher and the meta model, whichever comes first."""
    teacher = own_teacher(recipe)
    if recipe.teacher.grown:
        incubate = _by_module(recipe, "incubate", ("meta",), ("meta",))
        assemble = Stage("assemble", "assemble", ("incubate",), ("meta", *incubate.artifacts), teacher)
        return [Stage("meta", "meta", online, (), ("meta",)), incubate, assemble]
    meta = Stage("meta", "meta", teacher or online, teacher, ("meta",))
    return [Stage("teacher", "teacher", online, (), teacher), meta] if teacher else [meta]


def _to_modules(recipe: Recipe) -> list[Stage]:
    """The distilled modules, with their experts before them where those are taught one by one."""
    after, given = ("assemble",) if recipe.teacher.grown else ("meta",), (*own_teacher(recipe), "meta")
    if not taught_by_expert(recipe):
        return [_by_module(recipe, "distill", after, given)]
    cluster, experts = _by_module(recipe, "cluster", after, given), recipe.student.moe.num_experts
    given += cluster.artifacts
    made = tuple(artifact_name("expert", i, expert=j) for i in range(recipe.modules) for j in range(experts))
    expert = Stage("expert", "expert", ("cluster",), given, made, array=True, experts=experts)
    return [cluster, expert, _by_module(recipe, "distill", ("expert",), given + made)]


def _second_round(recipe: Recipe) -> list[Stage]:
    if not recipe.refine.epochs:
        return []
    given, taught, refined = (*own_teacher(recipe), "meta"), _names(recipe, "distill"), _names(recipe, "refine")
    if in_one_job(recipe, "refine"):  # the last module's first: there are the checkpoints, and its result comes last
        return [Stage("refine", "refine", ("distill",), given + taught, refined[::-1])]
    if recipe.refine.order == "parallel":
        return [_by_module(recipe, "refine", ("distill",), given + taught)]
    # the elements of an array have no order, so every module is a job that waits for the one before it
    return [
        Stage(name, "refine", (before,), (*given, *refined[:i], taught[i]), (name,), ("--module", str(i)))
        for i, (name, before) in enumerate(zip(refined, ("distill", *refined)))
    ]


def _training(recipe: Recipe, start: str, online: tuple[str, ...], last: str) -> Stage:
    """End-to-end training from `start`; `last` is the stage behind which all modules are there."""
    t, teacher, name = recipe.train, own_teacher(recipe), artifact_name("train", start=start)
    needs, inputs = (last,), (*teacher, "meta", *_names(recipe, "refine" if recipe.refine.epochs else "distill"))
    if start == "scratch_equal_cost":
        inputs = (*teacher, *preparation(recipe))
    elif start != "distilled" or t.init:
        needs, inputs = (teacher or online, teacher) if with_teacher(recipe, start) else (online, ())
        if t.border_weight:  # in the bases of the meta model
            needs, inputs = needs if recipe.teacher.grown else ("meta",), (*inputs, "meta")
    if start == t.start:
        return Stage("train", "train", needs, inputs, (name,))
    return Stage(name, "train", needs, inputs, (name,), (f"train.start={start}",))


def with_teacher(recipe: Recipe, start: str) -> bool:
    """Whether end-to-end training from `start` needs the teacher; a student that is given (train.init) may not."""
    t = recipe.train
    return start != "distilled" or not t.init or bool(t.kd_weight or t.border_weight or t.routing_weight)


def hub_names(recipe: Recipe) -> list[str]:
    """What has to be downloaded before compute nodes can work offline."""
    dense = recipe.student.init if recipe.student.init != "teacher" else ""
    names = [recipe.teacher.source, recipe.data.path if recipe.data.source == "hub" else "",
             recipe.meta.source, recipe.distill.source, dense, recipe.train.init]  # fmt: skip
    return [name for name in dict.fromkeys(names) if name and not Path(name).expanduser().exists()]
