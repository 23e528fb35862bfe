"""What a recipe can say: one dataclass per section, every knob with its type, default and one line of help.

Values are checked here, before torch is imported and before any GPU is taken. Reading YAML is trainer/config.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def knob(default: Any, help: str) -> Any:
    """A dataclass field with its one line of documentation (what it is, and its unit)."""
    return field(default=default, metadata={"help": help})


def section(cls: type) -> Any:
    """A nested dataclass built from its own defaults."""
    return field(default_factory=cls)


@dataclass(frozen=True)
class FractalConfig:
    """Procedural images (source fractals): every class is a random iterated function system. Nothing to download."""

    classes: int = knob(100, "classes")
    size: int = knob(64, "width and height, pixels")
    train_images: int = knob(20_000, "training images, equally many of each class")
    val_images: int = knob(2_000, "validation images, drawn from parameters the training images never take")
    difficulty: float = knob(0.5, "0 to 1: how far rotation, scale, shift and the maps themselves vary in a class")
    seed: int = knob(0, "of the data set; the recipe's own seed leaves it as it is")
    cache: str = knob("", "folder for the images; empty = M2MKD_CACHE, or ~/.cache/m2mkd")

    def __post_init__(self):
        require(2 <= self.classes <= 10_000, "data.fractals.classes", self.classes, "2 to 10,000")
        require(16 <= self.size <= 512, "data.fractals.size", self.size, "16 to 512 pixels")
        for name in ("train_images", "val_images"):
            value, expected = getattr(self, name), f"a multiple of data.fractals.classes={self.classes}"
            require(value >= self.classes and value % self.classes == 0, f"data.fractals.{name}", value, expected)
        require(0 <= self.difficulty <= 1, "data.fractals.difficulty", self.difficulty, "0 to 1")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    source: Literal["digits", "fractals", "folder", "hub"] = knob(
        "digits", "embedded digits, procedural fractals, an ImageFolder, or `datasets`"
    )
    path: str = knob("", "folder (source folder), or hub id[@revision] / local path (source hub)")
    image_key: str = knob("image", "column with the image (source hub)")
    label_key: str = knob("label", "column with the label (source hub)")
    train_split: str = knob("train", "split or sub-folder for training")
    val_split: str = knob("validation", "split or sub-folder for evaluation")
    workers: int = knob(0, "data loading processes per rank")
    skip_unreadable: bool = knob(False, "replace an unreadable image by the next one and count it, instead of stopping")
    max_pixels: int = knob(100_000_000, "width x height of the largest image that is decoded: a guard against bombs")
    limit: int = knob(0, "use n images of each split, spread evenly over it; 0 = all")
    fractals: FractalConfig = section(FractalConfig)

    def __post_init__(self):
        if self.source in ("folder", "hub") and not self.path:
            raise ValueError(f"data.source is {self.source!r} but data.path is empty: set data.path=FOLDER_OR_HUB_ID")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(self.max_pixels >= 1, "data.max_pixels", self.max_pixels, "1 or more")
        require(self.limit >= 0, "data.limit", self.limit, "0 (all) or more")


@dataclass(frozen=True)
class AugmentConfig:
    """Training transforms and mixing, by timm's names."""

    hflip: float = knob(0.5, "probability of a horizontal flip")
    scale: tuple[float, float] = knob((0.08, 1.0), "RandomResizedCrop: share of the area")
    ratio: tuple[float, float] = knob((0.75, 4 / 3), "RandomResizedCrop: aspect ratio")
    rand_augment: str = knob("", "timm RandAugment string, e.g. rand-m9-mstd0.5-inc1; empty = off")
    color_jitter: float = knob(0.0, "colour jitter strength; unused when rand_augment is on, as in timm")
    random_erasing: float = knob(0.0, "probability of random erasing")
    mixup: float = knob(0.0, "mixup alpha; 0 = off")
    cutmix: float = knob(0.0, "cutmix alpha; 0 = off")
    switch_prob: float = knob(0.5, "probability of cutmix when both mixup and cutmix are on")
    label_smoothing: float = knob(0.0, "label smoothing of the classification loss")
    repeats: int = knob(1, "repeated augmentation: times an image stands in an epoch of unchanged length")

    def __post_init__(self):
        for name in ("hflip", "random_erasing", "switch_prob", "label_smoothing"):
            require(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "a value from 0 to 1")
        for name in ("color_jitter", "mixup", "cutmix"):
            require(getattr(self, name) >= 0, f"augment.{name}", getattr(self, name), "0 (off) or more")
        require(self.repeats >= 1, "augment.repeats", self.repeats, "1 or more")


