"""A student started from dense weights computes what the dense model computes, or says why it cannot."""

import dataclasses
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn
from vit_families import images, tiny

from models.experts.upcycle import chosen_layers, norm_eps, upcycle
from models.moe.layer import MoE, MoEConfig
from models.preprocessing import Preprocessing
from models.teacher.load import Teacher
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.load import load_recipe

TINY = Path(__file__).resolve().parents[1] / "fixtures/tiny.yaml"
IMAGES = Preprocessing(32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
SIZES = {"image_size": 32, "patch_size": 8, "width": 24, "heads": 3, "mlp_dim": 96, "num_classes": 5}
# family of tests/unit/vit_families.py -> what the student needs to hold all of it
EXACT = {
    "vit": {},
    "deit": {},
    "deit3": {},  # LayerScale, no position on the class token
    "gap reg4": {"pool": "mean", "reg_tokens": 3},  # mean pooling, prefix tokens, no qkv bias
}


def dense(family="vit", depth=4, preprocessing=IMAGES, **arguments):
    model = tiny(family, depth, **arguments)
    return Teacher(model, preprocessing, f"a {family}", None, model.num_classes)


def student(model, depth=4, moe=None, **changes):
    moe = moe or MoEConfig(num_experts=4, k=2)
    config = VMoEConfig(depth=depth, moe_blocks="every-2", moe=moe, norm_eps=norm_eps(model), **{**SIZES, **changes})
    return VMoE(config).eval()


@pytest.mark.parametrize("layers, expected", [
    (([6, 6], [1, 1]), [0, 6]),  # first of the stage, as the meta model
    (([6, 6], [3, 2]), [0, 2, 4, 6, 9]),
    (([5], [3]), [0, 1, 3]),  # floor(j 5 / 3)
    (([3, 2], [3, 2]), [0, 1, 2, 3, 4]),
])  # fmt: skip
def test_layers_by_hand(layers, expected):
    assert chosen_layers(*layers) == expected


def test_layers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"module 1 of the student has 3 blocks and the dense model's has 2: .*depths"):
        chosen_layers([4, 2], [2, 3])
    with pytest.raises(ValueError, match="2 student modules cannot start from 3 dense ones"):
        chosen_layers([1, 1, 1], [1, 1])


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("routing", [{"k": 1}, {"k": 2}, {"k": 4, "renormalize": False}])
@torch.no_grad()
def test_the_function_of_the_dense_model_is_kept(family, routing):
    teacher = dense(family, **({"fc_norm": False} if family == "gap reg4" else {}))
    model = student(teacher.model, moe=MoEConfig(num_experts=4, **routing), **EXACT[family])
    assert upcycle(model, teacher, range(4), IMAGES) == []
    x = images(4)
    wanted = teacher.model(x)
    assert wanted.std() > 0.1
    torch.testing.assert_close(model(x), wanted, atol=2e-6 * wanted.abs().max().item(), rtol=0)


@torch.no_grad()
def test_an_moe_block_is_the_dense_block_to_1e_6():
    teacher = dense()
    model = student(teacher.model)
    upcycle(model, teacher, range(4), IMAGES)
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(1))
    for block, wanted in zip(model.blocks, teacher.model.blocks):
        torch.testing.assert_close(block(x), wanted(x), atol=1e-6, rtol=1e-6)
    assert [isinstance(block.mlp, MoE) for block in model.blocks] == [False, True, False, True]


@torch.no_grad()
def test_capacity_that_drops_tokens_ends_the_equality():
    teacher = dense()
    model = student(teacher.model, moe=MoEConfig(num_experts=4, k=1, eval_capacity_factor=0.5, capacity_multiple=1))
    upcycle(model, teacher, range(4), IMAGES)
    assert (model(images()) - teacher.model(images())).abs().max() > 1e-3


