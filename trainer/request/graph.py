"""The table of phases: what each is, what it needs, by what it is repeated, and what of the recipe defines its result.

Order, result folders, refusals, dispatch, the Slurm graph, status and the reference's list all come from here. A phase
is a row of TABLE and a file of trainer/phases/ (docs/howto.md adds one). No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.phases import STARTS, TRAINED_SIZE
from trainer.config.recipe import Recipe

ALL = "all"  # --phase all: every phase that takes part, one after another
ALL_HELP = "all of these one after another, baselines and report included; push only when hub.repo is set"

# The sections of the recipe a result depends on; others may change between a result and its use.
OF_TEACHER = ("seed", "data", "augment", "teacher")
OF_META = (*OF_TEACHER, "modules", "meta")
OF_STUDENT = (*OF_META, "distill", "expert", "student")
OF_TRAINING = (*OF_STUDENT, "refine", "train")
# ... but for these keys of them. Where data and teacher lie defines nothing: what is there does (trainer/made_of.py)
NOT_DEFINING = {
    "data": ("path", "val_share", "workers", "fractals.cache", "textures.cache"),
    "teacher": ("source", "allow_chance"),
    "train": ("start", "baselines"),
    "detect": ("data.path",),
}


def own_teacher(recipe: Recipe) -> tuple[str, ...]:
    """The phase, and the result, that holds the teacher a run makes itself; empty when it is given."""
    if recipe.teacher.source:
        return ()
    return ("assemble",) if recipe.teacher.grown else ("teacher",)


def may_be_probed(recipe: Recipe) -> bool:
    """Whether the teacher's head may be a probe; with head auto only its classes tell whether it is."""
    t = recipe.teacher
    return bool(t.source) and t.classes == "names" and t.head in ("auto", "probe")


def teacher_results(recipe: Recipe) -> tuple[str, ...]:
    """The results that a teacher with a fitting head comes from: its training, or the probe of one that is given."""
    return ("probe",) if may_be_probed(recipe) else own_teacher(recipe)


def taught_by_expert(recipe: Recipe) -> bool:
    """Whether this run teaches the experts of its modules one by one before the modules."""
    return recipe.distill.level == "expert" and not recipe.distill.source


def trained_again(recipe: Recipe, module: int) -> bool:
    """Whether the second round trains this module: the first is fed images either way, but has to be taught once."""
    return module > 0 or not recipe.distill.epochs or in_one_job(recipe, "refine")


def taught_in(recipe: Recipe) -> str:
    """The phase whose result tells what a module has learned: the first round, unless it was left out."""
    return "distill" if recipe.distill.epochs or not recipe.refine.on else "refine"


def last_round(recipe: Recipe) -> str:
    """The phase whose modules are put together."""
    return "refine" if recipe.refine.on else "distill"


def learns_from_teacher(recipe: Recipe, start: str) -> bool:
    """Whether end-to-end training from `start` needs the teacher; a student that is given (train.init) may not."""
    t = recipe.train
    beside_it = t.kd_weight or t.border_weight or t.routing_weight or recipe.teacher.head == "none"
    return start != "distilled" or not t.init or bool(beside_it)


def _teacher_of_meta(recipe: Recipe, _start: str) -> tuple[str, ...]:
    return () if recipe.teacher.grown else teacher_results(recipe)


def _teacher_and_meta(recipe: Recipe, _start: str) -> tuple[str, ...]:
    return (*teacher_results(recipe), "meta")


def _clusters_too(recipe: Recipe, start: str) -> tuple[str, ...]:
    return (*_teacher_and_meta(recipe, start), "cluster")


def _experts_if_taught(recipe: Recipe, start: str) -> tuple[str, ...]:
    return (*_teacher_and_meta(recipe, start), *(("cluster", "expert") if taught_by_expert(recipe) else ()))


