"""Cluster-aware upcycling of one block: truncation against torch's SVD, experts and router against their clusters."""

import pytest
import torch

from models.experts import from_clusters as experts
from models.experts.from_clusters import cluster_experts, truncated
from models.moe.layer import MoE, MoEConfig


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 1 - 1e-12])
def test_truncation_is_the_svd_of_the_whitened_weights(monkeypatch, shape, energy):
    monkeypatch.setattr(experts, "ENERGY", energy)
    weight, x = draws(*shape), draws(400, shape[1], seed=1) @ draws(shape[1], shape[1], seed=2)
    found, rank = truncated(weight, x.split(150))
    # as SVD-LLM writes it: W L = U S V^T with mean x x^T = L L^T, truncated, times L^-1
    lower = torch.linalg.cholesky((x.T @ x / len(x)).double())
    U, S, Vh = torch.linalg.svd(weight.double() @ lower, full_matrices=False)
    share = S.square().cumsum(0) / S.square().sum()
    wanted_rank = int((share < energy).sum()) + 1
    wanted = (U[:, :rank] * S[:rank]) @ Vh[:rank] @ torch.linalg.inv(lower)
    assert rank == wanted_rank
    torch.testing.assert_close(found, wanted.float(), atol=1e-4, rtol=1e-4)
    assert torch.linalg.matrix_rank(found, rtol=1e-4) == rank


def test_fewer_tokens_than_width_are_enough():
    weight, x = draws(8, 6), draws(2, 6, seed=1)
    found, rank = truncated(weight, [x])
    assert rank <= 2
    torch.testing.assert_close(x @ found.T, x @ weight.T, atol=0.2, rtol=0.2)  # 99% of the mean square


@torch.no_grad()
def test_each_expert_serves_its_cluster():
    E, D, H = 3, 16, 32
    directions = torch.linalg.qr(draws(D, D)).Q[:E]
    truth = torch.arange(E).repeat_interleave(100)
    x = (3 * directions[truth] + 0.3 * draws(300, D, seed=1)) * (1 + torch.rand(300, 1))
    moe = MoE(D, H, MoEConfig(num_experts=E, k=1, router_bias=True))
    for expert in moe.experts:  # copies of one MLP
        expert.load_state_dict(moe.experts[0].state_dict())
    moe.router.bias.fill_(7.0)
    dense = MoE(D, H, MoEConfig(num_experts=1, k=1))
    dense.experts[0].load_state_dict(moe.experts[0].state_dict())
    found = cluster_experts(moe, x, seed=0)
    assert found.tokens == [100] * E and all(1 <= rank < D for ranks in found.ranks for rank in ranks)
    assert not moe.router.bias.any()
    logits = moe.router(x)
    chosen = logits.argmax(1)
    assert all(len(chosen[truth == t].unique()) == 1 for t in range(E)) and len(chosen.unique()) == E
    assert abs(logits.std(1).mean() - 1) < 1e-5  # as sure as a fresh router
    # routed to its own expert, a token keeps what the dense MLP computes; another cluster's expert has lost much of it
    wanted = dense(x[None])[0]

    def error(expert_of_token):
        outputs = []
        for expert in moe.experts:
            hidden = torch.nn.functional.gelu(x @ expert["fc1"].weight.T + expert["fc1"].bias)
            outputs.append(hidden @ expert["fc2"].weight.T + expert["fc2"].bias)
        outputs = torch.stack(outputs)
        got = outputs[expert_of_token, torch.arange(len(x))]
        return ((got - wanted).square().sum() / wanted.square().sum()).item()

    assert error(chosen) < 0.05 < 5 * error(chosen) < error((chosen + 1) % E)
    torch.testing.assert_close(moe(x[None])[0], moe.eval()(x[None])[0])


def test_empty_clusters_are_named():
    moe = MoE(4, 8, MoEConfig(num_experts=3, k=1))
    with pytest.raises(ValueError, match="do not fill 3 clusters: clusters 1, 2 stay empty"):
        cluster_experts(moe, torch.ones(50, 4), seed=0)
