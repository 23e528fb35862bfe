"""The recipe: all sections together, and what only two of them can get wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.config.data import AugmentConfig, DataConfig
from trainer.config.knobs import knob, require, section
from trainer.config.phases import (
    AssembleConfig,
    DistillConfig,
    ExpertConfig,
    IncubateConfig,
    MetaConfig,
    RefineConfig,
    TeacherConfig,
    TrainConfig,
)
from trainer.config.runtime import HubConfig, RunConfig
from trainer.config.student import StudentConfig


@dataclass(frozen=True)
class Recipe:
    """One experiment. `modules` is the number N of teacher-student module pairs."""

    seed: int = knob(0, "of every random draw")
    modules: int = knob(4, "number of module pairs N")
    data: DataConfig = section(DataConfig)
    augment: AugmentConfig = section(AugmentConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    meta: MetaConfig = section(MetaConfig)
    incubate: IncubateConfig = section(IncubateConfig)
    assemble: AssembleConfig = section(AssembleConfig)
    distill: DistillConfig = section(DistillConfig)
    expert: ExpertConfig = section(ExpertConfig)
    refine: RefineConfig = section(RefineConfig)
    student: StudentConfig = field(default_factory=lambda: StudentConfig(variant="m2mkd-B/16"))
    train: TrainConfig = section(TrainConfig)
    run: RunConfig = section(RunConfig)
    hub: HubConfig = section(HubConfig)

    def __post_init__(self):
        require(self.modules >= 1, "modules", self.modules, "1 or more")
        require(self.distill.epochs or self.refine.epochs or self.distill.source, "distill.epochs", 0,
                "1 or more, or refine.epochs above 0: nothing would be taught")  # fmt: skip
        train, stitches = self.train, self.distill.stitches
        if train.border_weight and train.start == "distilled" and not train.init and stitches != "tied":
            raise ValueError(
                f"train.border_weight compares states in the basis of tied stitches; distill.stitches is {stitches!r}: "
                "set distill.stitches=tied, or train.border_weight=0"
            )
        if self.teacher.grown:  # nothing to copy, to match or to reuse: the teacher comes after the meta model
            wanted = {"teacher.source": "", "meta.source": "", "meta.init": "scratch", "meta.objective": "labels"}
            for key, value in wanted.items():
                part, name = key.split(".")
                found = getattr(getattr(self, part), name)
                require(found == value, key, found, f"{value!r} with teacher.grown=true")
        if "upcycled" in (self.train.start, *self.train.baselines) and not self.student.init:
            raise ValueError("train.start or train.baselines say upcycled, but student.init is empty: set "
                             "student.init=teacher, or name a dense ViT (hub id or folder)")  # fmt: skip
        for owner, name in ((self.teacher, "teacher"), (self.student, "student")):
            if owner.depths and len(owner.depths) != self.modules:
                raise ValueError(f"{name}.depths has {len(owner.depths)} entries {owner.depths} but modules is "
                                 f"{self.modules}: give one depth per module")  # fmt: skip
