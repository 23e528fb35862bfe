"""The detector: images of several sizes in a batch, windows, losses, precision of its numbers, files."""

from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image
from torch.testing import assert_close

from models.detection import Detector, DetectorConfig, load_detector, save_detector
from models.detection.backbone import Made, load_backbone
from models.detection.detector import Target
from models.detection.features import FeatureMaps, together
from models.detection.images import in_pixels, resized_size
from models.detection.windows import InWindows, global_numbers
from models.modules.tokens import Rope
from models.moe.out import auxiliary_loss, routing_metrics
from models.preprocessing import Preprocessing
from models.vmoe import VMoE, VMoEConfig

PRE = Preprocessing(32, (0.5,) * 3, (0.25,) * 3)
# a tight capacity, so that an image would lose tokens to its neighbours if they competed
MOE = {
    "num_experts": 4,
    "k": 1,
    "images_per_group": 1,
    "capacity_factor": 0.5,
    "eval_capacity_factor": 0.5,
    "importance_weight": 0.1,
}
SIZES = {"width": 16, "queries": 6, "groups": 2, "layers": 2, "heads": 2, "mlp_dim": 16}
SIZES |= {"shorter_side": 32, "longest_side": 64}
BACKBONE = VMoEConfig(
    image_size=32, patch_size=8, width=16, depth=2, heads=2, mlp_dim=16, num_classes=3, moe_blocks="all", moe=MOE
)


def config(**changes):
    return DetectorConfig(("disc", "ring", "star"), (1, 5, 9), PRE, **(SIZES | {"maps": 2} | changes))


def detector(**changes):
    made = Made("vmoe", {})
    return Detector(config(**changes), VMoE(BACKBONE), made)


def pictures(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, height, width, generator=generator) for height, width in sizes]


def target(picture, count):
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.3, 0.4, 0.2, 0.6]])[:count]
    masks = torch.zeros(count, *picture.shape[-2:], dtype=torch.uint8)
    masks[:, 4:20, 8:24] = 1
    return Target(torch.arange(count), boxes, masks)


