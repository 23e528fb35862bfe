"""Dropout inside experts: the share, who shares a mask with whom, and that no mask depends on who holds an expert."""

import pytest
import torch
from torch.testing import assert_close

from models.moe.dropout import ExpertDropout, draw_number
from models.moe.layer import MoE, MoEConfig


def dropout_of(*numbers: int, rate: float = 0.3, first: int = 0, E: int = 2, R: int = 600) -> ExpertDropout:
    """R rows of every rank for every one of E experts, by expert, then by rank."""
    P = len(numbers)
    expert_R = first + torch.arange(E).repeat_interleave(P * R)
    rank_R = torch.arange(P).repeat_interleave(R).repeat(E)
    return ExpertDropout(rate, torch.tensor(numbers), expert_R, torch.arange(R).repeat(E * P), rank_R)


def masks(*numbers: int, E: int = 2, R: int = 600, W: int = 200, site: int = 0, **settings) -> torch.Tensor:
    """(E, P, R, W)."""
    dropout = dropout_of(*numbers, E=E, R=R, **settings)
    return dropout.mask(0, len(dropout.expert_R), W, site).view(E, len(numbers), R, W)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_every_row_and_every_column_drops_its_share(rate):
    mask_RW = masks(7, rate=rate)[0, 0].double()
    # standard deviation of a mean of n draws: sqrt(rate (1 - rate) / n)
    assert mask_RW.mean() == pytest.approx(rate, abs=5 * (rate * (1 - rate) / (600 * 200)) ** 0.5)
    assert mask_RW.mean(0).std() == pytest.approx((rate * (1 - rate) / 600) ** 0.5, rel=0.2)
    assert mask_RW.mean(1).std() == pytest.approx((rate * (1 - rate) / 200) ** 0.5, rel=0.2)


def test_rows_columns_experts_ranks_and_places_drop_independently():
    mask_RW = masks(7)[0, 0].double()
    for sample in (mask_RW, mask_RW.T):
        correlation = torch.corrcoef(sample)
        between = correlation[~torch.eye(len(sample), dtype=torch.bool)]
        # of independent samples of n values it spreads by 1 / sqrt(n)
        assert between.std() == pytest.approx(sample.shape[1] ** -0.5, rel=0.05)
        assert between.abs().max() < 6 * sample.shape[1] ** -0.5
    both = masks(7, 8)
    others = [both[0, 0], both[0, 1], both[1, 0], masks(7, site=1)[0, 0], masks(9)[0, 0]]
    correlation = torch.corrcoef(torch.stack([other.flatten().double() for other in others]))
    assert (correlation - torch.eye(len(others))).abs().max() < 5 * (600 * 200) ** -0.5


def test_the_mask_of_a_row_is_the_same_on_every_rank_and_however_many_rows_there_are():
    whole = masks(7, 2**32 - 1, E=4)
    assert torch.equal(masks(7, 2**32 - 1, first=2, E=2), whole[2:])  # the second of two ranks holds experts 2 and 3
    assert torch.equal(masks(2**32 - 1, E=4), whole[:, 1:])  # alone
    assert torch.equal(masks(7, 2**32 - 1, E=4, R=5), whole[:, :, :5])  # the fullest expert decides how many


def test_without_ranks_and_in_parts_the_masks_are_the_same():
    dropout = dropout_of(7)
    whole = dropout.mask(0, 1200, 50, site=1)
    alone = ExpertDropout(0.3, torch.tensor([7]), dropout.expert_R, dropout.place_R)
    assert torch.equal(alone.mask(0, 1200, 50, site=1), whole)
    assert torch.equal(alone.mask(500, 700, 50, site=1), whole[500:700])
    part = torch.ones(200, 50)
    dropout.drop_(part, 500, 700, site=1)
    assert torch.equal(part, dropout(torch.ones(1200, 50), site=1)[500:700])


def test_what_stays_grows_so_that_the_mean_stays():
    dropout = dropout_of(3, rate=0.25, R=300)
    outputs = dropout(torch.full((600, 100), 3.0), site=0)
    assert sorted(outputs.unique().tolist()) == [0.0, 4.0]  # 3 / (1 - 0.25)
    assert outputs.mean() == pytest.approx(3, abs=0.05)
    inputs = torch.ones(600, 6, requires_grad=True)
    dropout(inputs, site=0).sum().backward()
    assert torch.equal(inputs.grad, dropout(torch.ones(600, 6), site=0))


def test_it_depends_on_the_generator_alone_and_is_off_in_evaluation():
    layer = MoE(6, 10, MoEConfig(num_experts=4, dropout=0.3))
    x_BTD = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first, second = layer(x_BTD), layer(x_BTD)
    torch.manual_seed(1)
    assert torch.equal(layer(x_BTD), first)
    assert not torch.equal(first, second)
    plain = MoE(6, 10, MoEConfig(num_experts=4))
    plain.load_state_dict(layer.state_dict())
    before = torch.get_rng_state()
    assert_close(layer.eval()(x_BTD), plain(x_BTD), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 <= int(draw_number(x_BTD)) < 2**32


def test_bfloat16_and_one_row_and_one_column():
    outputs = dropout_of(0, rate=0.5, E=8, R=1)(torch.ones(8, 1, dtype=torch.bfloat16), site=0)
    assert outputs.dtype == torch.bfloat16
    assert set(outputs.flatten().tolist()) == {0.0, 2.0}
