"""A module of experts from dense modules: what is copied, what is averaged, and routers worked out by hand."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models.experts.branches import SCALES_S, ByCluster, decided_scale, merged_state, router_rows, stand_ins, top_gates
from models.moe.layer import MoE, MoEConfig
from models.vmoe.model import VMoE, VMoEConfig

SIZES = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 2, "heads": 2, "mlp_dim": 12, "num_classes": 3}


def model(moe_blocks: str, seed: int = 0, **moe) -> VMoE:
    """Two blocks, three experts in the MoE ones."""
    config = MoEConfig(num_experts=3, k=2, **moe)
    return VMoE(VMoEConfig(**SIZES, moe_blocks=moe_blocks, moe=config, seed=seed)).eval()


def test_experts_are_the_dense_mlps_and_the_rest_is_their_mean():
    """Block 0 is dense, block 1 an MoE. Nobody trained expert 2: it takes the MLP of dense model 0."""
    student = model("1", router_bias=True)
    dense = [model("none", seed).state_dict() for seed in (1, 2)]
    merged = merged_state(student.state_dict(), [dense[0], dense[1], None], [0, 1, 0])
    for expert, source in enumerate([0, 1, 0]):
        for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            assert torch.equal(merged[f"blocks.1.mlp.experts.{expert}.{part}"], dense[source][f"blocks.1.mlp.{part}"])
    for name in ("blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.weight", "blocks.1.norm2.weight", "pos_embed"):
        assert_close(merged[name], (dense[0][name] + dense[1][name]) / 2)
    assert not torch.equal(dense[0]["blocks.0.mlp.fc1.weight"], dense[1]["blocks.0.mlp.fc1.weight"])
    for name in ("blocks.1.mlp.router.weight", "blocks.1.mlp.router.bias"):
        assert torch.equal(merged[name], student.state_dict()[name])
    student.load_state_dict(merged)  # every name, every shape
    with pytest.raises(ValueError, match="none of the 2 experts was trained"):
        merged_state(student.state_dict(), [None, None], [0, 0])


def test_one_dense_model_for_all_experts_is_that_model():
    """Gates sum to 1, so whatever the routers say, equal experts give the dense model's outputs."""
    student, dense = model("all"), model("none", 3)
    nn.init.normal_(dense.head.weight)
    student.load_state_dict(merged_state(student.state_dict(), [dense.state_dict()] * 3, [0, 1, 2]))
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_close(student(images), dense(images), rtol=0, atol=1e-5)


def test_a_cluster_that_is_not_there_is_stood_in_for_by_the_nearest():
    centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    assert stand_ins(centroids, [True, True, False, True]) == [0, 1, 1, 3]  # cosines .6, .8, -.6
    assert stand_ins(centroids, [True, False, False, False]) == [0, 0, 0, 0]  # also where all cosines are negative


def test_router_rows_by_hand():
    """Means (3, 4) and (0, 2) have the directions (.6, .8) and (0, 1); their mean is (.3, .9)."""
    sums, counts = torch.tensor([[6.0, 8.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([2.0, 1.0, 0.0])
    rows = router_rows(sums, counts, [0, 1, 1])
    # the third cluster has no tokens: the second one's row at nine tenths of its length
    assert_close(rows, torch.tensor([[0.3, -0.1], [-0.3, 0.1], [-0.27, 0.09]]))
    # the same gates as unit directions: their difference is what decides
    x = torch.tensor([[3.0, 4.0]])
    assert_close((x @ rows[:2].T).softmax(-1), (x @ torch.tensor([[0.6, 0.8], [0.0, 1.0]]).T).softmax(-1))


def test_the_scale_is_where_the_largest_gate_is_half_way():
    """Two experts, logits +-s: the largest gate is 1 / (1 + exp(-2 s)), which is 3/4 at s = ln(3) / 2 = 0.549."""
    tokens, rows = torch.tensor([[1.0], [-1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])
    top_S = top_gates(tokens, rows)
    assert top_S[0] == pytest.approx(3 / (1 + math.exp(-2 * 0.01)))
    assert decided_scale(top_S / 3, 2) == pytest.approx(math.log(3) / 2, rel=0.01)
    assert decided_scale(torch.full((len(SCALES_S),), 0.5), 2) == pytest.approx(100)  # clusters that are all the same
    assert decided_scale(torch.ones(len(SCALES_S)), 2) == pytest.approx(0.01)


def test_every_token_goes_to_the_expert_of_its_cluster():
    """Against the MoE's own forward with a router that says the same."""
    torch.manual_seed(0)
    student = nn.Sequential(MoE(4, 6, MoEConfig(num_experts=3, k=1)), MoE(4, 6, MoEConfig(num_experts=3, k=1), layer=1))
    for layer in student:
        for expert in layer.experts:
            nn.init.normal_(expert["fc2"].bias)
    x, cluster = torch.randn(2, 3, 4), torch.tensor([[0, 1, 2], [2, 2, 0]])
    seen = {}
    ByCluster(student)(x, cluster, lambda name, inputs, own: seen.update({name: (inputs, own)}))
    assert list(seen) == [".0", ".1"]
    for inputs, own in seen.values():
        assert inputs.shape == (6, 4) and own.tolist() == [0, 1, 2, 2, 2, 0]
    assert torch.equal(seen[".0"][0], x.view(6, 4))
    expected = torch.stack([
        torch.nn.functional.gelu(student[0].experts[e]["fc1"](t)) @ student[0].experts[e]["fc2"].weight.T
        + student[0].experts[e]["fc2"].bias for t, e in zip(x.view(6, 4), cluster.flatten())])  # fmt: skip
    assert_close(seen[".1"][0], expected)
    assert isinstance(student[0], MoE)  # the module itself is left as it was
