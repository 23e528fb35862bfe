"""Section student: the modular student and the routing of its MoE blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.knobs import knob, require, section


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
    images_per_group: int = knob(1, "images routed together; 0 = the whole micro-batch, in evaluation single images")
    importance_weight: float = knob(0.005, "weight of the importance loss")
    load_weight: float = knob(0.005, "weight of the load loss (exists only with noise)")
    gshard_weight: float = knob(0.0, "weight of the GShard loss")
    dropout: float = knob(0.0, "dropout inside the experts")

    def __post_init__(self):
        require(1 <= self.num_experts <= 100_000, "student.moe.num_experts", self.num_experts, "1 to 100,000")
        require(1 <= self.k <= self.num_experts, "student.moe.k", self.k, f"1 to num_experts={self.num_experts}")
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            drops_none = factor is None
            require(drops_none or factor > 0, f"student.moe.{name}", factor, "a positive number, or null (no drops)")
        for name in ("noise_std", "images_per_group"):
            value = getattr(self, name)
            require(value >= 0, f"student.moe.{name}", value, "0 or more")
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
        "copy",
        "with init: experts are copies of the MLP, or (experimental: ends below copies in docs/studies.md) cut from it "
        "by clusters of its inputs, router included",
    )
    expert_noise: float = knob(0.0, "with init: noise on each expert, relative to the standard deviation of a weight")
    reg_tokens: int | None = knob(None, "prefix tokens beside the class token; null = as many as the teacher has")
    drop_rate: float = knob(0.0, "dropout in dense MLPs and after attention")
    moe: MoEConfig = section(MoEConfig)

    @property
    def kind(self) -> str:
        """Name of the student's family, a row of trainer/teaching/families.py."""
        return "vmoe"

    def __post_init__(self):
        open_sizes = []  # left to the variant
        for name in ("patch_size", "width", "depth", "heads", "mlp_dim"):
            size = getattr(self, name)
            if size is None:
                open_sizes.append(name)
            else:
                require(1 <= size <= 100_000, f"student.{name}", size, "1 to 100,000")
        if open_sizes and not self.variant:
            raise ValueError(f"student.variant is empty and student.{open_sizes[0]} is not set: set one of them")
        require(self.expert_noise >= 0, "student.expert_noise", self.expert_noise, "0 (off) or more")
        if not self.init:
            for name, off in (("experts", "copy"), ("expert_noise", 0.0)):
                value = getattr(self, name)
                expected = f"{off} where student.init is empty: set student.init=teacher, or name a dense ViT"
                require(value == off, f"student.{name}", value, expected)
