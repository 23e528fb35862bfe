"""What a study asks for: a YAML of variants and seeds becomes cells, each with its recipe and its steps. No torch.

base: study_base.yaml            # a recipe; this path and the next are relative to the study
ds_config: ../ds_configs/cpu_debug.json
seeds: [0, 1, 2]
share_teacher: true              # one teacher for all seeds: that of the first
teacher_overrides: {data.limit: 0}  # of the shared teacher only, e.g. more images than the students get
overrides: {train: {epochs: 12}} # of every cell
axes:                            # every variant stands at every combination of their points
  data: {fractals: {}, textures: {data.source: textures}}
tune: {train.lr: [1.0e-2, 2.0e-2, 4.0e-2]}  # of each variant the best of these, or of a list of overrides (tuning.py)
tune_seeds: [0]                  # by these seeds; default: the first
tune_share: 0.2                  # on this share of the training images, held out meanwhile
tune_overrides: {train.epochs: 6}   # of the tuning only
variants:
  scratch: {overrides: {train.start: scratch}, label: from scratch, tune: {train.lr: [1.0e-2, 2.0e-2]}}
  m2mkd: {reference: scratch, group: main, at: {textures: {train.epochs: 10}}}  # overrides at one point of an axis
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.chain.settings import JOBS
from trainer.config.data import BUILT_IN
from trainer.config.knobs import close
from trainer.config.load import build, first_difference, load_recipe, read_yaml, shown, to_dict
from trainer.config.recipe import Recipe
from trainer.request.graph import TABLE, artifact_name, artifacts_of, defining, preparation, teacher_results

KEYS = ("title", "base", "ds_config", "seeds", "share_teacher", "teacher_overrides", "overrides", "axes", "variants")
TUNE_KEYS = ("tune", "tune_seeds", "tune_share", "tune_overrides")
VARIANT_KEYS = ("label", "overrides", "phases", "reference", "group", "tune", "at")
STEPS = tuple(row.name for row in TABLE if row.name != "push")
TEACHERS = "teachers"  # folder of the shared ones, beside those of the variants
TUNING = "tuning"  # folder of the trials, beside those of the variants
TUNE_SHARE = 0.2  # of the training images, held out for tuning


@dataclass(frozen=True)
class Variant:
    """One row of the table: what differs from the base, and what it is compared with."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()  # () = what its training needs
    references: tuple[str, ...] = ()
    group: str = ""  # variants of one group share a plot
    grid: tuple[tuple[str, ...], ...] = ()  # overrides of each choice, of which the best is taken; () = not tuned
    at: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # point of an axis -> overrides there


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
    variants: tuple[Variant, ...]  # at every point of the axes
    tune_seeds: tuple[int, ...]
    tune_share: float
    tune_overrides: tuple[str, ...]


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
    tunes: str = ""  # the variant whose choice this cell tries
    choice: tuple[str, ...] = ()  # the overrides that it tries

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
    values = _section(read_yaml(path.read_text(), f"study {path}"), f"study {path}", (*KEYS, *TUNE_KEYS))
    for key in ("base", "variants"):
        if not values.get(key):
            raise ValueError(f"study {path} has no {key}: see the head of trainer/study/plan.py for an example")
    seeds = _seeds(values.get("seeds", [0]), "seeds")
    if not isinstance(values.get("share_teacher", False), bool):
        raise ValueError(f"share_teacher is {shown(values['share_teacher'])}, expected true or false")
    if values.get("teacher_overrides") and not values.get("share_teacher"):
        raise ValueError("teacher_overrides are of the shared teacher: set share_teacher: true, or use overrides")
    share = values.get("tune_share", TUNE_SHARE)
    if not isinstance(share, float) or not 0 < share < 1:
        raise ValueError(f"tune_share is {shown(share)}, expected a share above 0 and below 1, such as {TUNE_SHARE}")
    grid = _grid(values.get("tune"), "tune")
    variants = [_variant(name, about, grid) for name, about in _section(values["variants"], "variants").items()]
    names = [variant.name for variant in variants]
    for variant in variants:
        for name in variant.references:
            if name not in names:
                raise ValueError(f"variants.{variant.name}.reference names {name}. {close(name, names)}")
    return Study(
        title=str(values.get("title") or path.stem.removeprefix("study_").replace("_", " ")),
        base=path.parent / str(values["base"]),
        ds_config=path.parent / str(values.get("ds_config", "../ds_configs/cpu_debug.json")),
        seeds=seeds,
        share_teacher=values.get("share_teacher", False),
        teacher_overrides=tuple(flat(values.get("teacher_overrides") or {}, "teacher_overrides")),
        overrides=(*flat(values.get("overrides") or {}, "overrides"), *extra),
        variants=_at_every_point(variants, values.get("axes")),
        tune_seeds=_seeds(values.get("tune_seeds", list(seeds[:1])), "tune_seeds"),
        tune_share=share,
        tune_overrides=tuple(flat(values.get("tune_overrides") or {}, "tune_overrides")),
    )


