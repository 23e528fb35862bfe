"""What a study asks for: a YAML of variants and seeds becomes cells, each with its recipe and its steps. No torch.

base: study_base.yaml            # a recipe; this path and the next are relative to the study
ds_config: ../ds_configs/cpu_debug.json
seeds: [0, 1, 2]
share_teacher: true              # one teacher for all seeds: that of the first
teacher_overrides: {data.limit: 0}  # of the shared teacher only, e.g. more images than the students get
overrides: {train: {epochs: 12}} # of every cell
variants:
  scratch: {overrides: {train.start: scratch}, label: from scratch}
  m2mkd: {reference: scratch, group: main}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.load import close, load_recipe, read_yaml, shown, to_dict
from trainer.config.recipe import Recipe
from trainer.request.graph import TABLE, artifact_name, artifacts_of, defining, preparation, teacher_results

KEYS = ("title", "base", "ds_config", "seeds", "share_teacher", "teacher_overrides", "overrides", "variants")
VARIANT_KEYS = ("label", "overrides", "phases", "reference", "group")
STEPS = tuple(row.name for row in TABLE if row.name != "push")
TEACHERS = "teachers"  # folder of the shared ones, beside those of the variants


@dataclass(frozen=True)
class Variant:
    """One row of the table: what differs from the base, and what it is compared with."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()  # () = what its training needs
    references: tuple[str, ...] = ()
    group: str = ""  # variants of one group share a plot


