"""Section student: the modular student, the routing of a V-MoE's blocks, and the circuit of a NAC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.knobs import MANY, SHARE, WEIGHT, Range, check_heads, check_ranges, knob, require, section

KINDS = ["vmoe", "nac"]  # rows of trainer/teaching/families.py
LIKE_TEACHER = "teacher"  # a variant: sizes as trainer/teaching/sizes.py takes them from the teacher
SIZE = Range(1, 100_000)
CAPACITY = Range(0, 10_000, open_least=True)  # slots per expert, in equal shares


@dataclass(frozen=True)
class MoEConfig:
    """Routing of the student's MoE blocks (facts and formulas: docs/method.md)."""

    num_experts: int = knob(8, "experts per MoE block", Range(1, 4096))
    k: int = knob(2, "experts a token is sent to", Range(1, 4096))
    renormalize: bool = knob(True, "top-k gates sum to 1 (paper's student); false = official V-MoE")
    router_bias: bool = knob(False, "bias of the router")
    noise_std: float = knob(
        0.0, "training noise on the logits, divided by the number of experts; official 1.0", Range(0, 1000)
    )
    batch_priority: bool = knob(False, "Batch Priority Routing: the surest tokens get the slots first")
    capacity_factor: float | None = knob(
        None, "slots per expert in training, 1 = an equal share; null = no drops", CAPACITY
    )
    eval_capacity_factor: float | None = knob(None, "the same in evaluation", CAPACITY)
    capacity_multiple: int = knob(4, "capacity is rounded up to a multiple of this", Range(1, 1_000_000))
    images_per_group: int = knob(
        1, "images routed together; 0 = the whole micro-batch, in evaluation single images", Range(0, 1_000_000)
    )
    importance_weight: float = knob(0.005, "weight of the importance loss", WEIGHT)
    load_weight: float = knob(0.005, "weight of the load loss (exists only with noise)", WEIGHT)
    gshard_weight: float = knob(0.0, "weight of the GShard loss", WEIGHT)
    dropout: float = knob(0.0, "dropout inside the experts", Range(0, 1, open_most=True))

    def __post_init__(self):
        check_ranges(self, "student.moe.")
        require(self.k <= self.num_experts, "student.moe.k", self.k, f"1 to num_experts={self.num_experts}")


@dataclass(frozen=True)
class NACConfig:
    """The circuit of a student of kind nac (formulas: docs/method.md). Null = the preset's, or the model's own."""

    preset: str = knob("", "sizes where they are null: tiny-imagenet, imagenet (as published), small (embedded sets)")
    state_dim: int | None = knob(None, "width of a module's state", SIZE)
    code_dim: int | None = knob(None, "width of a module's code", SIZE)
    signature_dim: int | None = knob(None, "width of a module's signature; null = 64", SIZE)
    heads: int | None = knob(None, "of every attention", SIZE)
    head_dim: int | None = knob(None, "channels of a head; null = 64", SIZE)
    input_latents: int | None = knob(None, "modules that read the image", SIZE)
    mediator_latents: int | None = knob(None, "modules of the circuit", SIZE)
    output_latents: int | None = knob(None, "modules that the classes are told from", SIZE)
    propagators: int | None = knob(None, "layers of the circuit; null = 8", Range(1, 1000))
    ffn_factor: float | None = knob(
        None, "hidden width of feed-forward blocks over state_dim", Range(0, 100, open_least=True)
    )
    tokenizer: Literal["tiny", "mini", "micro", "nano", "pico", "femto", "atto"] | None = knob(
        None, "blocks per ConvNeXt stage of the tokenizer; null = mini (3, 3)"
    )
    tokenizer_stages: int | None = knob(None, "a token is 4 x 2^(stages - 1) pixels; null = 2", Range(1, 3))
    grid_dim: int | None = knob(None, "channels of the learned positions; null = 64", SIZE)
    graph: Literal[
        "scale-free",
        "planted-partition",
        "ring-of-cliques",
        "erdos-renyi",
        "watts-strogatz",
        "grid",
        "tree",
        "barbell",
        "hypercube",
        "complete",
    ] = knob("scale-free", "prior that the mediators' signatures are fitted to")
    graph_degree: int | None = knob(
        None, "scale-free: edges of a new module; watts-strogatz: neighbours, 0 = a tenth of all", Range(0, 100_000)
    )
    graph_clusters: int | None = knob(None, "planted-partition, ring-of-cliques: how many", SIZE)
    graph_p: float = knob(0.1, "erdos-renyi: of an edge; watts-strogatz: of an edge to be laid anew", SHARE)
    graph_p_in: float = knob(0.9, "planted-partition: of an edge inside a cluster", SHARE)
    graph_p_out: float = knob(0.2, "planted-partition: of an edge between clusters", SHARE)
    truncation: float = knob(
        0.9, "modules with signatures farther apart (1 - cosine) do not hear each other", Range(0, 2, open_least=True)
    )
    fit_threshold: float | None = knob(
        None,
        "of the fit of signatures; null = truncation. Published 0.8 with truncation 0.9, which loses most of the graph",
        Range(0, 2, open_least=True),
    )
    fit_recall: float | None = knob(
        None,
        "least share of the graph's edges kept by the fit; 0 = 1000 steps, published; null = the preset's, else 0.95",
        SHARE,
    )
    fit_steps: int = knob(20_000, "most steps of the fit", Range(1, MANY))
    code_noise: float = knob(0.05, "training noise on codes, relative to each entry", SHARE)
    stochastic_kernel: bool = knob(True, "links are sampled in training")
    temperature: float = knob(0.5, "of those samples", Range(0, 100, open_least=True))
    noisy_evaluation: bool = knob(False, "keep the noise of seeds and pooling in evaluation, as published")
    hinge_weight: float = knob(0.1, "weight of the repulsion of near signatures", WEIGHT)
    hinge_radius: float = knob(0.4, "distance within which they repel each other", Range(0, 2))
    block_model_weight: float = knob(0.0, "planted-partition: weight of the block model; published 1", WEIGHT)
    read_in: Literal["one", "tokens"] = knob(
        "one",
        "receivers of the read-in student module: one, which gives one token (published); or one per token of the "
        "teacher, which border targets and a second round need",
    )
    mediator: Literal["each", "one"] = knob(
        "each",
        "layers of a mediator student module that stands for several propagators: each, one per propagator; or one, "
        "whose weights all of them start from",
    )

    def __post_init__(self):
        check_ranges(self, "student.nac.")