def cells(study: Study, out: Path, chosen: Mapping[str, Sequence[str]] | None = None) -> list[Cell]:
    """Every cell, all variants of the first seed before those of the next; shared teachers first.

    Args:
        chosen: tuned variant -> overrides of its best choice; tuned variants that are not in it are left out.

    Raises:
        ValueError: a recipe that cannot be resolved; the variant is named.
    """
    chosen = chosen or {}
    teachers: dict[str, Cell] = {}
    planned = []
    for seed in study.seeds:
        for variant in study.variants:
            if variant.grid and variant.name not in chosen:
                continue
            choice = chosen.get(variant.name, ())
            planned.append(_planned(study, variant, choice, seed, variant.name, out, teachers))
    return [*teachers.values(), *planned]


def trials(study: Study, out: Path) -> list[Cell]:
    """The cells that tune: every choice of every tuned variant with every seed of tuning; shared teachers first.

    They are as the variant's own, but trained without a share of the training images, and judged on that share.
    A teacher that is shared has seen those images; one of a trial's own has not.

    Raises:
        ValueError: a recipe that cannot be resolved, or cannot be tuned; the variant is named.
    """
    teachers: dict[str, Cell] = {}
    planned = []
    held_out = f"data.val_share={study.tune_share}"
    for seed in study.tune_seeds:
        for variant in study.variants:
            for choice in variant.grid:
                name = f"{TUNING}/{variant.name}/{_folder_name(choice)}"
                cell = _planned(study, variant, choice, seed, name, out, teachers, [*study.tune_overrides, held_out])
                _check_trial(variant, cell)
                planned.append(replace(cell, tunes=variant.name, choice=choice))
    return [*teachers.values(), *planned]


def only(planned: Sequence[Cell], study: Study, patterns: Sequence[str]) -> list[Cell]:
    """The cells of the variants that a pattern matches, and the teachers they share; all without a pattern.

    Raises:
        ValueError: a pattern that matches no variant.
    """
    if not patterns:
        return list(planned)
    names = [variant.name for variant in study.variants]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"--only {pattern} matches no variant. Variants: {', '.join(names)}")
    kept = [cell for cell in planned if any(fnmatch.fnmatch(cell.tunes or cell.variant, one) for one in patterns)]
    teachers = {cell.teacher for cell in kept}
    return [
        cell for cell in planned if cell in kept or (cell.teacher in teachers and cell.variant.startswith(TEACHERS))
    ]


def _check_trial(variant: Variant, cell: Cell) -> None:
    """Raises ValueError where nothing is trained to choose by, or no images of training can be held out."""
    if not any(step.phase == "train" for step in cell.steps):
        raise ValueError(f"variant {variant.name}: it is tuned by its training, which its phases leave out: add train")
    if cell.recipe.data.path:
        raise ValueError(
            f"variant {variant.name}: tune holds training images of {', '.join(BUILT_IN)} out, not yet those of "
            f"data.path={cell.recipe.data.path}: leave out tune and try the values as variants"
        )


def _planned(
    study: Study,
    variant: Variant,
    choice: Sequence[str],
    seed: int,
    name: str,
    out: Path,
    teachers: dict[str, Cell],
    more: Sequence[str] = (),
) -> Cell:
    """One cell of a variant.

    Args:
        choice: what tuning chose for it, or tries.
        name: of the folder in `out` that holds its seeds.
        teachers: shared teachers so far by the key of their artifact; a new one is added.
        more: overrides that the shared teacher does not get.
    """
    recipe = _recipe(study, variant, *choice, *more, f"seed={seed}")
    teacher = None
    if study.share_teacher and recipe.teacher.grown:
        raise ValueError(f"variant {variant.name}: teacher.grown makes a teacher per seed: leave out share_teacher")
    if study.share_teacher and not recipe.teacher.source:
        first = _recipe(study, variant, *choice, f"seed={study.seeds[0]}", *study.teacher_overrides)
        key = key_of(first, "teacher")
        if key not in teachers:
            teachers[key] = _cell(f"{TEACHERS}/{key}", study.seeds[0], first, ("teacher",), out)
        teacher = teachers[key].teacher
        source = f"teacher.source={json.dumps(str(teacher.resolve()))}"
        recipe = _recipe(study, variant, *choice, *more, f"seed={seed}", source)
    return _cell(name, seed, recipe, variant.phases, out, teacher)


def _folder_name(choice: Sequence[str]) -> str:
    """train.lr=0.01,train.epochs=3; what no folder should be called becomes a digest."""
    name = ",".join(choice)
    if re.fullmatch(r"[\w.=,+-]{1,100}", name):
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:12]


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
        if recipe.train.border_weight:
            before = ("meta", *before)  # borders lie in its bases
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