def _first_round_too(recipe: Recipe, start: str) -> tuple[str, ...]:
    return (*_teacher_and_meta(recipe, start), "distill")


def _of_training(recipe: Recipe, start: str) -> tuple[str, ...]:
    if start == "scratch_equal_cost":  # it is given what all of them cost
        return (*teacher_results(recipe), *(row.name for row in taking_part(recipe) if row.prepares))
    if start == "distilled" and not recipe.train.init:
        return (*teacher_results(recipe), "meta", last_round(recipe))
    needed = teacher_results(recipe) if learns_from_teacher(recipe, start) else ()
    return (*needed, "meta") if recipe.train.border_weight else needed  # borders lie in the bases of the meta model


def _pushed(recipe: Recipe, _start: str) -> tuple[str, ...]:
    return ("detect",) if recipe.hub.stages == "detector" else ("train", "evaluate")


def _refuse_teacher(recipe: Recipe) -> str:
    if recipe.teacher.grown:
        return _refuse_growing(recipe, "teacher")
    if recipe.teacher.source:
        return (
            f"teacher.source is {recipe.teacher.source!r}, so there is no teacher to train: go on with --phase meta, "
            "or set teacher.source='' to train one"
        )
    return ""


def _refuse_probe(recipe: Recipe) -> str:
    t = recipe.teacher
    if may_be_probed(recipe):
        return ""
    if not t.source:
        return "--phase probe has no meaning without teacher.source: a teacher of this run is trained with its head"
    if t.classes != "names":
        return (
            f"--phase probe has no meaning with teacher.classes={t.classes}, which takes the checkpoint's own head: go "
            "on with --phase meta, or set teacher.classes=names"
        )
    return (
        f"--phase probe has no meaning with teacher.head={t.head}: set teacher.head=probe, or go on with --phase meta"
    )


def _refuse_growing(recipe: Recipe, phase: str) -> str:
    if recipe.teacher.grown == (phase != "teacher"):
        return ""
    return (
        f"--phase {phase} has no meaning with teacher.grown={str(recipe.teacher.grown).lower()}: phases "
        "incubate and assemble grow a teacher where it is true, phase teacher trains one where it is false"
    )


def _refuse_by_expert(recipe: Recipe, phase: str) -> str:
    if taught_by_expert(recipe):
        return ""
    if recipe.distill.source:
        return f"--phase {phase} has no meaning with distill.source={recipe.distill.source}: its modules come whole"
    return (
        f"--phase {phase} needs distill.level=expert; here it is {recipe.distill.level}, which teaches modules whole: "
        "set it, or use --phase distill"
    )


def _refuse_detector(recipe: Recipe) -> str:
    if not recipe.detect.epochs:
        return "detect.epochs is 0, so there is no detector to train: set it (docs/detection.md)"
    if not recipe.detect.backbone and recipe.student.kind == "nac":
        return "student.kind is nac, which has no feature maps: set detect.backbone to a V-MoE or another ViT"
    return ""


def _refuse_second_round(recipe: Recipe) -> str:
    if recipe.refine.on:
        return ""
    return "refine.epochs is 0, so there is no second round: set it, or refine.order=fit, or go on with --phase train"


