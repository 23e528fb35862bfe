"""What a forward tells beside its output: a nested dict `out` that the caller passes and the modules fill.

    out = {}
    logits = model(images, out)
    loss = cross_entropy(logits, labels) + auxiliary_loss(out)

The keys are the names of the parts on the way down, at every ep size: out["blocks"]["3"]["mlp"] is what layer
blocks.3.mlp tells, its "routing" and the clean "logits" of its router. out["blocks"]["3"]["state"] is what block 3 put
out, where the caller asked for it. No module keeps anything of a forward: who drops `out` lets go of all of it, the
graph of the losses included. One key goes the other way: into "decided" of an MoE layer goes what it decides, and where
an earlier forward has filled it, the layer takes that (models.moe.routing.once).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .routing import Decided, Routing

Out = dict[str, Any]


def inside(out: Out | None, *names: str) -> Out | None:
    """The dict for a part, by its name in the module around it; None where nobody asks."""
    if out is None:
        return None
    for name in names:
        out = out.setdefault(name, {})
    return out


def decided_in(out: Out | None) -> Decided | None:
    """What an MoE layer keeps its decisions in, where its block is computed again in backward; else None."""
    return None if out is None else out.get("decided")


def by_layer(out: Mapping[str, Any], what: str, layer: str = "") -> dict[str, Any]:
    """Every `what` in `out` under the name of the layer in the plain model that told it, in network order."""
    named: dict[str, Any] = {}
    for name, told in out.items():
        if name == what:
            named[layer] = told
        elif isinstance(told, Mapping):
            named |= by_layer(told, what, f"{layer}.{name}".removeprefix("."))
    return named


def routings(out: Mapping[str, Any]) -> dict[str, Routing]:
    """The Routing of every MoE layer that ran, by the layer's name."""
    return by_layer(out, "routing")


def auxiliary_loss(out: Mapping[str, Any]) -> Tensor:
    """What a model adds to its loss on its own account; 0 where nothing does.

    Of the MoE layers that ran: sum over layers and losses of weight x mean_g(loss_g), a mean over groups; the weights
    are those of each layer's MoEConfig. And "regularisers", a dict of losses that come with their weights.
    """
    total = torch.zeros(())
    for losses in by_layer(out, "regularisers").values():
        for loss in losses.values():
            total = total.to(loss.device) + loss
    for routing in routings(out).values():
        config = routing.config
        weights = {"importance": config.importance_weight, "load": config.load_weight, "gshard": config.gshard_weight}
        for name, weight in weights.items():
            if weight:
                loss_G = routing.losses[name]
                total = total.to(loss_G.device) + weight * loss_G.mean()
    return total


def routing_metrics(out: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Per MoE layer that ran: share of choices kept (), share of choices per expert (E,), mean sum of the K gates ().

    Tensors stay on their device, so that nothing waits for it.
    """
    return {
        layer: {"kept": routing.kept, "load": routing.load, "gate_sum": routing.gate_sum}
        for layer, routing in routings(out).items()
    }
