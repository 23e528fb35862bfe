"""Spherical k-means: points grouped by direction, for experts that each take a region of the feature space.

Dhillon and Modha 2001, "Concept Decompositions for Large Sparse Text Data Using Clustering"; seeding as in k-means++
(Arthur and Vassilvitskii 2007). N points, D width, K clusters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 65_536  # points compared with all centroids at once: bounds memory, changes nothing
SAME = 1e-5  # 1 - cosine of two float32 points that count as one direction


@torch.no_grad()
def spherical_kmeans(x_ND: Tensor, k: int, *, seed: int, iterations: int = 25) -> tuple[Tensor, Tensor]:
    """Cluster points by cosine; the same for the same points and seed.

    Every point is nearest to its own cluster's centroid. A cluster that loses all its points starts again from the
    point that fits its own centroid worst.

    Args:
        x_ND: points of any length, any float type; none may be zero or not finite.
        k: clusters.
        iterations: at most; it stops as soon as no point changes its cluster.

    Returns:
        (centroids (K, D): float32 rows of length 1, cluster of every point (N,): int64).

    Raises:
        ValueError: fewer points or directions than clusters, points without a direction, or iterations below 1.
    """
    x_ND = _directions(x_ND, k, iterations)
    centroid_KD = _seeds(x_ND, k, seed)
    cluster_N = None
    for _ in range(iterations):
        last_cluster_N = cluster_N
        # cluster of point n = argmax_k x_n . c_k
        centroid_KD, cluster_N = _assign(x_ND, centroid_KD)
        if last_cluster_N is not None and torch.equal(cluster_N, last_cluster_N):
            return centroid_KD, cluster_N
        # c_k = s_k / |s_k| with s_k the sum of the cluster's points; in float64, so that chunks change nothing
        total_KD = torch.zeros(k, x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
        for rows, clusters in zip(x_ND.split(CHUNK), cluster_N.split(CHUNK)):
            total_KD.index_add_(0, clusters, rows.double())
        # points that cancel out (opposite ones) have no mean direction: their centroid stays where it was
        lost_K1 = total_KD.norm(dim=1, keepdim=True) < 1e-9
        centroid_KD = F.normalize(torch.where(lost_K1, centroid_KD.double(), total_KD), dim=1).float()
    return _assign(x_ND, centroid_KD)


def nearest(x_ND: Tensor, centroid_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster of every point (N,), the first one where several are as near, and its cosine (N,).

    Args:
        x_ND, centroid_KD: rows of length 1, so that their products are cosines.
    """
    clusters = []
    cosines = []
    for rows in x_ND.split(CHUNK):
        best = (rows @ centroid_KD.T).max(1)
        clusters.append(best.indices)
        cosines.append(best.values)
    return torch.cat(clusters), torch.cat(cosines)


def _directions(x_ND: Tensor, k: int, iterations: int) -> Tensor:
    """The points at length 1, in float32, once they can be clustered."""
    if x_ND.ndim != 2 or not x_ND.is_floating_point():
        raise ValueError(f"expected float points (N, D) to cluster, got {x_ND.dtype} {tuple(x_ND.shape)}.")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected 1 or more.")
    if not 1 <= k <= len(x_ND):
        raise ValueError(f"{len(x_ND)} points cannot make {k} clusters: give 1 to {len(x_ND)} clusters or more points.")
    length_N = x_ND.float().norm(dim=1)
    without_direction_N = ~length_N.isfinite() | (length_N == 0)
    bad = int(without_direction_N.sum())
    if bad:
        raise ValueError(f"{bad} of {len(x_ND)} points to cluster are zero or not finite: they have no direction.")
    return x_ND.float() / length_N.unsqueeze(1)


def _seeds(x_ND: Tensor, k: int, seed: int) -> Tensor:
    """First centroids (K, D): points drawn one by one, each with a chance of 1 - cosine to the nearest one before."""
    num_points = len(x_ND)
    generator = torch.Generator().manual_seed(seed)
    draws_K = torch.rand(k, generator=generator, dtype=torch.float64).tolist()  # on the CPU: the same on every device
    chosen = [int(draws_K[0] * num_points)]
    distance_N = torch.full((num_points,), float("inf"), dtype=torch.float64, device=x_ND.device)
    for draw in draws_K[1:]:
        # distance to the nearest chosen point: d_n = min(d_n, 1 - x_n . x_last)
        to_last_N = (1 - x_ND @ x_ND[chosen[-1]]).double().clamp(min=0)
        distance_N = torch.minimum(distance_N, to_last_N)
        # weights of the draw, summed up; a point already there is not drawn again
        reach_N = torch.where(distance_N < SAME, 0, distance_N).cumsum(0)
        if reach_N[-1] <= 0:
            raise _too_few(x_ND, k, range(len(chosen), k))
        # point n is drawn when draw * total lies in its stretch, reach_{n-1} <= draw * total < reach_n
        drawn = torch.searchsorted(reach_N, draw * reach_N[-1], right=True)
        chosen.append(int(drawn.clamp(max=num_points - 1)))
    return x_ND[chosen]


def _assign(x_ND: Tensor, centroid_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Every point to its nearest centroid, after moving centroids nobody is near to the worst-fitting points."""
    k = len(centroid_KD)
    for _ in range(k + 1):  # a centroid moved onto a point keeps that point, so each round settles one or more
        cluster_N, cosine_N = nearest(x_ND, centroid_KD)
        points_K = torch.bincount(cluster_N, minlength=k)
        empty = (points_K == 0).nonzero().flatten()
        if not len(empty):
            return centroid_KD, cluster_N
        # the points of smallest cosine to their centroid, as many as there are empty clusters
        worst = cosine_N.topk(min(len(empty), len(cosine_N)), largest=False)
        # a point that lies on its centroid already would only empty that cluster
        movable = worst.indices[1 - worst.values > SAME]
        if not len(movable):
            break
        centroid_KD = centroid_KD.clone()
        centroid_KD[empty[: len(movable)]] = x_ND[movable]
    raise _too_few(x_ND, k, empty.tolist())


def _too_few(x_ND: Tensor, k: int, empty: range | list[int]) -> ValueError:
    names = ", ".join(map(str, empty[:10]))
    if len(empty) > 10:
        names += ", ..."
    return ValueError(
        f"{len(x_ND)} points do not fill {k} clusters: clusters {names} stay empty, because too few points differ in "
        f"direction. Cluster more images, or use fewer experts."
    )
