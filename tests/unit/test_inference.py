"""The table of speeds and accuracies that phase evaluate makes for the card, and the dense model in it."""

import time

import pytest
import torch
from test_evaluation_layout import digits, student
from torch.utils.flop_counter import FlopCounterMode

from models.flops import forward_flops, num_tokens
from models.moe.layer import routed_layers
from models.nac import family as nac_family
from models.vmoe import family as vmoe_family
from models.vmoe.family import dense_of_equal_flops
from tests.run_folder import new_nac
from trainer.distributed.ranks import Dist
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.evaluation.inference import Candidate, inference, measured, speeds

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_dense_model_costs_as_much(k):
    """Up to half of a hidden unit: 2 FLOPs x 2 layers x 16 wide x 5 tokens x 2 blocks."""
    model = student(k=k).eval()
    dense = dense_of_equal_flops(model).eval()
    assert not routed_layers(dense)
    for block in dense.blocks:
        block.attn.fused_attn = False  # whose products the counter does not see on a CPU
    wanted = forward_flops(model, num_tokens(model))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense(torch.zeros(1, 3, 8, 8))
    assert abs(counter.get_total_flops() - wanted) <= 2 * 2 * 16 * 5 * 2 / 2


def test_accuracies_are_those_of_the_same_weights_with_another_k():
    model = student(k=2, eval_capacity_factor=None).eval()
    data = digits(40)
    accuracy = evaluate(Predictor(model, model), data, torch.float32, 8, ALONE)["accuracy"]
    forms = measured(vmoe_family.forms(model), accuracy, data, torch.float32, 8, ALONE)
    rivals = [Candidate(name, rival) for name, rival in vmoe_family.rivals(model).items()]
    table = inference(forms, rivals, data, torch.float32, 8, ALONE)
    names = [row["name"] for row in table["rows"]]
    assert names == ["student, k = 1", "student, k = 2 (trained)", "student, k = 4", "dense ViT of equal FLOPs"]
    assert (table["batch"], table["dtype"], table["where"]) == (8, "float32", "1 thread of a CPU")
    for row, k in zip(table["rows"], (1, 2, 4)):
        again = student(k=k, eval_capacity_factor=None).eval()
        expected = evaluate(Predictor(again, again), data, torch.float32, 40, ALONE)["accuracy"]
        assert row["accuracy"] == pytest.approx(expected)
        assert row["flops"] == forward_flops(again, num_tokens(again))
    assert table["rows"][-1]["accuracy"] is None
    assert all(row["images_per_second"] > 0 for row in table["rows"])
    assert model.config.moe.k == 2 and {layer.config.k for layer in routed_layers(model).values()} == {2}


def test_a_nac_is_measured_whole_and_with_its_best_connected_mediators():
    model = new_nac(num_classes=10)  # 8 mediators
    data = digits(20)
    accuracy = evaluate(Predictor(model, model), data, torch.float32, 8, ALONE)["accuracy"]
    forms = nac_family.forms(model)
    candidates = measured(forms, accuracy, data, torch.float32, 8, ALONE)
    table = inference(candidates, [Candidate("dense", student())], data, torch.float32, 8, ALONE)
    names = ["all mediators (trained)", "50% of the mediators", "25% of the mediators", "10% of the mediators"]
    assert [row["name"] for row in table["rows"]] == [*(f"student, {name}" for name in names), "dense"]
    for row, form, kept in zip(table["rows"], forms, (8, 4, 2, 1)):
        pruned = model.pruned(kept)
        assert form.kept == ("" if kept == 8 else row["name"].split()[1])
        assert row["accuracy"] == evaluate(Predictor(pruned, pruned), data, torch.float32, 20, ALONE)["accuracy"]
        assert row["flops"] == pruned.count_flops(0).forward
    flops = [row["flops"] for row in table["rows"][:4]]
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == 4
    assert nac_family.rivals(model) == {} and model.config.mediator_latents == 8


def test_a_student_without_experts_has_one_form():
    assert vmoe_family.forms(dense_of_equal_flops(student())) == []


def test_speed_is_images_by_the_median_second():
    class Waits(torch.nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, images):
            time.sleep(self.seconds)
            return images

    fast, slow = speeds([Candidate("fast", Waits(0.01)), Candidate("slow", Waits(0.03))], torch.zeros(4, 1))
    # a sleep is never shorter than asked for
    assert slow <= 4 / 0.03 and fast <= 4 / 0.01 and fast > 1.5 * slow