def _seeds(values: Any, where: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not values or any(type(seed) is not int for seed in values):
        raise ValueError(f"{where} is {shown(values)}, expected a list of whole numbers such as [0, 1, 2]")
    return tuple(values)


def _grid(values: Any, where: str) -> tuple[tuple[str, ...], ...]:
    """The choices of a grid: all combinations of {key: [value, ...], ...}, or a list of overrides as it stands."""
    if isinstance(values, list):
        choices = [tuple(flat(about, f"{where}[{place}]")) for place, about in enumerate(values)]
    else:
        values_of_keys = []
        for text in flat(values, where):
            key, _, value = text.partition("=")
            tried = json.loads(value)
            if not isinstance(tried, list):
                raise ValueError(f"{where}.{key} is {shown(tried)}, expected a list of the values to try")
            values_of_keys.append([f"{key}={json.dumps(one)}" for one in tried])
        choices = list(itertools.product(*values_of_keys)) if values_of_keys else []
    if values and len(choices) < 2:
        raise ValueError(f"{where} has {len(choices)} choices, expected 2 or more: one alone belongs into overrides")
    if len(set(choices)) < len(choices):
        raise ValueError(f"{where} names a choice twice: leave one out")
    for choice in choices:
        if any(text.startswith("seed=") for text in choice):
            raise ValueError(f"{where} sets seed: the seeds of tuning stand in the list tune_seeds")
    return tuple(choices)


def _at_every_point(variants: Sequence[Variant], axes: Any) -> tuple[Variant, ...]:
    """Each variant at each combination of the points of the axes, compared with its references at the same one."""
    points: dict[str, tuple[str, ...]] = {}  # of all axes, with their overrides
    names_of_axes = []
    for axis, about in _section(axes, "axes").items():
        names_of_axes.append([])
        for point, overrides in _section(about, f"axes.{axis}").items():
            name = str(point)
            if name in points:
                raise ValueError(f"axes.{axis}.{name} is there twice: points of all axes need names of their own")
            _check_folder(name, f"axes.{axis}.{name}")
            points[name] = tuple(flat(overrides or {}, f"axes.{axis}.{name}"))
            names_of_axes[-1].append(name)
        if not names_of_axes[-1]:
            raise ValueError(f"axes.{axis} has no points, expected {{name: overrides, ...}}")
    for variant in variants:
        for name in variant.at:
            if name not in points:
                raise ValueError(f"variants.{variant.name}.at names {name}. {close(name, list(points))}")
    everywhere = []
    for names in itertools.product(*names_of_axes):
        for variant in variants:
            everywhere.append(_at(variant, names, points))
    return tuple(everywhere)


def _at(variant: Variant, names: Sequence[str], points: Mapping[str, tuple[str, ...]]) -> Variant:
    """A variant at the points of these names, one of each axis; what it says itself beats what the points say."""
    if not names:
        return variant
    overrides = [text for name in names for text in points[name]]
    overrides += variant.overrides
    for name in names:
        overrides += variant.at.get(name, ())
    return replace(
        variant,
        name=".".join([variant.name, *names]),
        label=", ".join([variant.label, *names]),
        overrides=tuple(overrides),
        references=tuple(".".join([reference, *names]) for reference in variant.references),
        group=", ".join(filter(None, [variant.group, *names])),
    )


def _check_folder(name: str, where: str) -> None:
    reserved = (TEACHERS, TUNING, JOBS)
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name in reserved or name[0] == ".":
        raise ValueError(
            f"{where} names a folder: use letters, digits, - and _, and another name than {' or '.join(reserved)}"
        )


def _variant(name: Any, about: Any, grid: tuple[tuple[str, ...], ...]) -> Variant:
    where = f"variants.{name}"
    name = str(name)
    _check_folder(name, where)
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
    if "tune" in values:
        grid = _grid(values["tune"], f"{where}.tune")
    at = {}
    for point, of_point in _section(values.get("at"), f"{where}.at").items():
        at[str(point)] = tuple(flat(of_point, f"{where}.at.{point}"))
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
        grid=grid,
        at=at,
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
    parts = defining(to_dict(recipe), name)
    if recipe.data.val_share and not recipe.data.path:
        parts["held out"] = recipe.data.val_share  # of images that have a validation split of their own
    text = json.dumps(parts, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{name}-{digest[:12]}"


def other_recipe(cell: Cell) -> str:
    """Why what lies in a cell's folder is not its own: it was made with another recipe; empty when it is its own."""
    path = cell.folder / "recipe.yaml"
    if not path.is_file():
        return ""
    earlier = _recipe_of(path, path.stat().st_mtime_ns)
    for step in cell.steps:
        artifact = cell.folder / step.name
        if artifact.is_dir() and key_of(earlier, step.name) != cell.keys[step.name]:
            why = first_difference(to_dict(earlier), to_dict(cell.recipe))
            return f"{artifact} is of another recipe ({why}): delete it, or use another --out"
    return ""


@functools.cache
def _recipe_of(path: Path, changed_ns: int) -> Recipe:
    """The recipe in a cell's folder, parsed once (20 ms) for every change of the file."""
    return build(Recipe, read_yaml(path.read_text(), str(path)))