@dataclass(frozen=True)
class StudentConfig:
    """The modular student; images and classes are the teacher's and the data's. Kind nac reads kind, depths and nac."""

    kind: str = knob("vmoe", "vmoe: vision transformer with mixtures of experts; nac: Neural Attentive Circuits")
    variant: str = knob(
        "",
        "fills the sizes below where they are null: S/16, B/16, L/16, H/14, m2mkd-B/16 ...; the same without a patch "
        "size, as B; or teacher = the teacher's own with half its blocks",
    )
    patch_size: int | None = knob(
        None, "pixels; null = the variant's, or the teacher's where it has none", Range(1, 100_000)
    )
    width: int | None = knob(None, "null = the variant's", Range(1, 100_000))
    depth: int | None = knob(None, "blocks; null = the variant's", Range(1, 1000))
    heads: int | None = knob(None, "null = the variant's", Range(1, 100_000))
    mlp_dim: int | None = knob(None, "null = the variant's", Range(1, 100_000))
    depths: tuple[int, ...] = knob(
        (), "blocks per module; empty = as equal as possible over `modules`", Range(1, 100_000)
    )
    moe_blocks: str = knob("all", "all, every-2, last-2, none, or block numbers as 1,3")
    gelu: Literal["erf", "tanh"] = knob("erf", "form of GELU; teachers from timm and transformers use erf")
    pool: Literal["token", "mean"] = knob("token", "head on the class token or on the mean of the patches")
    init: str = knob(
        "", "start of the blocks: empty = new, teacher = the teacher's layers, or a dense ViT (hub id, folder)"
    )
    start: Literal["auto", "copy", "project"] = knob(
        "auto",
        "with init: copy = layers as they are, which needs equal sizes; project = a student of any width and depth, by "
        "one basis of the hidden states and least squares, block by block; auto = copy where each block has a layer of "
        "its sizes to itself, else project",
    )
    start_images: int | None = knob(
        None,
        "training images that a projected start is fitted on; null = enough for 49,152 tokens, and at least 256",
        Range(1, MANY),
    )
    experts: Literal["copy", "clusters"] = knob(
        "copy",
        "with init: experts are copies of the MLP, or (experimental: ends below copies in docs/studies.md) each made "
        "for a cluster of its inputs, router included",
    )
    expert_noise: float = knob(
        0.0, "with init: noise on each expert, relative to the standard deviation of a weight", Range(0, 1000)
    )
    reg_tokens: int | None = knob(
        None, "prefix tokens beside the class token; null = as many as the teacher has", Range(0, 10_000)
    )
    class_token: bool | None = knob(None, "a class token; null = where the teacher has one")
    rope: bool | None = knob(
        None, "attention rotates queries and keys by their place in the patch grid; null = where the teacher does"
    )
    swiglu: bool = knob(False, "SwiGLU in MLPs and experts, mlp_dim wide, in place of GELU")
    layer_scale: float = knob(
        0.0, "initial value of a learned factor per channel behind attention and MLP; 0 = none", Range(0, 100)
    )
    drop_rate: float = knob(0.0, "dropout in dense MLPs and after attention", Range(0, 1, open_most=True))
    moe: MoEConfig = section(MoEConfig)
    nac: NACConfig = section(NACConfig)

    @property
    def num_experts(self) -> int:
        """Experts of an MoE block; 0 = a kind of student that has none."""
        return 0 if self.kind == "nac" else self.moe.num_experts

    def __post_init__(self):
        check_ranges(self, "student.")
        require(self.kind in KINDS, "student.kind", self.kind, f"one of {', '.join(KINDS)}")
        if self.kind == "nac":
            expected = "empty with student.kind=nac, which starts from no ViT's layers"
            require(not self.init, "student.init", self.init, expected)
            return
        open_sizes = []  # left to the variant
        for name in ("width", "depth", "heads", "mlp_dim"):
            size = getattr(self, name)
            if size is None:
                open_sizes.append(name)
        if open_sizes and not self.variant:
            raise ValueError(f"student.variant is empty and student.{open_sizes[0]} is not set: set one of them")
        if self.width is not None and self.heads is not None:
            check_heads("student", self.width, self.heads)
        gelu_expected = "erf where student.swiglu is true, which takes the place of GELU"
        require(not self.swiglu or self.gelu == "erf", "student.gelu", self.gelu, gelu_expected)
        if not self.init:
            expected = "auto or copy where student.init is empty: set student.init=teacher, or name a dense ViT"
            require(self.start != "project", "student.start", self.start, expected)
            for name, off in (("start_images", None), ("experts", "copy"), ("expert_noise", 0.0)):
                value = getattr(self, name)
                expected = f"{off} where student.init is empty: set student.init=teacher, or name a dense ViT"
                require(value == off, f"student.{name}", value, expected)