@torch.no_grad()
def test_other_images_are_made_up_for():
    theirs = Preprocessing(32, mean=(0.1, 0.6, 0.5), std=(0.5, 0.1, 0.3))
    teacher = dense(preprocessing=theirs)
    model = student(teacher.model)
    upcycle(model, teacher, range(4), IMAGES)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def seen(preprocessing):
        mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
        return (pixels - mean) / std

    torch.testing.assert_close(model(seen(IMAGES)), teacher.model(seen(theirs)), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_skipped_layers_and_heads():
    teacher = dense(depth=6)
    model = student(teacher.model, depth=3)
    upcycle(model, teacher, [0, 2, 4], IMAGES)
    for block, layer in zip(model.blocks, (0, 2, 4)):
        assert torch.equal(block.attn.qkv.weight, teacher.model.blocks[layer].attn.qkv.weight)
    other = student(teacher.model, depth=3, num_classes=7)
    fresh = other.head.weight.clone()
    assert upcycle(other, teacher, [0, 2, 4], IMAGES, own_classes=False) == ["its head of 5 classes"]
    assert torch.equal(other.head.weight, fresh)
    assert torch.equal(other.norm.weight, teacher.model.norm.weight)


@torch.no_grad()
def test_what_a_v_moe_cannot_hold_is_left_behind_by_name():
    distilled = dense("deit distilled")
    model = student(distilled.model, reg_tokens=1)
    assert upcycle(model, distilled, range(4), IMAGES) == ["the head on its distillation token"]
    x = images()
    torch.testing.assert_close(model.forward_features(x), distilled.model.forward_features(x), atol=1e-5, rtol=1e-5)
    gap = dense("gap reg4")
    left = upcycle(student(gap.model, pool="mean", reg_tokens=3), gap, range(4), IMAGES)
    assert left == ["its head, which reads another pooling than a V-MoE's (norm after the mean)"]
    siglip = dense("siglip")
    model = student(siglip.model, class_token=False, pool="mean", mlp_dim=siglip.model.blocks[0].mlp.fc1.out_features)
    assert upcycle(model, siglip, range(4), IMAGES) == [
        "its head, which reads another pooling than a V-MoE's (pooling 'map')"
    ]
    torch.testing.assert_close(model.forward_features(x), siglip.model.forward_features(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_noise_is_relative_and_drawn_by_seed_block_and_expert():
    teacher = dense()

    def experts(noise, seed=0):
        model = student(teacher.model, seed=seed)
        upcycle(model, teacher, range(4), IMAGES, noise=noise)
        return [model.blocks[b].mlp.experts[e] for b in (1, 3) for e in range(4)]

    assert all(torch.equal(e["fc1"].weight, teacher.model.blocks[1].mlp.fc1.weight) for e in experts(0.0)[:4])
    noisy, again, other = experts(0.1), experts(0.1), experts(0.1, seed=1)
    for e, expert in enumerate(noisy):
        for name in ("fc1", "fc2"):
            weight = getattr(teacher.model.blocks[1 if e < 4 else 3].mlp, name).weight
            drawn = expert[name].weight - weight
            assert 0.09 < drawn.std() / weight.std() < 0.11
            assert torch.equal(expert[name].weight, again[e][name].weight)
            assert not torch.equal(expert[name].weight, other[e][name].weight)
    draws = torch.stack([noisy[e]["fc1"].weight - teacher.model.blocks[1].mlp.fc1.weight for e in range(4)]).flatten(1)
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 12}, r"student's width is 12 and that of a vit.* is 24: .*set student.width=24, or name in student"),
        ({"heads": 4}, "student's heads is 4 and that of a vit.* is 3"),
        ({"mlp_dim": 48}, "student's mlp_dim is 48 and that of a vit.* is 96"),
        ({"patch_size": 16}, "student's patch_size is 16 and that of a vit.* is 8"),
        ({"image_size": 16}, "student's image_size is 16 .* is 32: they must be equal; name in student.init a dense"),
        ({"in_chans": 1}, "student's in_chans is 1 and that of a vit.* is 3"),
        ({"reg_tokens": 2}, "student's prefix tokens is 3 .* is 1: .*set student.reg_tokens=0, or name"),
        (
            {"class_token": False, "pool": "mean"},
            r"student's prefix tokens is 0 .* is 1: .*set student.reg_tokens=1",
        ),
        ({"num_classes": 9}, "the student has 9 classes and a vit has 5: they must be equal"),
        ({"gelu": "tanh"}, "student's gelu is 'tanh' and the activation of a vit is erf: set student.gelu=erf"),
        ({"pool": "mean"}, "student's pool is 'mean' and that of a vit is 'token': set student.pool=token"),
        ({"norm_eps": 1e-5}, "student's norm_eps is 1e-05 and that of a vit is 1e-06"),
        ({"moe": MoEConfig(num_experts=4, k=2, renormalize=False)}, "moe.renormalize is false: the gates of 2 of 4"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides(changes, message):
    teacher = dense()
    for device in ("cpu", "meta"):  # before anything is trained, too
        with torch.device(device):
            model = VMoE(VMoEConfig(depth=4, **{**SIZES, "moe": MoEConfig(num_experts=4, k=2), **changes}))
        with pytest.raises(ValueError, match=message):
            upcycle(model, teacher, range(4), IMAGES)


@pytest.mark.parametrize("change, message", [
    (lambda m: setattr(m, "norm_pre", nn.LayerNorm(24)), "a norm before the blocks"),
    (lambda m: setattr(m.blocks[2].attn, "q_norm", nn.LayerNorm(8)), r"a norm inside block 2 \(q_norm\)"),
    (lambda m: setattr(m.blocks[1], "ls2", nn.Linear(24, 24)), "Linear in block 1"),
    (lambda m: setattr(m.blocks[0].mlp, "act", nn.SiLU()), "the activation SiLU in block 0"),
    (lambda m: m.blocks.__setitem__(1, ParallelScalingBlock(24, 3)), "blocks of type ParallelScalingBlock"),
    (lambda m: setattr(m.blocks[3], "norm1", nn.RMSNorm(24)), "RMSNorm in place of LayerNorm"),
    (lambda m: setattr(m.blocks[3].norm1, "eps", 1e-3), r"one LayerNorm eps.*\[1e-06, 0.001\]"),
])  # fmt: skip
def test_parts_a_v_moe_lacks_are_refused(change, message):
    teacher = dense()
    model = student(teacher.model)
    change(teacher.model)
    with pytest.raises(ValueError, match=message):
        upcycle(model, teacher, range(4), IMAGES)


def test_another_eps_travels_with_the_model(tmp_path):
    teacher = dense()
    for module in teacher.model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3
    model = student(teacher.model)
    upcycle(model, teacher, range(4), IMAGES)
    model.save_pretrained(tmp_path)
    loaded = VMoE.from_pretrained(tmp_path)
    x = images()
    torch.testing.assert_close(loaded(x), teacher.model(x), atol=1e-5, rtol=1e-5)
    plain = dataclasses.replace(model.config, norm_eps=None)
    assert plain.on_weights_of(model.config, "it").norm_eps == 1e-3


@pytest.mark.parametrize("overrides, message", [
    (["train.start=upcycled"], "student.init is empty: set student.init=teacher, or name a dense ViT"),
    (["train.baselines=[scratch, upcycled]"], "student.init is empty"),
    (["student.experts=clusters"], "student.experts is 'clusters', expected copy where student.init is empty"),
    (["student.expert_noise=0.1"], "student.expert_noise is 0.1, expected 0.0 where student.init is empty"),
    (["student.init=teacher", "student.expert_noise=-1"], r"student.expert_noise is -1.0, expected 0 to 1,000"),
])  # fmt: skip
def test_settings_that_need_a_start(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(TINY, overrides)
    load_recipe(TINY, ["student.init=teacher", "train.start=upcycled", "student.experts=clusters"])