MAY_BE_OFF = ("distill", "refine")  # the two rounds of teaching: 0 epochs turn one of them off


@dataclass(frozen=True)
class ScheduleConfig:
    """Optimiser and schedule of one phase. The learning rate used is lr x global batch / 512."""

    epochs: int = knob(100, "passes over the training images")
    lr: float = knob(5e-4, "learning rate at a global batch of 512; scaled linearly with the batch")
    min_lr: float = knob(1e-5, "learning rate at the end of the cosine (not scaled)")
    warmup_epochs: float = knob(0.0, "linear warm-up from warmup_lr, in epochs")
    warmup_lr: float = knob(1e-6, "learning rate of the first step (not scaled)")
    optimizer: Literal["adamw", "sgd"] = knob("adamw", "AdamW, or plain SGD with momentum")
    weight_decay: float = knob(0.05, "on matrices only: none on 1-D parameters, tokens and position embeddings")
    momentum: float = knob(0.9, "of SGD")
    betas: tuple[float, float] = knob((0.9, 0.999), "of AdamW")
    eps: float = knob(1e-8, "of AdamW")
    drop_path: float = knob(0.0, "stochastic depth of the trained blocks, rising linearly to this rate")
    global_batch: int | None = knob(None, 'images per optimiser step where the DeepSpeed JSON says "auto"')
    clip: float | None = knob(None, 'gradient norm limit where the DeepSpeed JSON says "auto"; 0 = off')

    def __post_init__(self):
        name = type(self).__name__.removesuffix("Config").lower()
        least = 0 if name in MAY_BE_OFF else 1
        require(self.epochs >= least, f"{name}.epochs", self.epochs, f"{least} or more")
        require(self.lr > 0, f"{name}.lr", self.lr, "a positive learning rate")
        fits = 0 <= self.warmup_epochs <= (self.epochs or self.warmup_epochs)  # any of a phase that is off
        require(fits, f"{name}.warmup_epochs", self.warmup_epochs, "0 to epochs")
        require(self.weight_decay >= 0, f"{name}.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.drop_path < 1, f"{name}.drop_path", self.drop_path, "0 to below 1")
        require(self.global_batch is None or self.global_batch >= 1, f"{name}.global_batch", self.global_batch, ">= 1")
        require(self.clip is None or self.clip >= 0, f"{name}.clip", self.clip, "0 (off) or a positive norm")


@dataclass(frozen=True)
class TeacherConfig(ScheduleConfig):
    """The monolithic teacher: one from the hub or a folder, a small ViT trained by phase `teacher`, or a grown one."""

    source: str = knob("", "hub id[@revision] or directory; empty = train one with phase teacher")
    grown: bool = knob(
        False, "grow it inside the meta model: phases meta, incubate and assemble in place of phase teacher"
    )
    depths: tuple[int, ...] = knob((), "blocks per module; empty = as equal as possible over `modules`")
    image_size: int = knob(32, "of a trained teacher, pixels")
    patch_size: int = knob(8, "of a trained teacher, pixels")
    width: int = knob(64, "of a trained teacher")
    depth: int = knob(8, "of a trained teacher, blocks")
    heads: int = knob(4, "of a trained teacher")
    mlp_dim: int = knob(256, "of a trained teacher")


@dataclass(frozen=True)
class MetaConfig(ScheduleConfig):
    """The meta model: N shallow stages of the teacher's width."""

    source: str = knob("", "reuse a trained one: run folder, or hub id[@revision] of a pushed run; empty = train it")
    init: Literal["scratch", "teacher"] = knob("teacher", "start of the stages: new, or the teacher's own layers")
    objective: Literal["labels", "matching", "theseus"] = knob(
        "theseus", "labels only; the teacher's border states and logits; or random swapping with teacher modules"
    )
    blocks_per_module: int = knob(
        1, "transformer blocks per stage; 0 = the teacher is its own meta model, and nothing is trained"
    )
    label_weight: float = knob(0.5, "weight of the label loss in objectives matching and theseus")
    kl_weight: float = knob(1.0, "weight of the teacher's logits there (KL)")
    free_weight: float = knob(1.0, "matching: weight of the border errors of the free-running meta model")
    forced_weight: float = knob(1.0, "matching: the same where each stage is fed the teacher's border state")
    replace_rate: float = knob(
        0.5, "theseus: share of stages that stand in for the teacher's modules at the start; rises to 1"
    )

    def __post_init__(self):
        super().__post_init__()
        require(self.blocks_per_module >= 0, "meta.blocks_per_module", self.blocks_per_module, "0 (teacher) or more")
        require(self.blocks_per_module or self.init == "teacher", "meta.init", self.init,
                "teacher with meta.blocks_per_module=0, where the teacher is its own meta model")  # fmt: skip
        for name in ("label_weight", "kl_weight", "free_weight", "forced_weight"):
            require(getattr(self, name) >= 0, f"meta.{name}", getattr(self, name), "0 (off) or more")
        require(self.kl_weight or self.label_weight or self.objective == "labels", "meta.kl_weight", self.kl_weight,
                "a positive weight here or in meta.label_weight: else the last stage learns nothing")  # fmt: skip
        require(0 < self.replace_rate <= 1, "meta.replace_rate", self.replace_rate, "above 0, at most 1")


@dataclass(frozen=True)
class IncubateConfig(ScheduleConfig):
    """Growing a teacher (teacher.grown): each module is trained in its place in the frozen meta model, on labels."""

    epochs: int = knob(100, "passes over the training images")
    warmup_epochs: float = knob(20.0, "linear warm-up from warmup_lr, in epochs")
    drop_path: float = knob(0.1, "stochastic depth of the teacher's blocks, rising linearly to this rate")


@dataclass(frozen=True)
class AssembleConfig(ScheduleConfig):
    """Growing a teacher (teacher.grown): the incubated modules are put together and fine-tuned, on labels."""

    epochs: int = knob(100, "passes over the training images")
    drop_path: float = knob(0.1, "stochastic depth of the teacher's blocks, rising linearly to this rate")
    clip: float | None = knob(1.0, 'gradient norm limit where the DeepSpeed JSON says "auto"; 0 = off')


@dataclass(frozen=True)
class DistillConfig(ScheduleConfig):
    """One teacher-student module pair inside the frozen meta model."""

    epochs: int = knob(100, "passes over the training images; 0 = modules go untaught into the second round")
    source: str = knob("", "reuse distilled modules: run folder, or hub id[@revision] of a pushed run; empty = train")
    alpha: float = knob(0.5, "weight of the distillation term; the label loss gets 1 - alpha")
    tau: float = knob(1.0, "temperature of the distillation term")
    target: Literal["soft", "hard"] = knob("soft", "KL to the teacher's distribution, or CE with its arg-max")
    kl_reduction: Literal["batchmean", "reference"] = knob(
        "batchmean", "KL averaged per sample; reference = divided by batch x classes, as the published code"
    )
    alpha_end: float | None = knob(None, "alpha at the last step, changed linearly; null = constant")
    tau_end: float | None = knob(None, "tau at the last step, changed linearly; null = constant")
    logit_weight: float = knob(1.0, "weight of label and distillation terms together; 0 = border target alone")
    border: Literal["none", "mse", "cosine"] = knob(
        "none", "target at the module's own border, beside the logits: the teacher module's output there"
    )
    border_weight: float = knob(1.0, "weight of the border target (relative MSE, or 1 - cosine)")
    stitches: Literal["linear", "pca", "tied"] = knob(
        "linear",
        "LayerNorm + Linear (published); Linear started from the border's principal components; or those, fixed",
    )
    input_noise: float = knob(0.0, "Gaussian noise on a module's input, relative to the input's standard deviation")
    level: Literal["module", "expert"] = knob(
        "module", "teach modules whole; or their experts one by one first (section expert), then tune the module"
    )
    routing_weight: float = knob(0.0, "weight of teacher-guided routing: KL from a teacher router to each MoE router")

    def __post_init__(self):
        super().__post_init__()
        for key in ("alpha", "alpha_end"):
            value = getattr(self, key)
            require(value is None or 0 <= value <= 1, f"distill.{key}", value, "0 to 1")
        for key in ("tau", "tau_end"):
            value = getattr(self, key)
            require(value is None or value > 0, f"distill.{key}", value, "a positive temperature")
        for key in ("logit_weight", "border_weight", "input_noise", "routing_weight"):
            require(getattr(self, key) >= 0, f"distill.{key}", getattr(self, key), "0 (off) or more")
        require(self.logit_weight or self.border != "none", "distill.logit_weight", self.logit_weight,
                "a positive weight, or distill.border to learn from")  # fmt: skip


@dataclass(frozen=True)
class RefineConfig(ScheduleConfig):
    """Second round on what the modules before really send; targets as in section distill (not in the paper)."""

    epochs: int = knob(0, "passes over the training images; 0 = no second round")
    order: Literal["parallel", "sequential", "together"] = knob(
        "parallel",
        "predecessors of the first round, so modules are independent; refined ones, one after another; or all at once",
    )


@dataclass(frozen=True)
class ExpertConfig(ScheduleConfig):
    """Per-expert distillation (distill.level=expert): each expert of a module is taught alone, as a dense module."""

    assign: Literal["image", "token"] = knob(
        "image", "an expert learns from the images of its cluster; or from all images, on the tokens of its cluster"
    )
    cluster_images: int = knob(2000, "training images the clusters are computed from")


@dataclass(frozen=True)
class MoEConfig:
    """Routing of the student's MoE blocks (facts and formulas: docs/method.md)."""

    num_experts: int = knob(8, "experts per MoE block")
    k: int = knob(2, "experts a token is sent to")
    renormalize: bool = knob(True, "top-k gates sum to 1 (paper's student); false = official V-MoE")
    router_bias: bool = knob(False, "bias of the router")
    noise_std: float = knob(0.0, "training noise on the logits, divided by the number of experts; official 1.0")
    batch_priority: bool = knob(False, "Batch Priority Routing: the surest tokens get the slots first")
    capacity_factor: float | None = knob(None, "slots per expert in training, 1 = an equal share; null = no drops")
    eval_capacity_factor: float | None = knob(None, "the same in evaluation")
    capacity_multiple: int = knob(4, "capacity is rounded up to a multiple of this")
    images_per_group: int = knob(1, "images routed together; 0 = the whole micro-batch")
    importance_weight: float = knob(0.005, "weight of the importance loss")
    load_weight: float = knob(0.005, "weight of the load loss (exists only with noise)")
    gshard_weight: float = knob(0.0, "weight of the GShard loss")
    dropout: float = knob(0.0, "dropout inside the experts")

    def __post_init__(self):
        require(1 <= self.num_experts <= 100_000, "student.moe.num_experts", self.num_experts, "1 to 100,000")
        require(1 <= self.k <= self.num_experts, "student.moe.k", self.k, f"1 to num_experts={self.num_experts}")
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            require(
                factor is None or factor > 0, f"student.moe.{name}", factor, "a positive number, or null (no drops)"
            )
        for name in ("noise_std", "images_per_group"):
            require(getattr(self, name) >= 0, f"student.moe.{name}", getattr(self, name), "0 or more")
        require(self.capacity_multiple >= 1, "student.moe.capacity_multiple", self.capacity_multiple, "1 or more")
        require(0 <= self.dropout < 1, "student.moe.dropout", self.dropout, "0 to below 1")


@dataclass(frozen=True)
class StudentConfig:
    """The modular student, a V-MoE. Image size, channels and classes come from the teacher and the data."""

    variant: str = knob("", "S/16, B/16, L/16, H/14 or m2mkd-B/16 ...; fills the sizes below where they are null")
    patch_size: int | None = knob(None, "pixels; null = the variant's")
    width: int | None = knob(None, "null = the variant's")
    depth: int | None = knob(None, "blocks; null = the variant's")
    heads: int | None = knob(None, "null = the variant's")
    mlp_dim: int | None = knob(None, "null = the variant's")
    depths: tuple[int, ...] = knob((), "blocks per module; empty = as equal as possible over `modules`")
    moe_blocks: str = knob("all", "all, every-2, last-2, none, or block numbers as 1,3")
    gelu: Literal["erf", "tanh"] = knob("erf", "form of GELU; teachers from timm and transformers use erf")
    pool: Literal["token", "mean"] = knob("token", "head on the class token or on the mean of the patches")
    init: str = knob(
        "", "start of the blocks: empty = new, teacher = the teacher's layers, or a dense ViT (hub id, folder)"
    )
    experts: Literal["copy", "clusters"] = knob(
        "copy", "with init: experts are copies of the MLP, or cut from it by clusters of its inputs, router included"
    )
    expert_noise: float = knob(0.0, "with init: noise on each expert, relative to the standard deviation of a weight")
    reg_tokens: int | None = knob(None, "prefix tokens beside the class token; null = as many as the teacher has")
    drop_rate: float = knob(0.0, "dropout in dense MLPs and after attention")
    moe: MoEConfig = section(MoEConfig)

    def __post_init__(self):
        sizes = ("patch_size", "width", "depth", "heads", "mlp_dim")
        missing = [name for name in sizes if getattr(self, name) is None]
        for name in set(sizes) - set(missing):
            require(1 <= getattr(self, name) <= 100_000, f"student.{name}", getattr(self, name), "1 to 100,000")
        if not self.variant and missing:
            raise ValueError(f"student.variant is empty and student.{missing[0]} is not set: set one of them")
        require(self.expert_noise >= 0, "student.expert_noise", self.expert_noise, "0 (off) or more")
        if not self.init:
            for name, off in (("experts", "copy"), ("expert_noise", 0.0)):
                expected = f"{off} where student.init is empty: set student.init=teacher, or name a dense ViT"
                require(getattr(self, name) == off, f"student.{name}", getattr(self, name), expected)


@dataclass(frozen=True)
class TrainConfig(ScheduleConfig):
    """End-to-end training of the assembled student."""

    start: Literal["distilled", "scratch", "scratch_equal_cost", "upcycled"] = knob(
        "distilled",
        "from the distilled modules, from scratch, scratch given the cost of the whole chain, or student.init",
    )
    init: str = knob("", "start from this V-MoE in place of the distilled modules: directory or hub id[@revision]")
    stitches: Literal["drop", "keep", "fold"] = knob(
        "drop", "stitch layers at assembly: dropped (published), kept, or each border's two folded into one linear map"
    )
    baselines: tuple[str, ...] = knob(
        (), "starts that --phase all trains as well: scratch, scratch_equal_cost, upcycled"
    )
    kd_weight: float = knob(0.0, "weight of the whole teacher's logits (KL); the label loss gets 1 - kd_weight")
    kd_tau: float = knob(1.0, "temperature of that KL")
    border_weight: float = knob(0.0, "weight of matching the teacher's border states, fading out to 0")
    border_epochs: float = knob(5.0, "epochs after which the border states no longer count")
    routing_weight: float = knob(0.0, "weight of teacher-guided routing, fading out to 0 with border_epochs")
    ema: float = knob(0.0, "decay of an average of the weights, per step, which is evaluated and published; 0 = off")
    layer_decay: float = knob(1.0, "learning rate of a block relative to the block after it")

    def __post_init__(self):
        super().__post_init__()
        starts = ("scratch", "scratch_equal_cost", "upcycled")
        for name in self.baselines:
            require(name in starts, "train.baselines", name, ", ".join(starts))
        require(0 <= self.kd_weight <= 1, "train.kd_weight", self.kd_weight, "0 (off) to 1")
        require(self.kd_tau > 0, "train.kd_tau", self.kd_tau, "a positive temperature")
        for name in ("border_weight", "border_epochs", "routing_weight"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 (off) or more")
        require(0 <= self.ema < 1, "train.ema", self.ema, "0 (off) to below 1")
        require(0 < self.layer_decay <= 1, "train.layer_decay", self.layer_decay, "above 0, at most 1")


@dataclass(frozen=True)
class RunConfig:
    """What the loop writes, and how often."""

    log_every: int = knob(20, "optimiser steps between metrics rows and progress lines")
    eval_every: int = knob(1, "epochs between evaluations; the last epoch is always evaluated")
    save_every: int = knob(1000, "optimiser steps between checkpoints; every epoch's end is one too, see save_epochs")
    save_epochs: int = knob(1, "epochs between checkpoints at an epoch's end")
    keep: int = knob(2, "newest checkpoints kept per phase")
    keep_best: bool = knob(False, "keep the checkpoint of the best evaluation as well")
    keep_every: int = knob(0, "keep every checkpoint whose step is a multiple of this as well; 0 = none")
    eval_batch: int = knob(0, "images per rank in evaluation; 0 = the micro-batch")
    deterministic: bool = knob(False, "deterministic GPU kernels, slower in MoE dispatch; the CPU always has them")
    trackers: tuple[str, ...] = knob(
        ("auto",),
        "where metrics go beside metrics.jsonl: tensorboard, wandb, mlflow, trackio; auto = TensorBoard if there",
    )
    hang_seconds: float = knob(1800.0, "seconds without a finished step after which a rank ends itself; 0 = never")
    on_nonfinite: Literal["stop", "skip", "rollback"] = knob(
        "stop",
        "a loss or gradient that is no number: stop, leave that step out, or go back to the last checkpoint",
    )
    max_nonfinite: int = knob(10, "such steps in a phase (likewise rollbacks after a spike) before it stops after all")
    spike_factor: float = knob(
        10.0, "a row's loss this many robust standard deviations above the rows before is a spike; 0 = no check"
    )
    on_spike: Literal["warn", "rollback"] = knob("warn", "warn of a spike, or go back to the last checkpoint")
    dead_after: int = knob(5, "rows of metrics without tokens after which an expert is reported as dead; 0 = never")

    def __post_init__(self):
        for name in ("log_every", "eval_every", "save_every", "save_epochs", "keep"):
            require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "1 or more")
        require(self.keep_every >= 0, "run.keep_every", self.keep_every, "0 (none) or a number of steps")
        require(self.hang_seconds >= 0, "run.hang_seconds", self.hang_seconds, "0 (never) or seconds")
        require(self.max_nonfinite >= 0, "run.max_nonfinite", self.max_nonfinite, "0 or more")
        require(self.spike_factor >= 0, "run.spike_factor", self.spike_factor, "0 (no check) or a positive factor")
        require(self.dead_after >= 0, "run.dead_after", self.dead_after, "0 (never) or a number of rows")
        require(self.eval_batch >= 0, "run.eval_batch", self.eval_batch, "0 (the micro-batch) or more")
        for name in self.trackers:
            require(name in ("auto", *TRACKERS), "run.trackers", name, "auto, " + ", ".join(TRACKERS))


@dataclass(frozen=True)
class HubConfig:
    """Where results are pushed on the hub. The token comes from HF_TOKEN or `hf auth login`, never from here."""

    repo: str = knob("", "owner/name to push to; empty = nothing is pushed")
    revision: str = knob("main", "branch to push to; made when it does not exist")
    private: bool = knob(True, "whether a repo that has to be created is private")
    stages: Literal["last", "all"] = knob(
        "last", "push the trained student only, or also meta model and distilled modules"
    )
    license: str = knob("", "licence of the student, as the hub spells it (apache-2.0, mit, ...); empty = not stated")


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


def require(good: bool, name: str, value: Any, expected: str) -> None:
    """Raise a ValueError that names the key, its value and what was expected, unless `good`."""
    if not good:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
