"""The mixture of experts: routing as pure functions, the layer on plain torch, and the same spread over ranks."""

from .layer import MoE, MoEConfig, official, paper, routed_layers
from .out import auxiliary_loss, routing_metrics, routings
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
    "routings",
]
