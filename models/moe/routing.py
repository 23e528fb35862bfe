"""V-MoE routing as pure functions: capacity, noisy top-k, queue slots with priority, auxiliary losses.

The formulas are those of google-research/vmoe (Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts").
G groups of tokens routed together, S tokens of a group, E experts, K experts chosen per token.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Decided = dict[str, Any]  # by name, what a forward decided without gradients: see `once`


@dataclass(frozen=True)
class RouterConfig:
    num_experts: int = 8
    k: int = 2  # experts a token is sent to
    renormalize: bool = True  # the K weights of a token sum to 1 (softmax after top-k); False: softmax before top-k
    noise_std: float = 0.0  # training noise on the logits has standard deviation noise_std / num_experts
    batch_priority: bool = False  # tokens with the largest gate queue first, else token order

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.num_experts:
            raise ValueError(f"k must lie between 1 and num_experts = {self.num_experts}, got {self.k}.")
        if self.noise_std < 0:
            raise ValueError(f"noise_std must not be negative, got {self.noise_std}; 0 turns the noise off.")


class Losses(Mapping[str, Tensor]):
    """Balance losses by name, each worked out when it is first asked for: one that nobody weighs costs nothing."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True)
class Choice:
    """What routing decides, without gradients."""

    expert_GSK: Tensor  # see Routing for all three
    slot_GSK: Tensor
    count_GE: Tensor


@dataclass(frozen=True)
class Routing:
    """Where the tokens of each group go; weights and losses carry gradients to the logits."""

    expert_GSK: Tensor  # int64, the chosen experts, best first (dropped choices keep theirs)
    slot_GSK: Tensor  # int64, position in that expert's queue of the group, -1 = dropped
    weight_GSK: Tensor  # combine weight, 0 where dropped
    losses: Mapping[
        str, Tensor
    ]  # importance, load, gshard: (G,) each; load is 0 without noise, where it is not defined
    count_GE: Tensor  # int64, choices that asked for each expert, dropped ones included
    gate_GS: Tensor  # sum of a token's K gates before renormalisation, detached
    config: RouterConfig  # that they were routed by; a layer's MoEConfig has the weights of the losses

    @property
    def kept(self) -> Tensor:
        """Share of the choices that found a slot, ()."""
        return (self.slot_GSK >= 0).float().mean()

    @property
    def load(self) -> Tensor:
        """Share of the choices that asked for each expert, (E,)."""
        return self.count_GE.sum(0) / self.expert_GSK.numel()

    @property
    def gate_sum(self) -> Tensor:
        """Mean over tokens of the sum of the K gates, (): 1 = the router is sure of its choices."""
        return self.gate_GS.mean()


def joined(routings: Sequence[Routing]) -> Routing:
    """The groups of several forwards of one layer as one group of all their tokens; losses stay one per group before.

    Slots are then places in the queue of the forward, and no longer of the joined group.
    """
    K = routings[0].expert_GSK.shape[-1]

    def tokens(name: str, width: int) -> Tensor:
        parts = [getattr(routing, name).reshape(-1, width) for routing in routings]
        return torch.cat(parts)[None]

    def loss(name: str) -> Tensor:
        return torch.cat([routing.losses[name] for routing in routings])

    counts = [routing.count_GE.sum(0, keepdim=True) for routing in routings]
    return Routing(
        expert_GSK=tokens("expert_GSK", K),
        slot_GSK=tokens("slot_GSK", K),
        weight_GSK=tokens("weight_GSK", K),
        losses=Losses({name: partial(loss, name) for name in routings[0].losses}),
        count_GE=torch.stack(counts).sum(0),
        gate_GS=tokens("gate_GS", 1)[..., 0],
        config=routings[0].config,
    )


