"""The MoE MLP of a V-MoE block: router and batched experts, in plain torch or inside DeepSpeed's expert parallelism.

`MoE` is what a model is built of, published with and evaluated as. `expert_parallel` turns every MoE of a model into
DeepSpeed's layer around the same parameters; `full_state_dict` gives the plain names back whatever the ep size.
B images, T tokens of an image, D width, H hidden width, E experts, K chosen per token, R rows of an expert's batch.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .routing import RouterConfig, Routing, capacity, route

GELU = {"erf": "none", "tanh": "tanh"}  # our name -> F.gelu's `approximate`; timm and transformers use erf


@dataclass(frozen=True)
class MoEConfig(RouterConfig):
    router_bias: bool = False
    capacity_factor: float | None = None  # training; 1.0 = room for a perfectly even load; None = nothing is dropped
    eval_capacity_factor: float | None = None
    capacity_multiple: int = 4  # slots are rounded up to a multiple of this
    images_per_group: int = 1  # images routed together; 0 = the whole micro-batch
    importance_weight: float = 0.005  # weights of the auxiliary losses
    load_weight: float = 0.005  # only counts while noise is drawn
    gshard_weight: float = 0.0
    dropout: float = 0.0  # inside the experts, after the activation and after the second layer

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("capacity_factor", "eval_capacity_factor"):
            if (factor := getattr(self, name)) is not None and factor <= 0:
                raise ValueError(f"{name} must be above 0, got {factor}; None means that nothing is dropped.")
        if self.images_per_group < 0 or self.capacity_multiple < 1:
            raise ValueError(
                f"images_per_group must be 0 (whole micro-batch) or more and capacity_multiple at least 1, "
                f"got {self.images_per_group} and {self.capacity_multiple}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")


def official(**changes: object) -> MoEConfig:
    """Routing of the V-MoE paper's ImageNet-1k recipe (facts of google-research/vmoe, commit 942a78b)."""
    preset = {"renormalize": False, "noise_std": 1.0, "capacity_factor": 1.05, "eval_capacity_factor": 4.0}
    return MoEConfig(**{**preset, **changes})


def paper(**changes: object) -> MoEConfig:
    """Routing of the student in the m2mKD paper's code: FastMoE's naive gate; nothing dropped, no auxiliary loss."""
    preset = {"renormalize": True, "router_bias": True, "importance_weight": 0.0, "load_weight": 0.0}
    return MoEConfig(**{**preset, **changes})


class Routed(nn.Module):
    """What routes tokens: owns `router`, `config` and the Routing of its last forward (losses keep their graph)."""

    router: nn.Linear
    config: MoEConfig
    routing: Routing | None
    keep_logits = False  # whether a forward leaves its clean logits in `logits_BTE`; their graph holds memory
    logits_BTE: Tensor | None = None

    def route_images(self, x_BTD: Tensor) -> tuple[Routing, Tensor, Tensor | int]:
        """Route groups of whole images.

        Returns:
            routing; row_NK: the row of every choice in its expert's batch (-1 = dropped), N = B * T; rows an expert's
            batch needs (a tensor when nothing is dropped, because then it depends on the data).
        """
        config = self.config
        images = config.images_per_group or len(x_BTD)
        if not self.training:  # a loaded model takes any batch: the largest groups that fit, down to single images
            images = math.gcd(images, len(x_BTD))
        elif len(x_BTD) % images:
            raise ValueError(
                f"{len(x_BTD)} images do not make groups of images_per_group = {images}. Use a batch that is a "
                f"multiple of it, or images_per_group 1."
            )
        logits_GSE = self._logits(x_BTD).reshape(len(x_BTD) // images, -1, config.num_experts)
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        slots, tokens = None, logits_GSE.shape[1]
        if factor is not None:
            slots = capacity(tokens, config.num_experts, config.k, factor, config.capacity_multiple)
            slots = min(slots, tokens)  # an expert gets a token once: more slots would stay empty
        noise_GSE = standard_normal(logits_GSE) if self.training and config.noise_std > 0 else None
        routing = route(logits_GSE, config, slots, noise_GSE)
        # Activation checkpointing runs forward again inside backward: that copy would keep a second graph alive.
        if torch._C._current_graph_task_id() == -1:
            self.routing = routing
            # nothing is computed for it here: a recomputation has to save the same tensors, whatever the flag is then
            self.logits_BTE = logits_GSE.view(*x_BTD.shape[:2], -1) if self.keep_logits else None
        return routing, *_rows(routing, slots)

    def _logits(self, x_BTD: Tensor) -> Tensor:
        # always float32: in bfloat16 close gates tie and tokens change expert
        with torch.autocast(x_BTD.device.type, enabled=False):
            bias = None if self.router.bias is None else self.router.bias.float()
            return F.linear(x_BTD.float(), self.router.weight.float(), bias)

    def __getstate__(self) -> dict:
        # copy.deepcopy and pickle cannot take tensors with a graph
        return {**self.__dict__, "routing": None, "logits_BTE": None}


class MoE(Routed):
    """MLP of E experts of which every token visits K.

    Args:
        dim, hidden: D and H.
        config: routing, losses and dropout.
        act: "erf" or "tanh", the form of GELU.
        layer, seed: the initial values of expert e depend on (seed, layer, e) and nothing else, so a model starts the
            same at every ep size.
    """

    def __init__(
        self, dim: int, hidden: int, config: MoEConfig, act: str = "erf", layer: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        if act not in GELU:
            raise ValueError(f"act {act!r} is not known; use one of {', '.join(GELU)}.")
        self.dim, self.hidden, self.config, self.act = dim, hidden, config, act
        self.routing = None
        self.router = nn.Linear(dim, config.num_experts, bias=config.router_bias)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
            for _ in range(config.num_experts)
        )
        draw(self.router.weight, lecun_normal_, seed, layer, "router")
        if config.router_bias:
            nn.init.zeros_(self.router.bias)
        for e, expert in enumerate(self.experts):
            for name, linear in expert.items():
                draw(linear.weight, nn.init.xavier_uniform_, seed, layer, e, name, "weight")
                draw(linear.bias, nn.init.normal_, seed, layer, e, name, "bias", std=1e-6)

    def forward(self, x_BTD: Tensor) -> Tensor:
        routing, row_NK, rows = self.route_images(x_BTD)
        rows, E, D = int(rows), self.config.num_experts, self.dim
        expert_NK = routing.expert_GSK.reshape(row_NK.shape)
        place_NK = torch.where(row_NK >= 0, expert_NK * rows + row_NK, E * rows)  # one row more collects the dropped
        token_N1 = torch.arange(len(place_NK), device=x_BTD.device).unsqueeze(1)
        source = torch.full((E * rows + 1,), len(place_NK), device=x_BTD.device)  # rows nobody takes read a zero token
        source.scatter_(0, place_NK.flatten(), token_N1.expand_as(place_NK).flatten())
        # index_select rather than [...]: the backward of indexing sorts on a GPU
        x_ERD = F.pad(x_BTD.reshape(-1, D), (0, 0, 0, 1)).index_select(0, source[:-1]).view(E, rows, D)
        y_ERD = run_experts(self.experts, x_ERD, self.act, self.config.dropout, self.training)
        y_NKD = F.pad(y_ERD.reshape(-1, D), (0, 0, 0, 1)).index_select(0, place_NK.flatten()).view(*row_NK.shape, D)
        weight_NK1 = routing.weight_GSK.reshape(*row_NK.shape, 1)  # float32, and so is the sum
        return (y_NKD * weight_NK1).sum(1).to(y_ERD.dtype).view_as(x_BTD)


def run_experts(experts: nn.ModuleList, x_ERD: Tensor, act: str, dropout: float, training: bool) -> Tensor:
    """Every expert's MLP on its own rows, in two batched products; (E, R, D) in and out."""

    def linear(name: str, inputs: Tensor) -> Tensor:
        weight = torch.stack([expert[name].weight for expert in experts])
        bias = torch.stack([expert[name].bias for expert in experts])
        return torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(1, 2))

    h_ERH = F.gelu(linear("fc1", x_ERD), approximate=GELU[act])
    return F.dropout(linear("fc2", F.dropout(h_ERH, dropout, training)), dropout, training)


