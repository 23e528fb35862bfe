"""V-MoE, the sparse student: its configuration, the model, its files, and checkpoints of other code."""

from .config import VARIANTS, VMoEConfig, decode_variant, moe_numbers
from .model import VMoE, load_expert_parallel

__all__ = ["VARIANTS", "VMoE", "VMoEConfig", "decode_variant", "load_expert_parallel", "moe_numbers"]