@dataclass(frozen=True)
class Study:
    """A checked study file."""

    title: str
    base: Path
    ds_config: Path
    seeds: tuple[int, ...]
    share_teacher: bool
    teacher_overrides: tuple[str, ...]
    overrides: tuple[str, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Step:
    """One artifact, by its name: what is between underscores says the phase, the module and the expert."""

    name: str

    @property
    def phase(self) -> str:
        return self.name.partition("_")[0]

    @property
    def numbers(self) -> list[int]:
        """Module and expert, as far as the phase goes by them."""
        return [int(part) for part in self.name.split("_")[1:] if part.isdecimal()]


@dataclass(frozen=True)
class Cell:
    """One variant with one seed: a run folder of its own."""

    variant: str
    seed: int
    recipe: Recipe
    steps: tuple[Step, ...]
    folder: Path
    keys: Mapping[str, str] = field(default_factory=dict)  # step -> hash of what defines its artifact
    teacher: Path | None = None  # folder of the teacher, this cell's own or a shared one

    @property
    def name(self) -> str:
        """As it reads in messages: labels/seed0."""
        return f"{self.variant}/seed{self.seed}"

    def done(self, step: Step) -> bool:
        """Whether the artifact of a step is complete."""
        return (self.folder / step.name / "result.json").is_file()

    @property
    def complete(self) -> bool:
        return all(self.done(step) for step in self.steps)


def read_study(path: Path, extra: Sequence[str] = ()) -> Study:
    """Read a study file.

    Args:
        extra: "section.key=value" of the command line, for every cell.

    Raises:
        ValueError: no such file, an unknown key or variant, or a value of the wrong kind.
    """
    if not path.is_file():
        names = sorted(study.name for study in path.parent.glob("study_*.yaml"))
        raise ValueError(f"no study at {path}. Studies there: {', '.join(names) or 'none'}")
    values = _section(read_yaml(path.read_text(), f"study {path}"), f"study {path}", KEYS)
    for key in ("base", "variants"):
        if not values.get(key):
            raise ValueError(f"study {path} has no {key}: see the head of trainer/study/plan.py for an example")
    seeds = values.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise ValueError(f"seeds is {shown(seeds)}, expected a list of whole numbers such as [0, 1, 2]")
    if not isinstance(values.get("share_teacher", False), bool):
        raise ValueError(f"share_teacher is {shown(values['share_teacher'])}, expected true or false")
    if values.get("teacher_overrides") and not values.get("share_teacher"):
        raise ValueError("teacher_overrides are of the shared teacher: set share_teacher: true, or use overrides")
    variants = tuple(_variant(name, about) for name, about in _section(values["variants"], "variants").items())
    names = [variant.name for variant in variants]
    for variant in variants:
        for name in variant.references:
            if name not in names:
                raise ValueError(f"variants.{variant.name}.reference names {name}. {close(name, names)}")
    return Study(
        title=str(values.get("title") or path.stem.removeprefix("study_").replace("_", " ")),
        base=path.parent / str(values["base"]),
        ds_config=path.parent / str(values.get("ds_config", "../ds_configs/cpu_debug.json")),
        seeds=tuple(seeds),
        share_teacher=values.get("share_teacher", False),
        teacher_overrides=tuple(flat(values.get("teacher_overrides") or {}, "teacher_overrides")),
        overrides=(*flat(values.get("overrides") or {}, "overrides"), *extra),
        variants=variants,
    )


def cells(study: Study, out: Path) -> list[Cell]:
    """Every cell, all variants of the first seed before those of the next; shared teachers first.

    Raises:
        ValueError: a recipe that cannot be resolved; the variant is named.
    """
    teachers: dict[str, Cell] = {}  # by the key of their artifact
    planned = []
    for seed in study.seeds:
        for variant in study.variants:
            recipe = _recipe(study, variant, f"seed={seed}")
            teacher = None
            if study.share_teacher and recipe.teacher.grown:
                raise ValueError(
                    f"variant {variant.name}: teacher.grown makes a teacher per seed: leave out share_teacher"
                )
            if study.share_teacher and not recipe.teacher.source:
                first = _recipe(study, variant, f"seed={study.seeds[0]}", *study.teacher_overrides)
                key = key_of(first, "teacher")
                if key not in teachers:
                    teachers[key] = _cell(f"{TEACHERS}/{key}", study.seeds[0], first, ("teacher",), out)
                teacher = teachers[key].teacher
                source = f"teacher.source={json.dumps(str(teacher.resolve()))}"
                recipe = _recipe(study, variant, f"seed={seed}", source)
            planned.append(_cell(variant.name, seed, recipe, variant.phases, out, teacher))
    return [*teachers.values(), *planned]


def steps(recipe: Recipe, phases: Sequence[str] = ()) -> tuple[Step, ...]:
    """The artifacts of a recipe in the order in which they are made.

    Args:
        phases: those wanted; () = what training from recipe.train.start needs.

    Raises:
        ValueError: a phase that makes nothing in this recipe.
    """
    start = recipe.train.start
    taught = start == "scratch_equal_cost" or (start == "distilled" and not recipe.train.init)
    first = list(teacher_results(recipe))
    if recipe.teacher.grown:
        first = ["meta", *artifacts_of(recipe, "incubate"), *first]
    train = artifact_name("train", start=start)
    if not phases:
        before = preparation(recipe) if taught else ()
        names = dict.fromkeys((*first, *before, train))
        return tuple(map(Step, names))
    # whatever this recipe can make, in order; a grown teacher and the preparation share their meta model
    names = dict.fromkeys((*first, *preparation(recipe), train, artifact_name("evaluate", start=start)))
    every = [Step(name) for name in names]
    makers = {step.phase for step in every}
    for phase in phases:
        if phase not in makers:
            raise ValueError(f"phase {phase} makes nothing in this recipe: leave it out of phases")
    return tuple(step for step in every if step.phase in phases)


def flat(values: Any, where: str) -> list[str]:
    """Nested or dotted keys as the strings of a command line: {"a": {"b": 1}, "c.d": 2} -> ["a.b=1", "c.d=2"]."""
    texts = []
    for key, value in _section(values, where).items():
        if isinstance(value, dict):
            texts += [f"{key}.{text}" for text in flat(value, f"{where}.{key}")]
        else:
            texts.append(f"{key}={json.dumps(value)}")  # JSON is YAML
    return texts


def _variant(name: Any, about: Any) -> Variant:
    where = f"variants.{name}"
    name = str(name)
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name == TEACHERS or name[0] == ".":
        raise ValueError(f"{where} names a folder: use letters, digits, - and _, and another name than {TEACHERS}")
    values = _section(about, where, VARIANT_KEYS)
    phases = values.get("phases") or []
    if not isinstance(phases, list):
        raise ValueError(f"{where}.phases is {shown(phases)}, expected a list such as [meta, distill, train]")
    for phase in phases:
        if phase not in STEPS:
            raise ValueError(f"{where}.phases names {shown(phase)}. {close(str(phase), STEPS)}")
    overrides = tuple(flat(values.get("overrides") or {}, f"{where}.overrides"))
    if any(text.startswith("seed=") for text in overrides):
        raise ValueError(f"{where}.overrides sets seed: the seeds of a study stand in its list seeds")
    references = values.get("reference") or []
    if not isinstance(references, list):
        references = [references]
    return Variant(
        name=name,
        label=str(values.get("label") or name),
        overrides=overrides,
        phases=tuple(phases),
        references=tuple(map(str, references)),
        group=str(values.get("group") or ""),
    )


def _section(values: Any, where: str, known: Sequence[str] = ()) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a section of keys, got {shown(values)}")
    for key in values:
        if known and key not in known:
            raise ValueError(f"{where} has the unknown key {key}. {close(str(key), known)}")
    return values


def _recipe(study: Study, variant: Variant, *more: str) -> Recipe:
    try:
        return load_recipe(study.base, [*study.overrides, *variant.overrides, *more])
    except ValueError as error:
        raise ValueError(f"variant {variant.name}: {error}") from None


def _cell(
    variant: str, seed: int, recipe: Recipe, phases: Sequence[str], out: Path, teacher: Path | None = None
) -> Cell:
    folder = out / variant / f"seed{seed}"
    steps_of_cell = steps(recipe, phases)
    keys = {}
    for step in steps_of_cell:
        keys[step.name] = key_of(recipe, step.name)
        if step.phase in ("teacher", "assemble"):
            teacher = folder / step.phase
    return Cell(variant, seed, recipe, steps_of_cell, folder, keys, teacher)


def key_of(recipe: Recipe, name: str) -> str:
    """Two artifacts of one name and key are interchangeable."""
    text = json.dumps(defining(to_dict(recipe), name), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{name}-{digest[:12]}"
