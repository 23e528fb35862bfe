"""The mixture of experts: routing as pure functions, the layer on plain torch, and the same spread over ranks."""

from .layer import MoE, MoEConfig, auxiliary_loss, official, paper, routed_layers, routing_metrics
from .parallel import expert_parallel, full_state_dict, load_full_state_dict

__all__ = [
    "MoE",
    "MoEConfig",
    "auxiliary_loss",
    "expert_parallel",
    "full_state_dict",
    "load_full_state_dict",
    "official",
    "paper",
    "routed_layers",
    "routing_metrics",
]
