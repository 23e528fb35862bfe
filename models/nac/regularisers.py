"""What keeps the circuit open in training: repulsion of near signatures, and a stochastic block model of the mediators.

N modules, M mediators, S signature width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernel import Kernel, distance, link_probability


def hinge_repulsion(signatures_NS: Tensor, radius: float) -> Tensor:
    """-sum of d over the pairs i < j of all modules whose d is below `radius`."""
    d = distance(signatures_NS, signatures_NS)
    first, second = torch.triu_indices(len(d), len(d), offset=1, device=d.device)
    pairs = d[first, second]
    return -pairs[pairs < radius].sum()


def graphon(num_modules: int, clusters: int, p_in: float, p_out: float) -> Tensor:
    """Probability of every link in a planted partition, (M, M): p_in in the blocks of the diagonal, else p_out."""
    cluster = torch.arange(num_modules) // (num_modules // clusters)
    return torch.where(cluster[:, None] == cluster[None], p_in, p_out)


def block_model_loss(signatures_MS: Tensor, kernels: Sequence[Kernel], target_MM: Tensor) -> Tensor:
    """Sum over the kernels of the mean square between their links and the target, rows matched (Hungarian method).

    Only rows are permuted, as the m2mKD code does; the original NAC permutes columns as well.
    """
    d = distance(signatures_MS, signatures_MS)
    target = target_MM.to(d)
    loss = d.new_zeros(())
    for kernel in kernels:
        link = link_probability(d, kernel.bandwidth, kernel.truncation)
        loss = loss + (link[matched_rows(link, target)] - target).square().mean()
    return loss


@torch.no_grad()
def matched_rows(link_MM: Tensor, target_MM: Tensor) -> Tensor:
    """The row of `link` that stands for each row of `target`: least sum of mean squares.

    Raises:
        ValueError: scipy, which only this regulariser needs, is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ValueError("training with block_model_weight needs scipy: pip install scipy, or set it to 0.") from error
    # cost[i, j] = mean_k (target[i, k] - link[j, k])^2
    cost = (target_MM.unsqueeze(1) - link_MM.unsqueeze(0)).square().mean(-1)
    _, columns = linear_sum_assignment(cost.float().cpu().numpy())
    return torch.from_numpy(columns).to(link_MM.device)