def standard_normal(like: Tensor) -> Tensor:
    """The routing noise: from the device's default generator, which activation checkpointing replays."""
    return torch.randn_like(like)


@torch.no_grad()
def draw(parameter: Tensor, init: Callable[..., object], *key: object, **options: float) -> None:
    """Initialise a parameter with values that depend on `key` alone: not on the device, nor on draws made before."""
    if parameter.is_meta:
        return
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    values = torch.empty(parameter.shape, device="cpu")
    init(values, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])), **options)
    parameter.copy_(values)


def lecun_normal_(weight: Tensor, generator: torch.Generator) -> None:
    """Flax's default: normal with variance 1 / fan-in, cut at two standard deviations."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # what the cut takes from the standard deviation
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def _rows(routing: Routing, slots: int | None) -> tuple[Tensor, Tensor | int]:
    """Line the groups' queues up behind each other in every expert's batch: row of every choice, rows needed."""
    slot_GSK, count_GE = routing.slot_GSK, routing.count_GE
    G, S, K = slot_GSK.shape
    if slots is None:  # packed: group g starts behind what the groups before it sent to that expert
        start_GE = count_GE.cumsum(0) - count_GE
        start_GSK = start_GE.gather(1, routing.expert_GSK.reshape(G, S * K)).view(G, S, K)
        return (slot_GSK + start_GSK).reshape(-1, K), count_GE.sum(0).max()
    start_G11 = slots * torch.arange(G, device=slot_GSK.device).view(G, 1, 1)
    return torch.where(slot_GSK >= 0, slot_GSK + start_G11, -1).reshape(-1, K), G * slots


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Sum over MoE layers of the mean over groups of the weighted losses of the last forward; 0 when none ran."""
    total = torch.zeros(())
    for config, routing in ((layer.config, layer.routing) for layer in routed_layers(model).values()):
        weights = {"importance": config.importance_weight, "load": config.load_weight, "gshard": config.gshard_weight}
        for name, weight in weights.items():
            if weight and routing is not None:
                loss = routing.losses[name]
                total = total.to(loss.device) + weight * loss.mean()
    return total


def routing_metrics(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Per MoE layer that ran: share of choices kept (), share of choices per expert (E,), mean sum of the K gates ().

    Tensors stay on their device, so that nothing waits for it.
    """
    ran = ((name, layer.routing) for name, layer in routed_layers(model).items() if layer.routing is not None)
    return {name: {"kept": last.kept, "load": last.load, "gate_sum": last.gate_sum} for name, last in ran}


def routed_layers(model: nn.Module) -> dict[str, Routed]:
    """What routes in each MoE layer, under the layer's name in the plain model."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, Routed))
    return {name.removesuffix(".deepspeed_moe.gate"): layer for name, layer in layers}
