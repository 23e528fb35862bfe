"""A module of experts put together from dense modules that were trained apart, one per expert.

Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816): expert e of every MoE block is the MLP of dense module e,
everything else is the mean over the dense modules. Unlike there, the routers do not start from noise: their rows are
the mean inputs of each expert's own tokens. B images, T tokens, N = B * T, D width, E experts, S scales.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.dispatch import by_expert
from ..moe.grouped import form_of, row_multiple, run_experts
from ..moe.layer import MoE
from ..moe.out import Out

Watch = Callable[[str, Tensor, Tensor], None]  # name of a layer, its input (N, D), cluster of every token (N,)
SCALES_S = torch.logspace(-2, 2, 41)  # tried for the length of router rows; neighbours differ by a quarter
SECOND = 0.9  # length of a stand-in's router row beside the one it copies, so that it comes second


def merged_state(
    state: Mapping[str, Tensor], dense: Sequence[Mapping[str, Tensor] | None], source: Sequence[int]
) -> dict[str, Tensor]:
    """The state dict of the module of experts; routers are left as they are.

    Args:
        state: of the module to fill, for names, types and routers.
        dense: state dict of every dense module; None where nothing was trained, which no mean then counts.
        source: for every expert, the dense module whose MLPs it takes: its own where that was trained.

    Raises:
        ValueError: nothing was trained at all.
    """
    trained = [each for each in dense if each is not None]
    if not trained:
        raise ValueError(f"none of the {len(dense)} experts was trained, so there is nothing to put together.")
    merged = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*\.mlp)\.experts\.(\d+)\.(.+)", name)
        if match:
            mlp, expert, rest = match.groups()
            merged[name] = dense[source[int(expert)]][f"{mlp}.{rest}"]
        elif ".mlp.router." in name:
            merged[name] = value
        else:
            values = torch.stack([each[name].double() for each in trained])
            merged[name] = values.mean(0).to(value.dtype)
    return merged


def stand_ins(centroid_ED: Tensor, present: Sequence[bool]) -> list[int]:
    """For every cluster itself where it is present, else the one with the nearest centroid (cosine) that is."""
    unit_ED = F.normalize(centroid_ED.float(), dim=1)
    present_E = torch.tensor(present, device=unit_ED.device)
    # below any cosine where a cluster is not present
    cosine_EE = (unit_ED @ unit_ED.T).masked_fill(~present_E, -2.0)
    nearest_E = cosine_EE.argmax(1).tolist()
    source = list(range(len(present)))
    for e, is_present in enumerate(present):
        if not is_present:
            source[e] = nearest_E[e]
    return source


def router_rows(sum_ED: Tensor, count_E: Tensor, source: Sequence[int]) -> Tensor:
    """Rows (E, D) of a router that sends a token to the cluster whose mean input points most nearly its way.

    Unit vectors along each cluster's mean, less the mean of those: what all rows share moves every logit alike, so
    taking it out changes no gate. A cluster without tokens takes the row of its stand-in at SECOND of its length.

    Args:
        sum_ED, count_E: sum of the inputs of each cluster's tokens, and their number.
        source: as from stand_ins, by whether a cluster has tokens.
    """
    with_tokens = [e for e, other in enumerate(source) if e == other]
    # u_e = mean input of cluster e at length 1; row_e = u_e - mean u
    unit_ED = F.normalize(sum_ED / count_E.clamp(min=1).unsqueeze(1), dim=1)
    row_ED = unit_ED - unit_ED[with_tokens].mean(0)
    rows = []
    for e, other in enumerate(source):
        length = 1.0 if e == other else SECOND
        rows.append(row_ED[other] * length)
    return torch.stack(rows)


def top_gates(x_ND: Tensor, row_ED: Tensor) -> Tensor:
    """Sum over tokens of the largest gate, for the rows at each length of SCALES_S, (S,)."""
    logit_NE = x_ND.float() @ row_ED.T.float()
    sums = []
    for scale in SCALES_S.tolist():
        largest_N = (scale * logit_NE).softmax(-1).amax(-1)
        sums.append(largest_N.double().sum())
    return torch.stack(sums)


def decided_scale(top_gate_S: Tensor, num_experts: int) -> float:
    """The factor on router rows at which the mean largest gate is half-way between 1/E (undecided) and 1 (saturated).

    The largest gate of a token grows with the factor, so there is one such point; between two factors that were tried
    it is interpolated. It is the end of SCALES_S that comes nearest where none of them reaches it.

    Args:
        top_gate_S: mean over tokens of the largest gate, at each of SCALES_S.
    """
    half_way = (1 + 1 / num_experts) / 2
    above = int((top_gate_S < half_way).sum())  # the first one that is sure enough
    if above == 0:
        return float(SCALES_S[0])
    if above == len(SCALES_S):
        return float(SCALES_S[-1])
    # scale = s_below^(1 - t) s_above^t with gate_below + t (gate_above - gate_below) = half_way
    low, high = top_gate_S[above - 1 : above + 1].tolist()
    share = (half_way - low) / (high - low)
    return float(SCALES_S[above - 1] ** (1 - share) * SCALES_S[above] ** share)


class ByCluster:
    """Runs a module of experts with every token sent to the expert of its own cluster, whatever the routers say.

    So all routers can be made in one pass: what a block is fed does not depend on the routers before it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).eval()
        self.layers: dict[str, _Layer] = {}
        for parent_name, parent in list(self.module.named_modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, MoE):
                    layer = _Layer(child)
                    self.layers[f"{parent_name}.{name}"] = layer
                    setattr(parent, name, layer)

    @torch.no_grad()
    def __call__(self, x: Tensor, cluster_BT: Tensor, watch: Watch) -> None:
        """One batch; `watch` sees every MoE layer's input.

        Args:
            x: what the module is fed, images or (B, T, width of its input).
        """
        cluster_N = cluster_BT.flatten()
        for name, layer in self.layers.items():
            layer.prepare(cluster_N, lambda x_ND, name=name: watch(name, x_ND, cluster_N))
        self.module(x)


class _Layer(nn.Module):
    """An MoE layer's experts behind a fixed assignment of the tokens of the next batch."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.experts = moe.experts
        self.act = moe.act

    def prepare(self, cluster_N: Tensor, watch: Callable[[Tensor], None]) -> None:
        self.cluster_N = cluster_N
        self.watch = watch

    def forward(self, x_BTD: Tensor, out: Out | None = None) -> Tensor:
        """(B, T, D) in and out; nothing is routed, so `out` stays as it is."""
        x_ND = x_BTD.flatten(0, 1)
        self.watch(x_ND)
        multiple = row_multiple(x_ND, form_of(x_ND), len(x_ND), len(self.experts))
        rows = by_expert(self.cluster_N, len(self.experts), multiple)
        return run_experts(self.experts, x_ND, rows, self.act).view_as(x_BTD)