def test_each_of_three_sizes_is_seen_as_if_it_were_alone():
    backbone = FeatureMaps(VMoE(BACKBONE), maps=2)
    batch = pictures((32, 40), (48, 32), (30, 37), (32, 40))
    for mode in (True, False):
        backbone.train(mode)
        found = backbone(batch)
        for picture, maps in zip(batch, found):
            (alone,) = backbone([picture])
            grid = [-(-side // 8) for side in picture.shape[1:]]
            assert [list(each.shape) for each in maps] == [[16, *grid]] * 2
            assert_close(maps, alone)


def test_at_its_own_size_a_map_is_what_the_model_gives():
    vit = VMoE(BACKBONE).eval()
    names = set(vit.state_dict())
    (picture,) = pictures((32, 32))
    tokens = vit.forward_features(picture[None])[0, 1:]
    backbone = FeatureMaps(vit).eval()
    assert_close(backbone([picture])[0][-1].flatten(1).T, tokens)
    assert {f"vit.{name}" for name in names if not name.startswith("head.")} == set(backbone.state_dict())


def test_what_experts_tell_is_of_all_images_together():
    backbone = FeatureMaps(VMoE(BACKBONE)).train()
    same = pictures((32, 32), (32, 32))
    once, apart = {}, []
    backbone(same, once)
    for picture in same:
        apart.append({})
        backbone([picture], apart[-1])
    merged = together(apart)
    assert_close(auxiliary_loss(merged), auxiliary_loss(once))
    metrics, expected = routing_metrics(merged), routing_metrics(once)
    assert metrics.keys() == {"vit.blocks.0.mlp", "vit.blocks.1.mlp"}
    for layer in metrics:
        assert_close(metrics[layer], expected[layer])
    mixed = {}
    backbone(pictures((32, 40), (48, 32)), mixed)
    assert routing_metrics(mixed).keys() == metrics.keys()
    assert auxiliary_loss(mixed).requires_grad


def test_one_window_over_the_whole_image_changes_nothing():
    vit = VMoE(BACKBONE).eval()
    x = torch.randn(2, 1 + 16, 16, generator=torch.Generator().manual_seed(1))
    for block in vit.blocks:
        assert_close(InWindows(block, (4, 4), 4, prefix=1)(x, {}), block(x, {}))


def test_windows_by_hand():
    """Two windows of 2 x 2 patches beside each other are attention of each four patches by themselves."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, class_token=False, global_pool="avg").eval()
    (block,) = vit.blocks
    x = torch.randn(1, 8, vit.embed_dim, generator=torch.Generator().manual_seed(0))  # 2 rows of 4
    left, right = [0, 1, 4, 5], [2, 3, 6, 7]
    expected = torch.empty_like(x)
    for patches in (left, right):
        expected[:, patches] = block(x[:, patches])
    assert_close(InWindows(block, (2, 4), 2, prefix=0)(x), expected)


def test_global_blocks_are_spread_with_the_last_among_them():
    assert global_numbers(12, 4) == {2, 5, 8, 11}  # as ViTDet's
    assert global_numbers(2, 4) == {0, 1}
    assert max(global_numbers(7, 3)) == 6


@pytest.mark.parametrize("masks", [False, True])
def test_the_loss_is_that_of_transformers_and_reaches_every_weight(masks):
    model = detector(masks=masks, window=3, global_blocks=1).train()
    batch = pictures((32, 40), (48, 32), (32, 40))
    targets = [target(picture, count) for picture, count in zip(batch, (2, 0, 1))]
    seen = {}
    model.heads.rf_detr.register_forward_hook(lambda head, images, output: seen.update(loss=output.loss))
    out = {}
    loss, parts = model(batch, targets, out)
    assert_close(loss, seen["loss"])
    assert parts.keys() == {"class", "box", "giou"} | ({"mask", "dice"} if masks else set())
    (loss + auxiliary_loss(out)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_batch_without_any_object_has_a_loss():
    """transformers' own sum is of no size there when masks are taught."""
    model = detector(masks=True).train()
    batch = pictures((32, 40), (32, 32))
    loss, _ = model(batch, [target(picture, 0) for picture in batch])
    loss.backward()
    assert loss.shape == () and loss > 0


@pytest.mark.parametrize("masks", [False, True])
def test_an_image_of_fewer_patches_than_queries(masks):
    """As a panorama is, once its longer side fits: what it shows is taught and told as of any other image."""
    whole = detector(masks=masks, queries=12)
    batch = pictures((8, 40), (16, 16))
    outputs = whole.train()(batch, [target(picture, 2) for picture in batch])
    outputs[0].backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in whole.parameters())
    (found,) = whole.eval().detect([Image.new("RGB", (200, 20), (200, 60, 0))])
    assert len(found.score_N) == 3 * 8  # categories of the 1 x 8 patches that there are, of 12 queries
    assert (found.box_N4[:, 2:] > found.box_N4[:, :2]).all()
    if masks:
        assert found.mask_NHW.shape[1:] == (20, 200)


def test_rows_that_make_room_for_queries_are_no_part_of_a_mask():
    """8 x 16 pixels are two patches: six rows of them make room for 12 queries, a mask's pixel for each 4 pixels."""
    logits = torch.full((1, 12, 4), 1.0)
    logits[:, :2, :2] = -1.0
    (mask_HW,) = detector(masks=True, queries=12).eval()._masks(logits, (8, 16), (8, 16))
    assert mask_HW[:4].tolist() == 4 * [8 * [False] + 8 * [True]]


def test_shares_of_an_image_stay_exact_in_bfloat16():
    """The heads compute in float32: only backbone and weights are rounded."""
    model = detector().eval()
    (picture,) = pictures((32, 40))
    objects = [target(picture, 2)]
    exact, _ = model([picture], objects)
    boxes = model.bfloat16()([picture.bfloat16()]).pred_boxes
    assert boxes.dtype == torch.float32
    assert not torch.equal(boxes, boxes.bfloat16().float())  # numbers that bfloat16 does not have
    rounded, _ = model([picture.bfloat16()], objects)
    assert_close(rounded, exact, atol=0, rtol=0.1)


@pytest.mark.parametrize("masks", [False, True])
def test_saved_and_loaded_again_it_finds_the_same(tmp_path, masks):
    together_trained = replace(BACKBONE, moe=replace(BACKBONE.moe, images_per_group=0))
    VMoE(together_trained).save_pretrained(tmp_path / "student", preprocessing=PRE)
    found = load_backbone(str(tmp_path / "student"))
    assert found.preprocessing == PRE and found.vit.config.moe.images_per_group == 1
    model = Detector(config(masks=masks), found.vit, found.made).eval()
    save_detector(model, tmp_path / "detector")
    again = load_detector(tmp_path / "detector")
    assert again.config == model.config
    (picture,) = pictures((32, 40))
    ours, theirs = (each.detect_picture(picture, (64, 80)) for each in (model, again))
    assert torch.equal(ours.score_N, theirs.score_N) and torch.equal(ours.box_N4, theirs.box_N4)
    if masks:
        assert ours.mask_NHW.shape == (len(ours.score_N), 64, 80)
        assert torch.equal(ours.mask_NHW, theirs.mask_NHW)


def test_a_timm_model_as_backbone(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    timm.models.save_for_hf(vit, tmp_path / "vit", model_args={"img_size": 32, "depth": 2}, safe_serialization=True)
    found = load_backbone(str(tmp_path / "vit"))
    model = Detector(config(), found.vit, found.made).train()
    batch = pictures((32, 48), (64, 32))
    loss, _ = model(batch, [target(picture, 2) for picture in batch])
    loss.backward()
    assert found.vit.patch_embed.proj.weight.grad is not None
    save_detector(model, tmp_path / "detector")
    again = load_detector(tmp_path / "detector")
    ours, theirs = (each.eval().detect_picture(batch[0], (32, 48)).box_N4 for each in (model, again))
    assert torch.equal(ours, theirs)


def test_what_is_no_backbone_is_refused(tmp_path):
    (tmp_path / "nac").mkdir()
    (tmp_path / "nac/config.json").write_text('{"model_type": "nac"}')
    with pytest.raises(ValueError, match="is a NAC, which has no feature maps"):
        load_backbone(str(tmp_path / "nac"))
    with pytest.raises(ValueError, match="a V-MoE or of timm's VisionTransformer or Eva, got a ResNet"):
        FeatureMaps(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="is no saved detector"):
        load_detector(tmp_path / "nac")
    rotary = VMoE(replace(BACKBONE, heads=1, rope=Rope()))
    with pytest.raises(ValueError, match=r"windows of 2 patches .* rotary positions.*use window 0"):
        FeatureMaps(rotary, window=2)
    FeatureMaps(rotary)(pictures((32, 40)))


def test_boxes_in_pixels_by_hand():
    # centre (0.5, 0.25) of 80 x 40 pixels, 0.25 wide and 0.5 high: 30..50 and 0..20; the second reaches over the edge
    boxes = torch.tensor([[0.5, 0.25, 0.25, 0.5], [1.0, 1.0, 0.5, 0.5]])
    assert in_pixels(boxes, (40, 80)).tolist() == [[30, 0, 50, 20], [60, 30, 80, 40]]
    assert resized_size(480, 640, 800, 1333) == (800, 1067)
    assert resized_size(200, 1000, 800, 1333) == (267, 1333)


def test_windows_cost_less():
    everywhere, windowed = (detector(window=window, global_blocks=1).backbone for window in (0, 2))
    tokens = 8 * 8 + 1
    # one block of two in 16 windows of 4 patches and a copy of the class token: 2 x 2 D (16 x 5^2 - 65^2) FLOPs less
    saved = 2 * 2 * 16 * (16 * 5**2 - 65**2)
    assert windowed.count_flops(tokens).forward - everywhere.count_flops(tokens).forward == saved


def test_the_cost_of_the_heads_is_what_torch_counts():
    heads = detector().heads
    # the projection of the boxes' deltas alone, of all patches: 2 groups of 3 layers 16 wide, and 4 at the end
    assert heads.count_flops(64).forward > 2 * 64 * 2 * (2 * 16 * 16 + 16 * 4)
    assert heads.count_flops(256).forward > 2 * heads.count_flops(64).forward
    assert heads.training