@dataclass(frozen=True)
class Phase:
    """One row of the table.

    Attributes:
        name: as in --phase; its results are folders of that name, with _<module>, _<module>_<expert> or _<start>.
        help: one line.
        repeated: each module, or each expert of each module, is a job and a result of its own.
        defined_by: sections of the recipe its result depends on.
        defined_by_start: the same where end-to-end training starts otherwise than from distilled modules.
        needs: (recipe, start of end-to-end training) -> phases whose results it reads.
        section: of the recipe, whose batch its job runs under; empty = none is checked.
        trains: (recipe) -> whether it trains by that section's schedule.
        routed: whether what it trains has MoE blocks, which expert parallelism spreads.
        prepares: its cost comes before end-to-end training.
        refused: (recipe) -> why it has no meaning there; empty = it takes part.
        on_wish: (recipe) -> whether --phase all runs it.
        jobs: (recipe) -> whether its modules are independent jobs (an array), follow one another, or are one job.
        own_images: it reads images of its own section, and neither those of section data nor a teacher.
        code: the module with its functions run, objective and rehearse; empty = trainer.phases.<name>.
    """

    name: str
    help: str
    repeated: Literal["", "module", "expert"] = ""
    defined_by: tuple[str, ...] = ()
    defined_by_start: dict[str, tuple[str, ...]] | None = None
    needs: Callable[[Recipe, str], tuple[str, ...]] = lambda recipe, start: ()
    section: str = ""
    trains: Callable[[Recipe], bool] = lambda recipe: True
    routed: bool = False
    prepares: bool = False
    refused: Callable[[Recipe], str] = lambda recipe: ""
    on_wish: Callable[[Recipe], bool] = lambda recipe: True
    jobs: Callable[[Recipe], Literal["array", "sequence", "together"]] = lambda recipe: "array"
    own_images: bool = False
    code: str = ""

    @property
    def by_start(self) -> bool:
        """Whether it is done again for every start of end-to-end training."""
        return self.defined_by_start is not None


_OF_OTHER_STARTS = {
    "scratch": (*OF_TEACHER, "student", "train"),
    "scratch_equal_cost": OF_TRAINING,
    "upcycled": (*OF_TEACHER, "modules", "student", "train"),
}
TABLE = [
    Phase(
        "teacher",
        "train a small ViT as the teacher; only for recipes without teacher.source and teacher.grown",
        defined_by=OF_TEACHER,
        section="teacher",
        refused=_refuse_teacher,
    ),
    Phase(
        "probe",
        "give a teacher.source without a fitting head a linear classifier of the data's classes (teacher.head)",
        defined_by=OF_TEACHER,
        section="teacher",
        trains=lambda recipe: recipe.teacher.finetune_epochs > 0,
        refused=_refuse_probe,
    ),
    Phase(
        "meta",
        "train the meta model, N shallow stages of the teacher's width",
        defined_by=OF_META,
        needs=_teacher_of_meta,
        section="meta",
        prepares=True,
    ),
    Phase(
        "incubate",
        "experimental: grow teacher module --module i (or all) inside the frozen meta model; only with teacher.grown",
        repeated="module",
        defined_by=(*OF_META, "incubate"),
        needs=lambda recipe, start: ("meta",),
        section="incubate",
        refused=lambda recipe: _refuse_growing(recipe, "incubate"),
    ),
    Phase(
        "assemble",
        "experimental: put the incubated modules together and fine-tune the teacher; only with teacher.grown",
        defined_by=(*OF_META, "incubate", "assemble"),
        needs=lambda recipe, start: ("meta", "incubate"),
        section="assemble",
        refused=lambda recipe: _refuse_growing(recipe, "assemble"),
    ),
    Phase(
        "cluster",
        "experimental: assign the images of module --module i (or all) to its experts; only with distill.level=expert",
        repeated="module",
        defined_by=(*OF_META, "expert", "student"),
        needs=_teacher_and_meta,
        section="expert",
        trains=lambda recipe: False,
        prepares=True,
        refused=lambda recipe: _refuse_by_expert(recipe, "cluster"),
    ),
    Phase(
        "expert",
        "experimental: teach expert --expert j of module --module i (or all) alone; only with distill.level=expert",
        repeated="expert",
        defined_by=OF_STUDENT,
        needs=_clusters_too,
        section="expert",
        prepares=True,
        refused=lambda recipe: _refuse_by_expert(recipe, "expert"),
    ),
    Phase(
        "distill",
        "teach student module --module i (or all of them) inside the frozen meta model",
        repeated="module",
        defined_by=OF_STUDENT,
        needs=_experts_if_taught,
        section="distill",
        routed=True,
        prepares=True,
    ),
    Phase(
        "refine",
        "second round: teach (or fit) module --module i (or all) on what the modules before it really send",
        repeated="module",
        defined_by=(*OF_STUDENT, "refine"),
        needs=_first_round_too,
        section="refine",
        trains=lambda recipe: recipe.refine.order != "fit",
        routed=True,
        prepares=True,
        refused=_refuse_second_round,
        jobs=lambda recipe: {
            "parallel": "array",
            "sequential": "sequence",
            "together": "together",
            "fit": "together",
        }[recipe.refine.order],
    ),
    Phase(
        "train",
        "put the modules together and train the student end to end; train.start=scratch leaves out the teaching",
        defined_by=OF_TRAINING,
        defined_by_start=_OF_OTHER_STARTS,
        needs=_of_training,
        section="train",
        routed=True,
    ),
    Phase(
        "evaluate",
        "load the trained student as a user would and measure it on every validation image",
        defined_by=OF_TRAINING,
        defined_by_start=_OF_OTHER_STARTS,
        needs=lambda recipe, start: ("train",),
        trains=lambda recipe: False,
    ),
    Phase(
        "detect",
        "train a detector on the student, or on detect.backbone, and measure its AP; only with detect.epochs",
        defined_by=(*OF_TRAINING, "detect"),
        defined_by_start={start: (*sections, "detect") for start, sections in _OF_OTHER_STARTS.items()},
        needs=lambda recipe, start: () if recipe.detect.backbone else ("train",),
        section="detect",
        routed=True,
        refused=_refuse_detector,
        own_images=True,
    ),
    Phase(
        "push",
        "push the student (or every stage, or the detector: hub.stages) to hub.repo with a model card",
        defined_by=OF_TRAINING,
        needs=_pushed,
        trains=lambda recipe: False,
        on_wish=lambda recipe: bool(recipe.hub.repo),
    ),
]


