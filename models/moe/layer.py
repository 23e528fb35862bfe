"""The MoE MLP of a V-MoE block: router and experts, in plain torch or inside DeepSpeed's expert parallelism.

`MoE` is what a model is built of, published with and evaluated as. `expert_parallel` turns every MoE of a model into
DeepSpeed's layer around the same parameters; `full_state_dict` gives the plain names back whatever the ep size.
B images, T tokens of an image, D width, H hidden width, E experts, K chosen per token.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import dispatch, most_rows
from .dropout import ExpertDropout, draw_number
from .expert import LAYERS, new_expert
from .grouped import LOOP, form_of, row_multiple, run_experts, without_autocast
from .out import Out, decided_in
from .routing import Decided, RouterConfig, Routing, capacity, once, route


@dataclass(frozen=True)
class MoEConfig(RouterConfig):
    router_bias: bool = False
    capacity_factor: float | None = None  # training; 1.0 = room for a perfectly even load; None = nothing is dropped
    eval_capacity_factor: float | None = None
    capacity_multiple: int = 4  # slots are rounded up to a multiple of this
    images_per_group: int = 1  # images routed together; 0 = the whole micro-batch, in evaluation single images
    importance_weight: float = 0.005  # weights of the auxiliary losses
    load_weight: float = 0.005  # only counts while noise is drawn
    gshard_weight: float = 0.0
    dropout: float = 0.0  # inside the experts, after the activation and after the second layer

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and factor <= 0:
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
    return MoEConfig(**(preset | changes))


def paper(**changes: object) -> MoEConfig:
    """Routing of the student in the m2mKD paper's code: FastMoE's naive gate; nothing dropped, no auxiliary loss."""
    preset = {"renormalize": True, "router_bias": True, "importance_weight": 0.0, "load_weight": 0.0}
    return MoEConfig(**(preset | changes))


class Routed(nn.Module):
    """What routes tokens: owns `router` and `config`."""

    router: nn.Linear
    config: MoEConfig
    whole_groups = False  # whether training refuses a batch that is not whole groups of images_per_group

    def route_images(self, x_BTD: Tensor, out: Out | None = None) -> tuple[Routing, int | None]:
        """Route groups of whole images.

        The Routing, whose losses carry a graph, and the clean logits (B, T, E) are left in out["routing"] and
        out["logits"] too.

        Returns:
            routing; places an expert has for each group, None = as many as are asked for.

        Raises:
            ValueError: in training with `whole_groups`, a number of images that does not make whole groups.
        """
        config = self.config
        images = config.images_per_group or len(x_BTD)
        if not self.training:
            images = config.images_per_group or 1
        if not (self.training and self.whole_groups):
            # a plain model takes any batch, also a last one that is smaller: the largest groups that fit, down to
            # single images
            images = math.gcd(images, len(x_BTD))
        elif len(x_BTD) % images:
            raise ValueError(
                f"{len(x_BTD)} images do not make groups of images_per_group = {images}. Use a batch that is a "
                f"multiple of it, or images_per_group 1."
            )
        logits_GSE = self._logits(x_BTD).reshape(len(x_BTD) // images, -1, config.num_experts)
        slots = self._slots(tokens=logits_GSE.shape[1])
        noise_GSE = standard_normal(logits_GSE) if self.training and config.noise_std > 0 else None
        routing = route(logits_GSE, config, slots, noise_GSE, decided_in(out))
        if out is not None:
            out["routing"] = routing
            out["logits"] = logits_GSE.view(*x_BTD.shape[:2], -1)
        return routing, slots

    def _slots(self, tokens: int) -> int | None:
        """Places an expert has for a group of so many tokens; None = as many as are asked for."""
        config = self.config
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor is None:
            return None
        slots = capacity(tokens, config.num_experts, config.k, factor, config.capacity_multiple)
        return min(slots, tokens)  # an expert gets a token once: more slots would stay empty

    def _logits(self, x_BTD: Tensor) -> Tensor:
        # always float32: in bfloat16 close gates tie and tokens change expert
        with without_autocast(x_BTD.device.type):
            bias = None if self.router.bias is None else self.router.bias.float()
            return F.linear(x_BTD.float(), self.router.weight.float(), bias)


class MoE(Routed):
    """MLP of E experts of which every token visits K.

    Args:
        dim, hidden: D and H.
        config: routing, losses and dropout.
        act: "erf" or "tanh", the form of GELU, or "swiglu".
        layer, seed: the initial values of expert e depend on (seed, layer, e) and nothing else, so a model starts the
            same at every ep size.
    """

    def __init__(
        self, dim: int, hidden: int, config: MoEConfig, act: str = "erf", layer: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        if act not in LAYERS:
            raise ValueError(f"act {act!r} is not known; use one of {', '.join(LAYERS)}.")
        self.dim = dim
        self.hidden = hidden
        self.config = config
        self.act = act
        self.router = nn.Linear(dim, config.num_experts, bias=config.router_bias)
        self.experts = nn.ModuleList(new_expert(dim, hidden, act) for _ in range(config.num_experts))
        draw(self.router.weight, lecun_normal_, seed, layer, "router")
        if config.router_bias:
            nn.init.zeros_(self.router.bias)
        for e, expert in enumerate(self.experts):
            for name, linear in expert.items():
                draw(linear.weight, nn.init.xavier_uniform_, seed, layer, e, name, "weight")
                draw(linear.bias, nn.init.normal_, seed, layer, e, name, "bias", std=1e-6)

    def forward(self, x_BTD: Tensor, out: Out | None = None) -> Tensor:
        """(B, T, D) in and out; y = sum over the chosen experts k of weight_k x expert_k(x).

        What route_images tells is left in `out`.
        """
        routing, slots = self.route_images(x_BTD, out)
        number_1 = None
        if self.training and self.config.dropout:
            number_1 = draw_number(x_BTD)
        return mixture(self.experts, x_BTD, routing, slots, self.act, self.config.dropout, number_1, decided_in(out))


def mixture(
    experts: nn.ModuleList,
    x_BTD: Tensor,
    routing: Routing,
    slots: int | None,
    act: str,
    dropout: float = 0.0,
    number_1: Tensor | None = None,
    decided: Decided | None = None,
) -> Tensor:
    """y = sum over the chosen experts k of weight_k x expert_k(x), all experts being here; (B, T, D) in and out.

    Args:
        slots: places an expert has for each group, see route_images.
        number_1: that the masks of the experts' dropout are drawn from; None: no dropout.
        decided: see models.moe.routing.once.
    """
    form = form_of(x_BTD)
    multiple = row_multiple(x_BTD, form, routing.expert_GSK.numel(), len(experts))
    # only the loop, which runs on a CPU, reads from the device how many rows there are
    num_rows = None if form == LOOP else most_rows(routing, slots, multiple)
    rows = once(decided, "rows", lambda: dispatch(routing, slots, multiple, num_rows))
    masks = None
    if number_1 is not None:
        masks = ExpertDropout(dropout, number_1, rows.expert_R, rows.place_R)
    weight_NK = routing.weight_GSK.flatten(0, 1)
    return run_experts(experts, x_BTD.flatten(0, 1), rows, act, weight_NK, masks, form).view_as(x_BTD)


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


def routed_layers(model: nn.Module) -> dict[str, Routed]:
    """What routes in each MoE layer, under the layer's name in the plain model."""
    return {
        name.removesuffix(".deepspeed_moe.gate"): module
        for name, module in model.named_modules()
        if isinstance(module, Routed)
    }
