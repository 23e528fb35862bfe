"""Cluster-aware upcycling (Chu et al. 2026, arXiv 2604.13508): experts that each start in their own part of the data.

What reaches a dense MLP is clustered by direction, one cluster per expert. Each expert starts from the truncated SVD of
the dense weights that is best on its cluster's inputs, and the router's rows are the centroids. The paper's full text
was not at hand: that both matrices are cut, ENERGY and the router's scale are our choices, and its expert-ensemble
self-distillation loss is left out. N tokens, D width, H hidden width, E experts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.expert import LAYERS, activate
from ..moe.layer import MoE
from .kmeans import CHUNK, spherical_kmeans

# Share of the mean square of a layer's outputs, on its cluster, that the truncated weights keep. On the embedded
# digits, teacher at 93.9%, the student before any training: 0.9 -> 84%, 0.95 -> 89%, 0.99 -> 92%, 0.999 -> 94%.
ENERGY = 0.99


@dataclass(frozen=True)
class Clustered:
    """What became of one block, by expert."""

    tokens: list[int]  # in its cluster
    layers: tuple[str, ...]  # of an expert
    ranks: list[tuple[int, ...]]  # of those layers

    def __str__(self) -> str:
        parts = []
        for name, ranks in zip(self.layers, zip(*self.ranks)):
            parts.append(f"{min(ranks)}..{max(ranks)} ({name})")
        return f"clusters of {min(self.tokens)}..{max(self.tokens)} tokens, ranks {', '.join(parts)}"


@torch.no_grad()
def cluster_experts(moe: MoE, x_ND: Tensor, seed: int) -> Clustered:
    """Start the experts and the router of a block, in place, from the clusters of its inputs.

    Args:
        moe: its experts are copies of the dense MLP already.
        x_ND: what reaches the dense MLP, on the device to compute on; float32.
        seed: of the clustering.

    Raises:
        ValueError: tokens that do not fill a cluster for every expert; the empty clusters are named.
    """
    num_experts = len(moe.experts)
    centroid_ED, cluster_N = spherical_kmeans(x_ND, num_experts, seed=seed)
    tokens = torch.bincount(cluster_N, minlength=num_experts).tolist()
    layers = LAYERS[moe.act]
    *first, last = layers
    ranks = []
    for number, expert in enumerate(moe.experts):
        chunks = x_ND[cluster_N == number].split(CHUNK)
        cut = {last: truncated(expert[last].weight.to(x_ND), _inputs_of_last(moe.act, expert, chunks))}
        for name in first:
            cut[name] = truncated(expert[name].weight.to(x_ND), chunks)
        for name, (weight, _) in cut.items():
            expert[name].weight.copy_(weight)
        ranks.append(tuple(cut[name][1] for name in layers))
    start_router(moe, centroid_ED, x_ND)
    return Clustered(tokens, layers, ranks)


@torch.no_grad()
def start_router(moe: MoE, centroid_ED: Tensor, x_ND: Tensor) -> None:
    """Router rows from centroids: c_e / s, with s the mean over tokens of the deviation of x . c_e over the experts.

    A token's logits then spread like those of a fresh router, with standard deviation 1.
    """
    spreads = [(rows @ centroid_ED.T).std(1) for rows in x_ND.split(CHUNK)]
    moe.router.weight.copy_(centroid_ED / torch.cat(spreads).mean())
    if moe.router.bias is not None:
        moe.router.bias.zero_()


def _inputs_of_last(act: str, expert: nn.ModuleDict, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """What reaches the last layer of an MLP, chunk by chunk of its input."""
    for x in chunks:
        outputs = []
        for name in LAYERS[act][:-1]:
            outputs.append(F.linear(x, expert[name].weight.to(x), expert[name].bias.to(x)))
        yield activate(act, outputs)


def truncated(weight: Tensor, inputs: Iterable[Tensor]) -> tuple[Tensor, int]:
    """The matrix of least rank that keeps ENERGY of the mean square of W x over the inputs, and its rank.

    With C = mean x x^T = L L^T, the truncated SVD of W L, times L^-1 (Wang et al. 2024, SVD-LLM, arXiv 2403.12403), is
    U U^T W with U the leading left singular vectors of W L: the principal directions of the outputs W x. So neither L
    nor its inverse, which few tokens would make singular, is needed.

    Args:
        weight: W, (O, I).
        inputs: chunks of x, (n, I) each; read once.

    Returns:
        (the matrix (O, I), its rank).
    """
    # W = Q R where O > I: outputs then lie in the I columns of Q, and R x are their coordinates; else W itself
    basis = None
    reduced = weight
    if weight.shape[0] > weight.shape[1]:
        basis, reduced = torch.linalg.qr(weight)
    # sum of y y^T over the outputs y = R x, in float64
    moment = 0
    for x in inputs:
        y = (x @ reduced.T).double()
        moment = moment + y.T @ y
    # eigenvalues, rising: what each principal direction of the outputs holds of their square
    values, vectors = torch.linalg.eigh(moment)
    # share of the r largest ones in the whole, and the least r that reaches ENERGY
    share = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    rank = int((share < ENERGY).sum()) + 1
    assert rank <= len(values)  # the last share is 1
    # U U^T R with U the first r directions
    leading = vectors.flip(1)[:, :rank].to(weight)
    projected = leading @ (leading.T @ reduced)
    if basis is not None:
        projected = basis @ projected
    return projected, rank