def capacity(
    tokens_per_group: int,
    num_experts: int,
    k: int,
    factor: float,
    multiple_of: int = 4,
    rounding: str = "ceil",
) -> int:
    """Slots each expert has for one group: tokens * k * factor / experts, rounded, then up to a multiple.

    Raises:
        ValueError: fewer than one slot before the multiple is applied, or an unknown rounding.
    """
    if rounding not in ("ceil", "round"):
        raise ValueError(f"rounding {rounding!r} is not known; use 'ceil' or 'round'.")
    exact = tokens_per_group * k * factor / num_experts
    slots = math.ceil(exact) if rounding == "ceil" else round(exact)
    if slots < 1:
        raise ValueError(
            f"capacity factor {factor} leaves {exact:.3g} slots per expert for {tokens_per_group} tokens, k = {k} and "
            f"{num_experts} experts; at least 1 is needed. Raise the capacity factor or put more images in a group."
        )
    return math.ceil(slots / multiple_of) * multiple_of


def route(
    logits_GSE: Tensor,
    config: RouterConfig,
    capacity: int | None = None,
    noise_GSE: Tensor | None = None,
    decided: Decided | None = None,
) -> Routing:
    """Send every token to its top K experts; differentiable in the logits.

    Args:
        logits_GSE: router outputs; computed in float32 whatever their dtype.
        config: see RouterConfig.
        capacity: slots an expert has per group; choices beyond are dropped. None: nothing is dropped.
        noise_GSE: standard normal draws, scaled here; None: no noise (evaluation).
        decided: of an earlier forward of the same tokens, or where this one's choice is kept; see `once`.

    Raises:
        ValueError: logits of another number of experts, a capacity below 1, noise for a config without noise.
    """
    if logits_GSE.ndim != 3 or logits_GSE.shape[-1] != config.num_experts:
        raise ValueError(f"logits must be (groups, tokens, {config.num_experts}), got {tuple(logits_GSE.shape)}.")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}; None means that nothing is dropped.")
    if noise_GSE is not None and config.noise_std == 0:
        raise ValueError("noise was given but noise_std is 0: set noise_std above 0, or leave the noise out.")
    logits_GSE = logits_GSE.float()
    sigma = config.noise_std / config.num_experts
    noisy_GSE = logits_GSE if noise_GSE is None else logits_GSE + sigma * noise_GSE.float()
    gates_GSE = noisy_GSE.softmax(-1)
    choice = once(decided, "choice", lambda: _choose(gates_GSE.detach(), noisy_GSE.detach(), config, capacity))
    expert_GSK = choice.expert_GSK
    gate_GSK = gates_GSE.gather(-1, expert_GSK)
    weight_GSK = gate_GSK
    if config.renormalize:
        # gate / sum of the K gates = softmax over the K chosen logits
        weight_GSK = noisy_GSE.gather(-1, expert_GSK).softmax(-1)
    if capacity is not None:
        weight_GSK = weight_GSK.where(choice.slot_GSK >= 0, 0.0)

    def importance() -> Tensor:
        # importance of an expert = sum of its clean gates over the tokens
        clean_gates_GSE = gates_GSE if noise_GSE is None else logits_GSE.softmax(-1)
        return squared_variation(clean_gates_GSE.sum(1))

    def load() -> Tensor:
        if noise_GSE is None:
            return logits_GSE.new_zeros(len(logits_GSE))
        threshold_GS1 = noisy_GSE.gather(-1, expert_GSK[..., -1:])
        return _load_loss(logits_GSE, threshold_GS1, sigma)

    def gshard() -> Tensor:
        return _gshard_loss(gates_GSE, expert_GSK)

    losses = Losses({"importance": importance, "load": load, "gshard": gshard})
    gate_GS = gate_GSK.detach().sum(-1)
    return Routing(expert_GSK, choice.slot_GSK, weight_GSK, losses, choice.count_GE, gate_GS, config)


def once(decided: Decided | None, name: str, make: Callable[[], Any]) -> Any:
    """What `make` decides without gradients; where a block is computed again in backward, what it decided before.

    A kernel that adds up in another order the second time could send a token elsewhere than its gradient belongs. And
    neither sorting nor the exchange of sizes between ranks is done again.
    """
    if decided is None:
        return make()
    if name not in decided:
        decided[name] = make()
    return decided[name]


