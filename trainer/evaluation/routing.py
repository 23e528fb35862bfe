"""What the evaluations of a phase tell of its routers and experts: load, how many tokens changed expert, similarity.

B images of a batch, T tokens of an image, K experts chosen per token, best first; L MoE layers, E experts.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.moe.layer import routed_layers
from models.moe.out import Out, routings
from models.moe.routing import Routing
from models.moe.similarity import expert_similarity
from trainer.data.loader import Batch
from trainer.distributed.ranks import Dist

TOKENS = 32_768  # compared between two evaluations, at most, over all ranks: standard error 0.3 points at worst


class Choices:
    """Counts which experts the tokens of one evaluation choose, on the device.

    Args:
        num_experts: of every layer, by its name.
    """

    def __init__(self, num_experts: Mapping[str, int], device: torch.device) -> None:
        self.layers = list(num_experts)
        largest = max(num_experts.values(), default=0)
        # choices of every rank (K per token), and first choices alone
        self.asked_LE, self.first_LE = torch.zeros(2, len(self.layers), largest, dtype=torch.int64, device=device)
        self.kept_L = torch.zeros(len(self.layers), dtype=torch.int64, device=device)  # choices that found a slot

    def add(self, real_B: Tensor, routed: Mapping[str, Routing]) -> None:
        """Count the images of a forward that are real; `routed` is the Routing of every layer."""
        experts = self.asked_LE.shape[1]
        for number, layer in enumerate(self.layers):
            expert_BTK, kept_BTK = per_image(routed[layer], len(real_B))
            expert_BTK = expert_BTK[real_B]
            self.asked_LE[number] += torch.bincount(expert_BTK.flatten(), minlength=experts)
            self.first_LE[number] += torch.bincount(expert_BTK[..., 0].flatten(), minlength=experts)
            self.kept_L[number] += kept_BTK[real_B].sum()

    def summary(self, dist: Dist) -> dict[str, dict[str, Any]]:
        """Per layer "load" (share of the choices per expert), "first" (of the first choices), "kept" (collective)."""
        asked_LE = dist.sum(self.asked_LE.double()).cpu()
        first_LE = dist.sum(self.first_LE.double()).cpu()
        kept_L = dist.sum(self.kept_L.double()).cpu()
        layers = {}
        for name, asked_E, first_E, kept in zip(self.layers, asked_LE, first_LE, kept_L):
            layers[name] = {"load": _shares(asked_E), "first": _shares(first_E), "kept": float(kept / asked_E.sum())}
        return layers


def per_image(routing: Routing, images: int) -> tuple[Tensor, Tensor]:
    """Expert of every choice and whether it found a slot, (B, T, K): groups hold whole images, in order."""
    K = routing.expert_GSK.shape[-1]
    kept_GSK = routing.slot_GSK >= 0
    return routing.expert_GSK.reshape(images, -1, K), kept_GSK.reshape(images, -1, K)


@dataclass(frozen=True)
class Measures:
    """Of one evaluation; all empty without MoE layers."""

    means: dict[str, float] = field(default_factory=dict)  # over the layers: routing_change, expert_similarity
    per_layer: dict[str, float] = field(default_factory=dict)  # the same with /<layer> behind the name
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # as from Choices.summary


class RoutingWatch:
    """Watches the evaluations of a phase: `observe` every batch of this rank, then `take` on all ranks.

    routing_change is the share of tokens whose first choice differs from that of the evaluation before, so the first
    evaluation has none. Compared are the tokens of images spread evenly over the split, TOKENS of them at most; each
    rank compares those it has evaluated both times.

    Args:
        module: what is evaluated, plain or expert parallel.
        images: of the validation split.
    """

    def __init__(self, module: nn.Module, images: int, dist: Dist) -> None:
        self.module = module
        self.images = images
        self.dist = dist
        self.num_experts = {name: layer.config.num_experts for name, layer in routed_layers(module).items()}
        self.before: dict[int, np.ndarray] = {}  # first choices (L, T) of the evaluation before, by image
        self._begin()

    def observe(self, batch: Batch, logits: Tensor, out: Out) -> None:
        """Look at the routing of one batch; logits (B, classes), or whatever has a row for every image."""
        if not self.num_experts:
            return
        routed = routings(out)
        self.choices.add(batch.mask.to(logits.device), routed)
        firsts = []
        for layer in self.num_experts:
            expert_BTK, _ = per_image(routed[layer], len(logits))
            firsts.append(expert_BTK[..., 0])
        first_LBT = torch.stack(firsts)
        # every so-many-th image, so that at most TOKENS are kept: images x tokens / TOKENS, rounded up
        apart = max(1, -(-self.images * first_LBT.shape[2] // TOKENS))
        rows = [row for row, index in enumerate(batch.index.tolist()) if index >= 0 and index % apart == 0]
        if not rows:
            return
        first_BLT = first_LBT[:, rows].transpose(0, 1).cpu().numpy().astype(self._dtype())
        for row, first_LT in zip(rows, first_BLT):
            self.now[int(batch.index[row])] = first_LT

    def take(self) -> Measures:
        """The measures of the evaluation that has just ended, the same on every rank (collective)."""
        if not self.num_experts:
            return Measures()
        measured = {"expert_similarity": expert_similarity(self.module)}
        changed = self._changed()
        if changed is not None:
            measured["routing_change"] = changed
        layers = self.choices.summary(self.dist)
        self.before = self.now
        self._begin()
        means = {}
        per_layer = {}
        for name, values in measured.items():
            if values:
                means[name] = sum(values.values()) / len(values)
            for layer, value in values.items():
                per_layer[f"{name}/{layer}"] = value
        return Measures(means, per_layer, layers)

    def state(self) -> dict[str, Any]:
        """JSON values of this rank for a checkpoint."""
        if not self.before:
            return {}
        tokens = [first_LT.shape[1] for first_LT in self.before.values()]  # images may be of different sizes
        packed = zlib.compress(np.concatenate(list(self.before.values()), axis=1).tobytes())
        return {"images": list(self.before), "tokens": tokens, "first": base64.b64encode(packed).decode()}

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Put back what state() returned on every rank then: at another number of ranks the images change hands."""
        self.before = {}
        for state in states:
            if "tokens" not in state:  # nothing, or in the form of an older version
                continue
            values = np.frombuffer(zlib.decompress(base64.b64decode(state["first"])), dtype=self._dtype())
            all_LT = values.reshape(len(self.num_experts), sum(state["tokens"]))
            ends = np.cumsum(state["tokens"])[:-1]
            self.before |= dict(zip(state["images"], np.split(all_LT, ends, axis=1)))

    def _changed(self) -> dict[str, float] | None:
        """Per layer, the share of tokens that changed; None without an evaluation before (collective)."""
        # of every layer, and last the number of tokens
        counts = torch.zeros(len(self.num_experts) + 1, dtype=torch.float64, device=self.dist.device)
        for index in self.now.keys() & self.before.keys():
            now_LT = self.now[index]
            before_LT = self.before[index]
            if now_LT.shape == before_LT.shape:
                differ_L = (now_LT != before_LT).sum(1)
                counts += torch.tensor([*differ_L.tolist(), now_LT.shape[1]], device=self.dist.device)
        *changed, tokens = self.dist.sum(counts).tolist()
        if not tokens:
            return None
        return {name: count / tokens for name, count in zip(self.num_experts, changed)}

    def _begin(self) -> None:
        self.now: dict[int, np.ndarray] = {}
        self.choices = Choices(self.num_experts, self.dist.device)

    def _dtype(self) -> np.dtype:
        """The smallest that holds an expert's number."""
        return np.min_scalar_type(max(self.choices.first_LE.shape[1] - 1, 0))


def _shares(counts_E: Tensor) -> list[float]:
    shares_E = counts_E / counts_E.sum()
    return [float(f"{share:.6g}") for share in shares_E.tolist()]
