"""Spherical k-means against hand-worked points and the properties that define it."""

import pytest
import torch
import torch.nn.functional as F

from models.experts import kmeans
from models.experts.kmeans import spherical_kmeans


def bunches(k, each, width, seed=0, spread=0.05):
    """k well separated directions with `each` points around each, of lengths from 1 to 10; and their true cluster."""
    generator = torch.Generator().manual_seed(seed)
    centre_KD = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:k]
    truth = torch.arange(k).repeat_interleave(each)
    x = centre_KD[truth] + spread * torch.randn(k * each, width, generator=generator) / width**0.5
    return x * (1 + 9 * torch.rand(k * each, 1, generator=generator)), truth


def test_hand_worked():
    # two directions, along x and along y; lengths say nothing
    x = torch.tensor([[1.0, 0.1], [100.0, -10.0], [0.1, 1.0], [-3.0, 30.0]])
    centroids, cluster = spherical_kmeans(x, 2, seed=0)
    assert cluster[0] == cluster[1] != cluster[2] == cluster[3]
    # (1, .1) / |.| and (100, -10) / |.| mirror each other at the x axis, so their mean direction is the axis
    torch.testing.assert_close(centroids[cluster[0]], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(centroids[cluster[2]], torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("seed", range(5))
def test_separated_bunches_are_found(seed):
    x, truth = bunches(6, 40, 16, seed)
    centroids, cluster = spherical_kmeans(x.bfloat16(), 6, seed=seed)
    assert all(len(cluster[truth == t].unique()) == 1 for t in range(6)) and len(cluster.unique()) == 6
    assert centroids.dtype == torch.float32 and cluster.dtype == torch.int64


def test_a_fixed_point_of_the_algorithm():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    centroids, cluster = spherical_kmeans(x, 7, seed=3, iterations=200)
    unit = F.normalize(x, dim=1)
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(7))
    assert torch.equal(cluster, (unit @ centroids.T).argmax(1))
    means = torch.stack([F.normalize(unit[cluster == k].sum(0), dim=0) for k in range(7)])
    torch.testing.assert_close(centroids, means)


def test_deterministic_per_seed_in_any_chunks(monkeypatch):
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    first = spherical_kmeans(x, 5, seed=3, iterations=4)
    monkeypatch.setattr(kmeans, "CHUNK", 77)
    again = spherical_kmeans(x, 5, seed=3, iterations=4)
    assert torch.equal(first[1], again[1])
    torch.testing.assert_close(first[0], again[0])
    assert not torch.equal(first[0], spherical_kmeans(x, 5, seed=4, iterations=4)[0])


def test_an_empty_cluster_restarts_from_the_worst_point(monkeypatch):
    x, truth = bunches(3, 20, 8)
    unit = F.normalize(x, dim=1)
    # seeds in bunches 0 and 1, the third a copy of the first: it starts without points, and bunch 2 fits worst
    monkeypatch.setattr(kmeans, "_seeds", lambda *_: torch.stack([unit[0], unit[20], unit[0]]))
    _, cluster = spherical_kmeans(x, 3, seed=0)
    assert all(len(cluster[truth == t].unique()) == 1 for t in range(3)) and len(cluster.unique()) == 3


def test_refusals():
    x = torch.randn(6, 4)
    with pytest.raises(ValueError, match="6 points cannot make 7 clusters"):
        spherical_kmeans(x, 7, seed=0)
    with pytest.raises(ValueError, match="iterations is 0"):
        spherical_kmeans(x, 2, seed=0, iterations=0)
    with pytest.raises(ValueError, match=r"expected float points \(N, D\)"):
        spherical_kmeans(x[0], 2, seed=0)
    same = torch.tensor([[1.0, 2.0]]).repeat(5, 1) * torch.arange(1.0, 6.0)[:, None]  # one direction, five lengths
    with pytest.raises(ValueError, match="5 points do not fill 2 clusters: clusters 1 stay empty"):
        spherical_kmeans(same, 2, seed=0)
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="1 of 6 points to cluster are zero or not finite"):
            spherical_kmeans(torch.cat([x[:5], torch.full((1, 4), bad)]), 2, seed=0)
