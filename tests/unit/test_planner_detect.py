"""What a plan says of phase detect: its own images, sizes and DeepSpeed JSON, beside the other phases."""

import json
import math
from collections import Counter

import pytest
import torch

from tests.launch import ROOT, TINY_RECIPE
from trainer.config.load import load_recipe
from trainer.plan.planner import settings_of
from trainer.plan.stand_ins import BoxedImages, planned_run
from trainer.plan.traffic import Layout, collectives
from trainer.plan.work import works
from trainer.run import main


@pytest.fixture(autouse=True)
def unchanged_logging(monkeypatch):
    """main() sets the whole process up, which is this one here."""
    monkeypatch.setattr("trainer.run.set_up_logging", lambda main: None)


SIZES = ["detect.width=16", "detect.heads=2", "detect.mlp_dim=32", "detect.layers=2", "detect.queries=6"]
SIZES += ["detect.groups=2", "detect.maps=2", "detect.shorter_side=64", "detect.longest_side=96"]
ZERO = {"zero_optimization": {"stage": 1}}
SIZES += ["detect.epochs=3", "detect.global_batch=4", "detect.jitter=[0.5,1.5]"]


def planned(*words, boxed=None, classes=10):
    """The training of phase detect, and its recipe."""
    recipe = load_recipe(TINY_RECIPE, [*SIZES, *words])
    run = planned_run(recipe, {}, ROOT / "unused", 1, 2, images=100, classes=classes, boxed=boxed)
    return recipe, works(run)[-1]


@pytest.fixture(scope="module")
def counted():
    """On 10 images of COCO's size that are only counted."""
    return planned(boxed=BoxedImages(10, 7))


def test_images_and_sizes_by_hand(counted):
    _, work = counted
    assert work.name == "detect" and work.by_itself and work.images == 10
    assert work.steps(4) == 3 * (10 // 4)
    backbone, heads = work.objective.detector.backbone, work.objective.detector.heads
    side = backbone.patch_size
    # 640 x 480 becomes 85 x 64 pixels; a side of 64 times 1.5 and one of 96 times 1.5 is the largest
    assert work.objective.patches == math.ceil(85 / side) * math.ceil(64 / side)
    prefix = backbone.vit.num_prefix_tokens
    assert work.objective.most_tokens == math.ceil(96 / side) * math.ceil(144 / side) + prefix
    assert work.image_numbers == 3 * math.ceil(96 / side) * math.ceil(144 / side) * side**2
    assert heads.rf_detr.config.num_labels == 7
    assert all(parameter.is_meta for parameter in work.objective.module.parameters())


def test_drawn_pictures_are_counted_as_they_are():
    _, work = planned("detect.data.train_pictures=4", "detect.data.size=96", "detect.data.shapes=3")
    side = work.objective.detector.backbone.patch_size
    # square, wide, high, square: 64 x 64, 64 x 85, 85 x 64, 64 x 64
    square, wide = math.ceil(64 / side) ** 2, math.ceil(64 / side) * math.ceil(85 / side)
    assert work.images == 4 and work.objective.patches == round((2 * square + 2 * wide) / 4)
    assert work.assumed == ""


def test_memory_is_that_of_the_largest_images_and_time_that_of_the_mean(counted):
    _, work = counted
    mean, largest = (work.states(2, 2, 1, 1.0, "loop", largest=largest) for largest in (False, True))
    ratio = work.objective.most_tokens / work.tokens
    assert 1.5 < largest.kept / mean.kept < 2 * ratio


def test_heads_keep_what_autograd_keeps(counted):
    """The same heads on the CPU, where what is alive between forward and backward is asked of torch."""
    heads = planned("detect.masks=true", boxed=BoxedImages(10, 7))[1].objective.detector.heads
    real = heads.to_empty(device="cpu")
    maps = [[torch.zeros(channels, 4, 4) for channels in heads.map_channels] for _ in range(3)]
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = real(maps, [(4 * heads.patch_size, 4 * heads.patch_size)] * 3)
    # the logits of all masks: two layers of the decoder and the proposals, float32
    masks = outputs.pred_masks
    assert masks.shape[:2] == (3, 2 * 6)
    assert heads.count_kept(3, 16, 4) == pytest.approx(sum(kept.values()) + 3 * 4 * masks.numel(), rel=0.02)


def test_a_backbone_that_is_given_needs_no_download_and_spreads_no_experts():
    recipe, work = planned("detect.backbone=timm/vit_tiny_patch16_224.augreg_in21k", boxed=BoxedImages(10, 7))
    assert work.objective.detector.backbone.width == 192 and not work.moe_layers
    settings = settings_of(recipe, work, ZERO, Layout(1, 2))
    moved = {each.what: each for each in collectives(work, settings, Layout(1, 2))}
    assert moved["objects"].calls == settings.accumulation and "tokens to experts and back" not in moved
    with pytest.raises(ValueError, match=r"detect.backbone=timm/vit_of_nobody: timm .* cannot build it"):
        planned("detect.backbone=timm/vit_of_nobody", boxed=BoxedImages(10, 7))


def test_images_pass_one_by_one_where_experts_are_spread(counted):
    recipe, work = counted
    layout = Layout(1, 2, ep_size=2)
    settings = settings_of(recipe, work, ZERO | {"trainer": {"ep_size": 2}}, layout)
    assert settings.micro_batch * settings.accumulation == 2
    calls = {each.what: each.calls for each in collectives(work, settings, layout)}
    # two images a rank, each to the experts and back, forward and backward, in every MoE block
    assert calls["tokens to experts and back"] == 2 * 4 * len(work.moe_layers)


def test_the_mean_is_over_images(counted):
    class Two(BoxedImages):
        def sizes(self):
            return Counter({(480, 640): 1, (64, 64): 1})

    _, work = planned(boxed=Two(2, 7))
    side = work.objective.detector.backbone.patch_size
    wide, square = math.ceil(64 / side) * math.ceil(85 / side), math.ceil(64 / side) ** 2
    assert work.objective.patches == round((wide + square) / 2)


COMMAND = ["--recipe", str(TINY_RECIPE), "--phase", "plan", "--gpus", "2", "--images", "100", *SIZES]


def test_the_command_plans_it_by_itself(capsys):
    assert main([*COMMAND, "--box-images", "50", "--categories", "7"]) == 0
    chain, detect = capsys.readouterr().out.split("phase detect, planned by itself")
    assert "\ndetect" not in chain and "\ntrain " in chain
    assert detect.count("\ndetect ") == 3  # memory, traffic, time
    assert "matching objects to queries" in detect and "640 x 480 pixels" in detect
    # 4 images a step on 2 GPUs; the chain's own batches are others
    assert json.loads(detect[detect.index("{") :])["train_micro_batch_size_per_gpu"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["detect.data.path=/nowhere"], "detect.data.path=/nowhere is not there: say how many training images"),
        (["--box-images", "0"], "--box-images is 0, expected a whole number from 1"),
        (["--box-images", "9", "--categories", "x"], "--categories is x, expected a whole number from 1"),
        (["--box-images", "3"], "detect has no step: 3 images are fewer than its global batch of 4"),
    ],
)
def test_what_is_refused(capsys, words, said):
    assert main([*COMMAND, *words]) == 2
    streams = capsys.readouterr()
    assert said in streams.err + streams.out


def test_its_flags_beside_another_phase(capsys):
    assert main(["--recipe", str(TINY_RECIPE), "--phase", "detect", "--out", "x", "--box-images", "2"]) == 2
    assert "--box-images has a meaning with --phase plan alone" in capsys.readouterr().err
