"""Which jobs make up the chain of a recipe, and what each needs on disk; derived from the table of phases."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trainer.config.recipe import Recipe
from trainer.request.graph import TABLE, Phase, artifact_name, artifacts_of, row_of, taking_part

DOWNLOAD = "download"  # the chain's own stage: fills the caches where there is internet
CELL = "cell"  # of a study: all of one variant with one seed (trainer/study/element.py)
GATHER = "gather"  # of a study: its tables, and what tuning chose (trainer/study/gather.py)
FOLLOWING = ("evaluate", "push")  # done again when what they look at was made anew


@dataclass(frozen=True)
class Stage:
    """One submission: a job, or an array with one element per artifact."""

    name: str  # of the job and its logs
    phase: str  # --phase of trainer/run.py, or one of the three above
    needs: tuple[str, ...]  # stages that must end well before
    inputs: tuple[str, ...]  # artifacts that must lie complete on disk before
    artifacts: tuple[str, ...]  # what it makes, one per array element; a plain job's first one tells how far it is
    arguments: tuple[str, ...] = ()  # more of trainer/run.py; of a study's stages all that their program gets
    array: bool = False
    experts: int = 0  # of an array over modules x experts: element e is expert e % experts of module e // experts

    @property
    def setting(self) -> str:
        """What `nodes` and `time` per stage call it."""
        if self.of_study or (self.phase != DOWNLOAD and row_of(self.phase).repeated):
            return self.phase
        return self.name

    @property
    def of_study(self) -> bool:
        """Whether a program of trainer/study runs in place of trainer/run.py."""
        return self.phase in (CELL, GATHER)


def chain(recipe: Recipe) -> list[Stage]:
    """The stages that the student of a recipe and its baselines need, each behind what it needs itself.

    Those of --phase all, but for what is of no use to a training that does not start from distilled modules.
    """
    by_name = {stage.name: stage for stage in stages(recipe)}
    to_follow = [name for name, stage in by_name.items() if stage.phase in ("train", "detect", *FOLLOWING)]
    needed = set()
    while to_follow:
        name = to_follow.pop()
        needed.add(name)
        to_follow += by_name[name].needs
    return [stage for name, stage in by_name.items() if name in needed]


def stages(recipe: Recipe) -> list[Stage]:
    """Every phase of --phase all as a job, with the baselines as jobs of their own."""
    start = recipe.train.start
    made: list[Stage] = []
    if hub_names(recipe) or recipe.hub.repo:
        made.append(Stage(DOWNLOAD, DOWNLOAD, (), (), (DOWNLOAD,)))
    for row in taking_part(recipe):
        starts = [start]
        if row.name == "train":
            starts = list(dict.fromkeys((start, *recipe.train.baselines)))
        for each in starts:
            made += _stages_of(row, recipe, each, made)
    return made


def _stages_of(row: Phase, recipe: Recipe, start: str, before: list[Stage]) -> list[Stage]:
    """The jobs of one phase, behind those that are there already."""
    needed = row.needs(recipe, start)
    inputs = tuple(name for phase in needed for name in artifacts_of(recipe, phase, recipe.train.start))
    artifacts = tuple(artifacts_of(recipe, row.name, start))
    waits = _last_of(needed, before)
    if row.name == "push":  # whether the push may be was asked by the download job
        waits = (DOWNLOAD, *waits)
    layout = row.jobs(recipe)
    if layout == "together":  # the last module's first: there are the checkpoints, and its result comes last
        return [Stage(row.name, row.name, waits, inputs, artifacts[::-1])]
    if layout == "sequence":
        return _one_after_another(row, recipe, needed, artifacts, waits)
    if row.repeated:
        experts = recipe.student.moe.num_experts if row.repeated == "expert" else 0
        return [Stage(row.name, row.name, waits, inputs, artifacts, array=True, experts=experts)]
    if row.name == "train" and start != recipe.train.start:  # a baseline
        return [Stage(artifacts[0], row.name, waits, inputs, artifacts, (f"train.start={start}",))]
    return [Stage(row.name, row.name, waits, inputs, artifacts)]


def _last_of(needed: tuple[str, ...], before: list[Stage]) -> tuple[str, ...]:
    """The stage to wait for: the last one of the latest phase that is needed, else the download."""
    order = [row.name for row in TABLE]
    latest = max(needed, key=order.index, default=DOWNLOAD)
    names = [stage.name for stage in before if stage.phase == latest]
    if latest in names:  # not its baselines
        return (latest,)
    return tuple(names[-1:])


def _one_after_another(
    row: Phase, recipe: Recipe, needed: tuple[str, ...], artifacts: tuple[str, ...], waits: tuple[str, ...]
) -> list[Stage]:
    """Every module is a job that waits for the one before it: the elements of an array have no order."""
    whole = tuple(name for phase in needed if not row_of(phase).repeated for name in artifacts_of(recipe, phase))
    in_turn = []
    for module, name in enumerate(artifacts):
        of_module = tuple(artifact_name(phase, module) for phase in needed if row_of(phase).repeated)
        inputs = (*whole, *artifacts[:module], *of_module)
        in_turn.append(Stage(name, row.name, waits, inputs, (name,), ("--module", str(module))))
        waits = (name,)
    return in_turn


def hub_names(recipe: Recipe) -> list[str]:
    """What has to be downloaded before compute nodes can work offline."""
    names = [recipe.teacher.source]
    if recipe.data.source in ("hub", "auto"):
        names.append(recipe.data.path)
    names += [recipe.meta.source, recipe.distill.source]
    if recipe.student.init != "teacher":
        names.append(recipe.student.init)
    names += [recipe.train.init, recipe.detect.backbone if recipe.detect.epochs else ""]
    return [name for name in dict.fromkeys(names) if name and not Path(os.path.expandvars(name)).expanduser().exists()]
