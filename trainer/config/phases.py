"""Sections of the phases that train: teacher, meta, distill, refine, train, and the experimental incubate to expert.

Each is a dataclass: the optimiser and schedule that all of them have, then what is its own; every knob with its type,
default and one line of help. Values are checked here, before torch is imported and before any GPU is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.knobs import MANY, SHARE, WEIGHT, Range, check_heads, check_ranges, knob, require

EPOCHS = Range(1, MANY)
OFF_OR_EPOCHS = Range(0, MANY)  # of the two rounds of teaching: 0 epochs turn one of them off
TEMPERATURE = Range(0.001, 1000.0)
SIZE = Range(1, 100_000)  # of a model: widths, pixels
PIXELS = Range(1, 4096)  # a side of the images a teacher sees: the largest ViT of the hub takes 1,024
TRAINED_SIZE = 32  # pixels, of a teacher that is trained here
DEPTH = Range(1, 1000)  # blocks; models of more take minutes to be laid out


@dataclass(frozen=True)
class ScheduleConfig:
    """Optimiser and schedule of one phase. The learning rate used is lr x global batch / 512."""

    epochs: int = knob(100, "passes over the training images", EPOCHS)
    lr: float = knob(
        5e-4, "learning rate at a global batch of 512; scaled linearly with the batch", Range(0, 1000, open_least=True)
    )
    min_lr: float = knob(1e-5, "learning rate at the end of the cosine (not scaled)", Range(0, 1000))
    warmup_epochs: float = knob(0.0, "linear warm-up from warmup_lr, in epochs", Range(0, MANY))
    warmup_lr: float = knob(1e-6, "learning rate of the first step (not scaled)", Range(0, 1000))
    optimizer: Literal["adamw", "sgd"] = knob("adamw", "AdamW, or plain SGD with momentum")
    weight_decay: float = knob(
        0.05, "on matrices only: none on 1-D parameters, tokens and position embeddings", Range(0, 1000)
    )
    momentum: float = knob(0.9, "of SGD", Range(0, 1, open_most=True))
    betas: tuple[float, float] = knob((0.9, 0.999), "of AdamW", Range(0, 1, open_most=True))
    eps: float = knob(1e-8, "of AdamW", Range(1e-30, 1))
    drop_path: float = knob(
        0.0, "stochastic depth of the trained blocks, rising linearly to this rate", Range(0, 1, open_most=True)
    )
    global_batch: int | None = knob(
        None, 'images per optimiser step where the DeepSpeed JSON says "auto"', Range(1, 100_000_000)
    )
    clip: float | None = knob(None, 'gradient norm limit where the DeepSpeed JSON says "auto"; 0 = off', WEIGHT)

    def __post_init__(self):
        name = type(self).__name__.removesuffix("Config").lower()
        check_ranges(self, f"{name}.")
        longest = self.epochs or self.warmup_epochs  # a phase that is off may have any
        require(self.warmup_epochs <= longest, f"{name}.warmup_epochs", self.warmup_epochs, "0 to epochs")


@dataclass(frozen=True)
class TaughtConfig(ScheduleConfig):
    """The same of modules that are taught, whose teacher need not run in every epoch."""

    stored_epochs: int = knob(
        0,
        "the first so many epochs keep on disk what the teacher told; later ones show their pictures again (the same "
        "crops, order and mixup) and do not run it; 0 = it runs in every epoch, on new crops",
        OFF_OR_EPOCHS,
    )

    @property
    def kept_epochs(self) -> int:
        """Epochs whose lessons are kept; 0 where none comes after them."""
        return self.stored_epochs if self.stored_epochs < self.epochs else 0

    @property
    def told_share(self) -> float:
        """Share of the epochs in which the teacher runs."""
        return self.kept_epochs / self.epochs if self.kept_epochs else 1.0


@dataclass(frozen=True)
class TeacherConfig(ScheduleConfig):
    """The monolithic teacher: of the hub or a folder, a small ViT of phase `teacher`, or (experimental) a grown one."""

    source: str = knob("", "hub id[@revision] or directory; empty = train one with phase teacher")
    head: Literal["auto", "own", "probe", "none"] = knob(
        "auto",
        "who tells the classes: own = the checkpoint's head; probe = a linear classifier fitted on its features (phase "
        "probe); none = nobody: modules are taught by border targets alone, the student gives features; auto = own "
        "where it fits the data, else probe, or none on images without labels",
    )
    classes: Literal["names", "subset", "numbers"] = knob(
        "names",
        "how its classes are found in the data: by their names, in whatever order; the same where it may have more of "
        "them; or by number, the same classes in the same order whatever they are called",
    )
    finetune_epochs: int = knob(
        0,
        "after its probe, epochs of training the whole teacher with the new head by this section's schedule; 0 = none",
        OFF_OR_EPOCHS,
    )
    allow_chance: bool = knob(
        False, "go on with a teacher.source that is far below chance on the validation images, instead of stopping"
    )
    grown: bool = knob(
        False,
        "experimental, in no study yet: grow it inside the meta model, phases meta, incubate and assemble in place of "
        "phase teacher",
    )
    depths: tuple[int, ...] = knob(
        (), "blocks per module; empty = as equal as possible over `modules`", Range(1, 100_000)
    )
    image_size: int | None = knob(
        None,
        f"side of the images, pixels; null = the checkpoint's own, or {TRAINED_SIZE} for a teacher that phase teacher "
        "trains. Position embeddings are resampled",
        PIXELS,
    )
    patch_size: int = knob(8, "of a trained teacher, pixels", SIZE)
    width: int = knob(64, "of a trained teacher", SIZE)
    depth: int = knob(8, "of a trained teacher, blocks", DEPTH)
    heads: int = knob(4, "of a trained teacher", SIZE)
    mlp_dim: int = knob(256, "of a trained teacher", SIZE)

    def __post_init__(self):
        super().__post_init__()
        if not self.source:
            check_heads("teacher", self.width, self.heads)
            expected = f"a divisor of teacher.image_size={self.trained_size}"
            require(self.trained_size % self.patch_size == 0, "teacher.patch_size", self.patch_size, expected)
        self._check_head()

    @property
    def trained_size(self) -> int:
        """image_size of a teacher that is trained here, pixels."""
        return self.image_size or TRAINED_SIZE

    def _check_head(self) -> None:
        """Only a teacher that is given can be probed; classes say how its own head is read."""
        if not self.source:
            expected = "auto, own or none without teacher.source: the teacher of this run is trained with its head"
            require(self.head != "probe", "teacher.head", self.head, expected)
        if self.classes != "names":
            expected = f"auto or own with teacher.classes={self.classes}, which says how its own head is read"
            require(self.head in ("auto", "own"), "teacher.head", self.head, expected)
        if self.finetune_epochs:
            expected = "0 without a probe: it needs teacher.source and teacher.head=auto or probe"
            may_be_probed = bool(self.source) and self.head in ("auto", "probe") and self.classes == "names"
            require(may_be_probed, "teacher.finetune_epochs", self.finetune_epochs, expected)
            expected = f"0 to teacher.finetune_epochs={self.finetune_epochs}, as that is what is trained"
            require(self.warmup_epochs <= self.finetune_epochs, "teacher.warmup_epochs", self.warmup_epochs, expected)


@dataclass(frozen=True)
class MetaConfig(ScheduleConfig):
    """The meta model: N shallow stages of the teacher's width."""

    source: str = knob("", "reuse a trained one: run folder, or hub id[@revision] of a pushed run; empty = train it")
    init: Literal["scratch", "teacher"] = knob("teacher", "start of the stages: new, or the teacher's own layers")
    objective: Literal["labels", "matching", "theseus"] = knob(
        "theseus", "labels only; the teacher's border states and logits; or random swapping with teacher modules"
    )
    blocks_per_module: int = knob(
        1,
        "transformer blocks per stage; 0 = the teacher is its own meta model, and nothing is trained",
        Range(0, 1000),
    )
    label_weight: float = knob(0.5, "weight of the label loss in objectives matching and theseus", WEIGHT)
    kl_weight: float = knob(
        1.0, "weight of the teacher's logits there (KL); without classes, of its final tokens", WEIGHT
    )
    free_weight: float = knob(1.0, "matching: weight of the border errors of the free-running meta model", WEIGHT)
    forced_weight: float = knob(1.0, "matching: the same where each stage is fed the teacher's border state", WEIGHT)
    replace_rate: float = knob(
        0.5,
        "theseus: share of stages that stand in for the teacher's modules at the start; rises to 1",
        Range(0, 1, open_least=True),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.blocks_per_module == 0:
            expected = "teacher with meta.blocks_per_module=0, where the teacher is its own meta model"
            require(self.init == "teacher", "meta.init", self.init, expected)
        if self.objective != "labels" and not self.label_weight:
            expected = "a positive weight here or in meta.label_weight: else the last stage learns nothing"
            require(self.kl_weight > 0, "meta.kl_weight", self.kl_weight, expected)


@dataclass(frozen=True)
class IncubateConfig(ScheduleConfig):
    """Experimental, growing a teacher (teacher.grown): each module learns labels in its place in the meta model."""

    epochs: int = knob(100, "passes over the training images", EPOCHS)
    warmup_epochs: float = knob(20.0, "linear warm-up from warmup_lr, in epochs", Range(0, MANY))
    drop_path: float = knob(
        0.1, "stochastic depth of the teacher's blocks, rising linearly to this rate", Range(0, 1, open_most=True)
    )


@dataclass(frozen=True)
class AssembleConfig(ScheduleConfig):
    """Experimental, growing a teacher (teacher.grown): the incubated modules together, fine-tuned on labels."""

    epochs: int = knob(100, "passes over the training images", EPOCHS)
    drop_path: float = knob(
        0.1, "stochastic depth of the teacher's blocks, rising linearly to this rate", Range(0, 1, open_most=True)
    )
    clip: float | None = knob(1.0, 'gradient norm limit where the DeepSpeed JSON says "auto"; 0 = off', WEIGHT)


@dataclass(frozen=True)
class DistillConfig(TaughtConfig):
    """One teacher-student module pair inside the frozen meta model."""

    epochs: int = knob(
        100, "passes over the training images; 0 = modules go untaught into the second round", OFF_OR_EPOCHS
    )
    source: str = knob("", "reuse distilled modules: run folder, or hub id[@revision] of a pushed run; empty = train")
    alpha: float = knob(0.5, "weight of the distillation term; the label loss gets 1 - alpha", SHARE)
    tau: float = knob(1.0, "temperature of the distillation term", TEMPERATURE)
    target: Literal["soft", "hard"] = knob("soft", "KL to the teacher's distribution, or CE with its arg-max")
    kl_reduction: Literal["batchmean", "reference"] = knob(
        "batchmean", "KL averaged per sample; reference = divided by batch x classes, as the published code"
    )
    alpha_end: float | None = knob(None, "alpha at the last step, changed linearly; null = constant", SHARE)
    tau_end: float | None = knob(None, "tau at the last step, changed linearly; null = constant", TEMPERATURE)
    logit_weight: float = knob(1.0, "weight of label and distillation terms together; 0 = border target alone", WEIGHT)
    border: Literal["none", "mse", "cosine"] = knob(
        "none", "target at the module's own border, beside the logits: the teacher module's output there"
    )
    border_weight: float = knob(1.0, "weight of the border target (relative MSE, or 1 - cosine)", WEIGHT)
    stitches: Literal["linear", "pca", "tied"] = knob(
        "linear",
        "LayerNorm + Linear (published); Linear started from the border's principal components; or those, fixed",
    )
    input_noise: float = knob(
        0.0, "Gaussian noise on a module's input, relative to the input's standard deviation", Range(0, 1000)
    )
    level: Literal["module", "expert"] = knob(
        "module",
        "teach modules whole; or (experimental: more epochs gain more for less in docs/studies.md) their experts one "
        "by one first (section expert), then tune the module",
    )
    routing_weight: float = knob(
        0.0,
        "experimental, no gain by itself in docs/studies.md: weight of teacher-guided routing, the KL from a teacher "
        "router to each MoE router",
        WEIGHT,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.border == "none":
            expected = "a positive weight, or distill.border to learn from"
            require(self.logit_weight > 0, "distill.logit_weight", self.logit_weight, expected)


@dataclass(frozen=True)
class RefineConfig(TaughtConfig):
    """Second round on what the modules before really send; targets as in section distill (not in the paper)."""

    epochs: int = knob(0, "passes over the training images; 0 = no second round, but for order fit", OFF_OR_EPOCHS)
    order: Literal["parallel", "sequential", "together", "fit"] = knob(
        "parallel",
        "predecessors of the first round, so modules are independent; refined ones, one after another; all at once; or "
        "nothing is trained, and what the modules of the first round write is fitted by least squares to what they get",
    )
    fit_images: int | None = knob(
        None,
        "training images that order fit is made on; null = enough for 49,152 tokens, and at least 256",
        Range(1, MANY),
    )

    @property
    def on(self) -> bool:
        """Whether there is a second round."""
        return self.epochs > 0 or self.order == "fit"


@dataclass(frozen=True)
class ExpertConfig(ScheduleConfig):
    """Experimental, per-expert distillation (distill.level=expert): each expert is taught alone, as a dense module."""

    assign: Literal["image", "token"] = knob(
        "image", "an expert learns from the images of its cluster; or from all images, on the tokens of its cluster"
    )
    cluster_images: int = knob(2000, "training images the clusters are computed from", Range(1, MANY))


# of end-to-end training: from the distilled modules, and its rivals
STARTS = ("distilled", "scratch", "scratch_equal_cost", "upcycled")


@dataclass(frozen=True)
class TrainConfig(ScheduleConfig):
    """End-to-end training of the assembled student."""

    start: Literal["distilled", "scratch", "scratch_equal_cost", "upcycled"] = knob(
        "distilled",
        "from the distilled modules, from scratch, scratch given the cost of the whole chain, or student.init",
    )
    init: str = knob("", "start from this student in place of the distilled modules: directory or hub id[@revision]")
    new_head: bool = knob(
        False,
        "fine-tuning: give the student of train.init a new head of the data's classes; its sizes and routing stay as "
        "they were saved, whatever section student says",
    )
    stitches: Literal["drop", "keep", "fold"] = knob(
        "drop", "stitch layers at assembly: dropped (published), kept, or each border's two folded into one linear map"
    )
    baselines: tuple[str, ...] = knob(
        (), "starts that --phase all trains as well: scratch, scratch_equal_cost, upcycled"
    )
    kd_weight: float = knob(0.0, "weight of the whole teacher's logits (KL); the label loss gets 1 - kd_weight", SHARE)
    kd_tau: float = knob(1.0, "temperature of that KL", TEMPERATURE)
    border_weight: float = knob(0.0, "weight of matching the teacher's border states, fading out to 0", WEIGHT)
    border_epochs: float = knob(5.0, "epochs after which the border states no longer count", Range(0, MANY))
    routing_weight: float = knob(
        0.0,
        "experimental, 0.3 points for 1.4 times the cost in docs/studies.md: weight of teacher-guided routing, fading "
        "out to 0 with border_epochs",
        WEIGHT,
    )
    ema: float = knob(
        0.0,
        "decay of an average of the weights, per step, which is evaluated and published; 0 = off",
        Range(0, 1, open_most=True),
    )
    layer_decay: float = knob(
        1.0, "learning rate of a block relative to the block after it", Range(0, 1, open_least=True)
    )

    def __post_init__(self):
        super().__post_init__()
        rivals = STARTS[1:]
        for name in self.baselines:
            require(name in rivals, "train.baselines", name, ", ".join(rivals))
        require(bool(self.init) or not self.new_head, "train.new_head", True, "false without train.init")