def phase_help() -> dict[str, str]:
    """Every word --phase takes, with its line of help, in order."""
    return {row.name: row.help for row in TABLE} | {ALL: ALL_HELP}


def row_of(phase: str) -> Phase:
    """The row of a phase; KeyError where there is none."""
    return {row.name: row for row in TABLE}[phase]


def taking_part(recipe: Recipe) -> list[Phase]:
    """The phases that --phase all runs, in order."""
    return [row for row in TABLE if row.on_wish(recipe) and not row.refused(recipe)]


def section_of_batch(recipe: Recipe, phase: str) -> str:
    """The section of the recipe whose batch must fit the ranks of a phase's job; empty = any number of them will do."""
    row = row_of(phase)
    if phase in ("probe", "refine") and not row.trains(recipe):  # it only computes features, or a fit
        return ""
    return row.section


def by_module() -> list[str]:
    """The phases that take a module: each is a job and a result of its own."""
    return [row.name for row in TABLE if row.repeated]


def in_one_job(recipe: Recipe, phase: str) -> bool:
    """Whether a phase that goes by module makes those of all modules in one training, and takes no module."""
    return row_of(phase).jobs(recipe) == "together"


def experts_in(recipe: Recipe, section: str) -> int:
    """Experts of an MoE layer in what is trained by a section of the recipe; 0 = it has none."""
    if section == "detect" and recipe.detect.backbone:
        return 0  # it is not known before it is loaded: each rank keeps all of them
    routed = any(row.routed for row in TABLE if row.section == section)
    return recipe.student.num_experts if routed else 0


def stage_names() -> list[str]:
    """What nodes and time limits can be set for on a cluster: the phases, end-to-end training by its start."""
    names = []
    for row in TABLE:
        names.append(row.name)
        if row.name == "train":
            names += [artifact_name(row.name, start=start) for start in STARTS[1:]]
    return names