def _choose(gates_GSE: Tensor, noisy_GSE: Tensor, config: RouterConfig, capacity: int | None) -> Choice:
    """The K experts of the largest gates, and each choice's place in its expert's queue; both without gradients."""
    expert_GSK = _largest(gates_GSE, config.k)
    priority_GS = None
    if config.batch_priority:
        # float32 softmax is off by a rounding or two: tokens that are equally sure would not tie
        priority_GS = noisy_GSE.double().softmax(-1).amax(-1).float()
    slot_GSK, count_GE = _queue(expert_GSK, config.num_experts, priority_GS)
    if capacity is not None:
        # who stands behind the last slot is dropped: no slot, weight 0
        slot_GSK = slot_GSK.where(slot_GSK < capacity, -1)
    return Choice(expert_GSK, slot_GSK, count_GE)


def squared_variation(x_GE: Tensor) -> Tensor:
    """Squared coefficient of variation over experts, (G,).

    var / mean^2 rather than (std / mean)^2, whose gradient is NaN when all experts are equal.
    """
    return x_GE.var(-1, correction=0) / x_GE.mean(-1).square()


def _largest(gates_GSE: Tensor, k: int) -> Tensor:
    """The experts of the k largest gates, (G, S, k), the lowest number first among equals.

    One maximum after the other: torch.topk does not promise the lowest number, and a stable sort of 64 gates took ten
    times as long.
    """
    chosen = []
    for _ in range(k):
        best_GS1 = gates_GSE.argmax(-1, keepdim=True)
        chosen.append(best_GS1)
        gates_GSE = gates_GSE.scatter(-1, best_GS1, -torch.inf)
    return torch.cat(chosen, -1)


def _queue(expert_GSK: Tensor, num_experts: int, priority_GS: Tensor | None) -> tuple[Tensor, Tensor]:
    """Position of every choice in its expert's queue, and the queues' lengths (G, E).

    All first choices come before all second ones; inside a choice the order is priority (largest first, ties in token
    order) or token order.
    """
    G, S, K = expert_GSK.shape
    queued_GSK = expert_GSK
    if priority_GS is not None:
        order_GSK = priority_GS.argsort(dim=1, descending=True, stable=True).unsqueeze(-1).expand(G, S, K)
        queued_GSK = expert_GSK.gather(1, order_GSK)
    # all first choices, then all second ones, ...
    asked_GN = queued_GSK.transpose(1, 2).reshape(G, K * S)
    # a stable sort by expert lays the queues behind each other; position = place - start of the expert's queue
    sorted_GN, place_GN = asked_GN.sort(dim=1, stable=True)
    count_GE = asked_GN.new_zeros(G, num_experts).scatter_add(1, asked_GN, torch.ones_like(asked_GN))
    end_GE = count_GE.cumsum(1)
    places_N = torch.arange(K * S, device=asked_GN.device)
    position_GN = places_N - (end_GE - count_GE).gather(1, sorted_GN)
    position_GN = torch.empty_like(position_GN).scatter_(1, place_GN, position_GN)
    position_GSK = position_GN.view(G, K, S).transpose(1, 2)
    if priority_GS is not None:  # back from the order of the queue to that of the tokens
        position_GSK = torch.empty_like(position_GSK).scatter_(1, order_GSK, position_GSK)
    return position_GSK, count_GE


def _load_loss(logits_GSE: Tensor, threshold_GS1: Tensor, sigma: float) -> Tensor:
    """Squared variation of the chance that fresh noise would put each expert at or above the K-th noisy logit."""
    # P(logit + sigma n >= threshold) = 1 - Phi((threshold - logit) / sigma)
    chance_GSE = 1 - torch.special.ndtr((threshold_GS1 - logits_GSE) / sigma)
    return squared_variation(chance_GSE.mean(1))


def _gshard_loss(gates_GSE: Tensor, expert_GSK: Tensor) -> Tensor:
    """GShard's balance loss (Lepikhin et al. 2020) on the first choices: E^2 mean_e(share chosen * mean gate)."""
    num_experts = gates_GSE.shape[-1]
    first_GSE = F.one_hot(expert_GSK[..., 0], num_experts).to(gates_GSE.dtype)
    return num_experts**2 * (first_GSE.mean(1) * gates_GSE.mean(1)).mean(-1)
