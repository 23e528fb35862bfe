"""The recipe: all sections together, and the mistakes that only two of them can make."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from trainer.config.data import AugmentConfig, DataConfig
from trainer.config.detect import DetectConfig
from trainer.config.evaluate import EvaluateConfig
from trainer.config.knobs import SEEDS, Range, check_ranges, knob, require, section
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

# what labels and logits alone are for: without classes they have no effect
OF_CLASSES = (
    "augment.label_smoothing",
    "teacher.classes",
    "teacher.allow_chance",
    "meta.label_weight",
    "distill.alpha",
    "distill.alpha_end",
    "distill.tau",
    "distill.tau_end",
    "distill.target",
    "distill.kl_reduction",
    "distill.logit_weight",
    "train.kd_weight",
    "train.kd_tau",
)


@dataclass(frozen=True)
class Recipe:
    """One experiment. `modules` is the number N of teacher-student module pairs."""

    seed: int = knob(0, "of every random draw", Range(0, SEEDS))
    modules: int = knob(4, "number of module pairs N", Range(1, 1000))
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
    evaluate: EvaluateConfig = section(EvaluateConfig)
    detect: DetectConfig = section(DetectConfig)
    run: RunConfig = section(RunConfig)
    hub: HubConfig = section(HubConfig)

    def __post_init__(self):
        check_ranges(self, "")
        taught = self.distill.epochs or self.refine.epochs or self.distill.source
        require(taught, "distill.epochs", 0, "1 or more, or refine.epochs above 0: nothing would be taught")
        self._check_borders()
        self._check_fit()
        self._check_detector()
        if self.teacher.grown:
            self._check_grown()
        if self.teacher.head == "none":
            self._check_features()
        if self.student.kind == "nac":
            self._check_nac()
        starts = (self.train.start, *self.train.baselines)
        if "upcycled" in starts and not self.student.init:
            raise ValueError(
                "train.start or train.baselines say upcycled, but student.init is empty: set student.init=teacher, or "
                "name a dense ViT (hub id or folder)"
            )
        for name, depths in (("teacher", self.teacher.depths), ("student", self.student.depths)):
            if depths and len(depths) != self.modules:
                raise ValueError(
                    f"{name}.depths has {len(depths)} entries {depths} but modules is {self.modules}: give one depth "
                    "per module"
                )

    def needs_labels(self) -> str:
        """The first setting that nothing but labelled images can serve, as "key=value"; empty = images suffice."""
        if not self.teacher.source:
            return "teacher.source='' (a teacher is trained on labels)"
        if self.teacher.head in ("own", "probe"):
            return f"teacher.head={self.teacher.head}"
        if self.meta.objective == "labels" and not self.meta.source:
            return "meta.objective=labels"
        return ""

    def without_effect(self) -> list[str]:
        """Keys that were set although nothing reads them where teacher and student have no classes."""
        found = []
        for key in OF_CLASSES:
            section_name, name = key.split(".")
            values = getattr(self, section_name)
            default = next(field.default for field in fields(values) if field.name == name)
            if getattr(values, name) != default:
                found.append(key)
        return found

    def _check_features(self) -> None:
        """Without a head there are neither labels nor logits to learn from, only the teacher's states."""
        expected = "false with teacher.head=none: a teacher is grown on labels"
        require(not self.teacher.grown, "teacher.grown", True, expected)
        expected = "theseus or matching with teacher.head=none, where the meta model learns the teacher's states"
        require(self.meta.objective != "labels", "meta.objective", "labels", expected)
        expected = "a positive weight with teacher.head=none, where it is that of the teacher's final tokens"
        require(self.meta.kl_weight > 0, "meta.kl_weight", self.meta.kl_weight, expected)
        expected = "a positive weight with teacher.head=none, where the border is all a module learns from"
        require(self.distill.border_weight > 0, "distill.border_weight", self.distill.border_weight, expected)

    def _check_borders(self) -> None:
        """A student of distilled modules has its states in the teacher's basis only where tied stitches put them."""
        from_modules = self.train.start == "distilled" and not self.train.init
        stitches = self.distill.stitches
        if self.train.border_weight and from_modules and stitches != "tied":
            raise ValueError(
                f"train.border_weight compares states in the basis of tied stitches; distill.stitches is {stitches!r}: "
                "set distill.stitches=tied, or train.border_weight=0"
            )

    def _check_fit(self) -> None:
        """What a second round by least squares leaves no place for, and what it needs."""
        if self.refine.order != "fit":
            require(
                self.refine.fit_images is None, "refine.fit_images", self.refine.fit_images, "null but for order fit"
            )
            return
        kind = "with refine.order=fit"
        expected = "parallel, sequential or together with student.kind=nac"
        require(self.student.kind != "nac", "refine.order", "fit", expected)
        require(self.refine.epochs == 0, "refine.epochs", self.refine.epochs, f"0 {kind}: nothing is trained there")
        stitches = self.distill.stitches
        require(stitches == "tied", "distill.stitches", stitches, f"tied {kind}: states are compared in their basis")

    def _check_detector(self) -> None:
        """There has to be one where it is what is pushed."""
        if self.hub.stages == "detector" and not self.detect.epochs:
            raise ValueError(
                "hub.stages is 'detector', but detect.epochs is 0, so there is none: set detect.epochs "
                "(docs/detection.md), or hub.stages=last to push the student"
            )

    def _check_nac(self) -> None:
        """What only a V-MoE has, and what the read-in student of one token cannot do."""
        kind = "with student.kind=nac"
        modules = f"3 or more {kind}: read-in, mediators, read-out"
        require(self.modules >= 3, "modules", self.modules, modules)
        require(self.teacher.head != "none", "teacher.head", "none", f"auto, own or probe {kind}: it tells classes")
        expected = {
            "distill.stitches": "linear",
            "distill.level": "module",
            "distill.routing_weight": 0.0,
            "train.stitches": "drop",
            "train.routing_weight": 0.0,
            "train.border_weight": 0.0,
            "train.layer_decay": 1.0,
        }
        one_token = {}
        if self.student.nac.read_in == "one":
            one_token = {"distill.border": "none", "refine.epochs": 0}
        for key, value in (expected | one_token).items():
            section_name, name = key.split(".")
            actual = getattr(getattr(self, section_name), name)
            reason = f"{kind} and student.nac.read_in=one, set tokens there" if key in one_token else kind
            require(actual == value, key, actual, f"{value!r} {reason}")

    def _check_grown(self) -> None:
        """A grown teacher comes after the meta model, which so has nothing to copy, to match or to reuse."""
        expected = {"teacher.source": "", "meta.source": "", "meta.init": "scratch", "meta.objective": "labels"}
        for key, value in expected.items():
            section_name, name = key.split(".")
            actual = getattr(getattr(self, section_name), name)
            require(actual == value, key, actual, f"{value!r} with teacher.grown=true")