def artifact_name(phase: str, module: int | None = None, start: str = "distilled", expert: int | None = None) -> str:
    """Folder name of a phase's result: distill_2, expert_2_0, train, train_scratch."""
    by_start = [row.name for row in TABLE if row.by_start]
    if phase in by_start and start != "distilled":
        return f"{phase}_{start}"
    return "_".join(str(part) for part in (phase, module, expert) if part is not None)


def artifacts_of(recipe: Recipe, phase: str, start: str = "distilled", modules: Sequence[int] = ()) -> list[str]:
    """The results a phase makes.

    Args:
        modules: of a phase that goes by module; () = all.
    """
    repeated = row_of(phase).repeated
    modules = modules or range(recipe.modules)
    if repeated == "expert":
        experts = range(recipe.student.moe.num_experts)
        return [artifact_name(phase, module, expert=expert) for module in modules for expert in experts]
    if repeated == "module":
        return [artifact_name(phase, module) for module in modules]
    return [artifact_name(phase, start=start)]


def preparation(recipe: Recipe) -> list[str]:
    """Every result that is made on the way from the teacher to the student's end-to-end training."""
    names = ["meta"]
    if taught_by_expert(recipe):
        for module in range(recipe.modules):
            names += artifacts_of(recipe, "cluster", modules=[module])
            names += artifacts_of(recipe, "expert", modules=[module])
    names += artifacts_of(recipe, "distill")
    if recipe.refine.on:
        names += artifacts_of(recipe, "refine")
    return names


def phase_of(name: str) -> str:
    """The phase that makes a result: distill of distill_2."""
    return name.partition("_")[0]


def command_of(name: str) -> str:
    """The flags that make a result."""
    phase, _, rest = name.partition("_")
    if phase not in phase_help():  # made by whichever phase needs it first
        return "the phase"
    if not rest:
        return f"--phase {phase}"
    if row_of(phase).repeated == "expert":
        return "--phase {} --module {} --expert {}".format(phase, *rest.split("_"))
    if row_of(phase).repeated:
        return f"--phase {phase} --module {rest}"
    return f"--phase {phase} train.start={rest}"


def defining(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of a recipe (as plain values) that decides what the result `name` holds."""
    phase, _, rest = name.partition("_")
    row = row_of(phase)
    sections = row.defined_by
    if row.by_start and rest:
        sections = row.defined_by_start[rest]
    before_the_teacher = phase in ("meta", "incubate")
    if recipe["teacher"]["grown"] and not before_the_teacher:
        sections = dict.fromkeys((*sections, *row_of("assemble").defined_by))
    kept = {}
    for section in sections:
        if section == "expert" and recipe["distill"]["level"] == "module":
            continue  # has no effect there
        value = recipe.get(section)
        if isinstance(value, dict):
            without = NOT_DEFINING.get(section, ())
            if phase == section == "teacher":
                without = (*without, "depths")  # it is cut into modules later
            value = defining_images(value) if section == "data" else _without(value, without)
            if section == "teacher":
                value["given"] = bool(recipe["teacher"]["source"])
                if not value["given"]:
                    value["image_size"] = value["image_size"] or TRAINED_SIZE
        kept[section] = value
    return kept


def defining_images(data: dict[str, Any]) -> dict[str, Any]:
    """Section data as far as it defines a result: of the ways to read data.path, none does."""
    kind = data["source"]
    if kind in ("folder", "hub") or (kind == "auto" and data["path"]):
        kind = "the images of data.path"
    elif kind == "auto":
        kind = "digits"
    return _without(data, NOT_DEFINING["data"]) | {"source": kind}


def _without(section: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A section without these keys; dotted ones lie in a section inside it."""
    kept = {key: value for key, value in section.items() if key not in keys}
    for dotted in keys:
        inner, dot, key = dotted.partition(".")
        if dot and isinstance(kept.get(inner), dict):
            kept[inner] = _without(kept[inner], (key,))
    return kept
