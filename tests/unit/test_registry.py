"""The registered models under what timm's own generic tests check of every model, and saved ones through timm."""

import itertools
import json

import pytest
import timm
import torch
from timm.models import FeatureInfo
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.testing import assert_close

import models.registry
from models.moe.layer import MoE
from models.preprocessing import Preprocessing
from models.vmoe.model import VMoE
from tests.hub_server import HubServer

NAMES = sorted(models.registry.VARIANTS)
# a few blocks of any of the sizes: placement, routing and pooling are what differs
SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "mlp_dim": 48,
    "moe": {"num_experts": 4},
}
IMAGES = Preprocessing(image_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", crop_pct=0.8)


def create(name: str = "vmoe_base_patch16_224", **options) -> torch.nn.Module:
    """The model in small, with a head that says something."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | options)
    if not options.get("features_only") and model.num_classes and not options.get("pretrained"):
        torch.nn.init.normal_(model.head.weight)
    return model


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_all_names_are_registered():
    assert set(timm.list_models("vmoe*")) == set(NAMES)
    assert all(timm.is_model(name) and not timm.models.is_model_pretrained(name) for name in NAMES)
    assert timm.list_modules().count("registry") == 1


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads", "patch"),
    [
        ("vmoe_small_patch16_224", 8, 512, 8, 16),
        ("vmoe_base_patch16_224", 12, 768, 12, 16),
        ("vmoe_large_patch16_224", 24, 1024, 16, 16),
        ("vmoe_huge_patch14_224", 32, 1280, 16, 14),
    ],
)
@pytest.mark.parametrize("paper", ["V-MoE", "m2mKD"])
def test_full_sizes_and_their_default_configuration(name, depth, width, heads, patch, paper):
    name = name.replace("vmoe_", "vmoe_m2mkd_") if paper == "m2mKD" else name
    with torch.device("meta"):
        model = timm.create_model(name)
        dense = VisionTransformer(patch_size=patch, embed_dim=width, depth=depth, num_heads=heads)
    blocks = [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoE)]
    assert blocks == list(range(depth) if paper == "m2mKD" else range(1, depth, 2))
    moe = model.config.moe
    assert (moe.num_experts, moe.k, moe.renormalize) == (8, 2, paper == "m2mKD")
    mlp, router = 2 * width * 4 * width + 4 * width + width, 8 * width + (8 if paper == "m2mKD" else 0)
    added = len(blocks) * (7 * mlp + router)  # seven experts more, and a router
    assert count(model) == count(dense) + added
    cfg = model.default_cfg
    assert cfg["architecture"] == name and model.num_classes == cfg["num_classes"] == 1000
    assert cfg["input_size"] == (3, *model.patch_embed.img_size) and cfg["fixed_input_size"]
    state = model.state_dict()
    assert f"{cfg['classifier']}.weight" in state and f"{cfg['first_conv']}.weight" in state
    assert model.num_features == model.head_hidden_size == model.embed_dim


def test_one_full_size_runs():
    model = timm.create_model("vmoe_small_patch16_224", num_classes=10).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 10)


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradient_checkpointing_agree(name):
    model = create(name, num_classes=10).eval()
    logits = model(images())
    assert logits.shape == (2, 10) and logits.isfinite().all() and logits.std() > 0
    model.set_grad_checkpointing()
    assert_close(model(images()), logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 2},
        {"global_pool": "avg", "class_token": False},
        {"representation_size": 12, "drop_rate": 0.1, "drop_path_rate": 0.1},
    ],
)
def test_backward_reaches_every_parameter(name, options):
    model = create(name, num_classes=42, **options).train()
    logits = model(images())
    logits.square().mean().backward()
    assert logits.shape == (2, 42)
    without = [parameter for parameter, value in model.named_parameters() if value.grad is None]
    assert not without
    # experts that no token of this batch chose have zeros
    still = [name for name, value in model.named_parameters() if not value.grad.any() and ".experts." not in name]
    assert not still


@pytest.mark.parametrize("name", NAMES)
def test_classifier_and_pooling_can_be_taken_away(name):
    model = create(name).eval()
    tokens = model.forward_features(images())
    assert tokens.shape == (2, 17, model.num_features)
    features = model.forward_head(tokens, pre_logits=True)
    assert features.shape == (2, model.head_hidden_size)
    assert_close(model.get_classifier()(features), model(images()))
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(images()), features)
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), tokens)
    model.reset_classifier(5, "avg")
    assert model(images()).shape == (2, 5) and model.get_classifier().out_features == 5
    assert create(name, num_classes=0).eval()(images()).shape == (2, 32)
    assert create(name, num_classes=0, global_pool="").eval()(images()).shape == (2, 17, 32)


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    model = create(name, features_only=True).eval()
    assert model.feature_info.channels() == [32] * 3 and model.feature_info.reduction() == [8] * 3
    assert [tuple(level.shape) for level in model(images())] == [(2, 32, 4, 4)] * 3
    assert "num_classes" not in model.default_cfg
    for indices in ([0, 2], [-1]):
        model = create(name, features_only=True, out_indices=indices).eval()
        assert model.feature_info.module_name() == [f"blocks.{range(4)[i]}" for i in indices]
        whole = create(name).eval()
        expected = whole.forward_intermediates(images(), indices, intermediates_only=True)
        for level, wanted in zip(model(images()), expected, strict=True):
            assert_close(level, wanted)
    hooked = create(name, features_only=True, feature_cls="hook", out_indices=[1, 3]).eval()
    assert [tuple(level.shape) for level in hooked(images())] == [(2, 17, 32)] * 2


def test_forward_intermediates_with_each_of_its_options():
    model = create(reg_tokens=1).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    tokens = [images()]
    with torch.no_grad():
        tokens = [model.norm_pre(model._pos_embed(model.patch_embed(images())))]
        for block in model.blocks:
            tokens.append(block(tokens[-1]))
        final, levels = model.forward_intermediates(images())
        assert_close(final, model.forward_features(images()))
        assert len(levels) == len(info.channels()) == 4
        for fmt, norm, prefix in itertools.product(("NCHW", "NLC"), (False, True), (False, True)):
            levels = model.forward_intermediates(
                images(), [1, 3], output_fmt=fmt, norm=norm, return_prefix_tokens=prefix, intermediates_only=True
            )
            for level, i in zip(levels, (1, 3), strict=True):
                wanted = model.norm(tokens[i + 1]) if norm else tokens[i + 1]
                first, patches = wanted[:, :2], wanted[:, 2:]
                patches = patches.mT.reshape(2, 32, 4, 4) if fmt == "NCHW" else patches
                spatial, extra = level if prefix else (level, first)
                assert_close(spatial, patches)
                assert_close(extra, first)
        early, levels = model.forward_intermediates(images(), [0, 1], stop_early=True)
        assert_close(early, model.norm(tokens[2]))
        last_two = model.forward_intermediates(images(), 2, output_fmt="NLC", intermediates_only=True)
        assert_close(last_two[0], tokens[3][:, 2:])
        named = model.forward_intermediates(images(), [3], output_dict=True, return_prefix_tokens=True)
        assert set(named) == {"image_features", "image_intermediates", "image_intermediates_prefix"}
        assert_close(named["image_features"], final)


def test_parameter_groups_for_optimisers():
    model = create(reg_tokens=1)
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "reg_token", "dist_token"}
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    plain = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert id(model.pos_embed) in plain and id(model.blocks[1].mlp.experts[0]["fc1"].weight) not in plain
    layers = param_groups_layer_decay(model, 0.1, layer_decay=0.5)
    assert sum(len(group["params"]) for group in layers) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in layers for p in group["params"]}
    # embedding, four blocks, then norm and head: one half per layer from the head down
    assert scale[id(model.pos_embed)] == 0.5**5 and scale[id(model.head.weight)] == 1.0
    assert scale[id(model.blocks[1].mlp.router.weight)] == 0.5**3


def test_options_in_timms_words():
    model = create(drop_rate=0.3, proj_drop_rate=0.2, drop_path_rate=0.1, in_chans=1, dynamic_img_size=True)
    assert model.head_drop.p == 0.3 and model.config.drop_rate == model.blocks[0].attn.proj_drop.p == 0.2
    assert model.config.drop_path_rate == 0.1 and model.in_chans == 1 and model.config.moe.noise_std == 1.0
    assert model.eval()(images(48, channels=1)).shape == (2, 1000)
    model.set_input_size((48, 48))
    assert model.config.image_size == 48
    for options, message in (
        ({"mlp_ratio": 3}, r"options \['mlp_ratio'\] are not known; known: .*embed_dim"),
        ({"global_pool": "map"}, "global_pool 'map' is not known; use one of 'token', 'avg', ''"),
        ({"img_size": (32, 64)}, "img_size must be square, got 32x64"),
    ):
        with pytest.raises(ValueError, match=message):
            create(**options)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vmoe_base_patch16_224"):
        create(pretrained=True)


@pytest.fixture(scope="module", params=["5GB", 10_000], ids=["one file", "shards"])
def saved(request, tmp_path_factory):
    """(directory, model) as this project publishes it."""
    folder = tmp_path_factory.mktemp("saved")
    model = create("vmoe_m2mkd_base_patch16_224", num_classes=10, representation_size=12).eval()
    model.save_pretrained(folder, preprocessing=IMAGES, labels=list("abcdefghij"), max_shard_size=request.param)
    return folder, model


def test_saved_models_come_back_through_timm(saved):
    folder, model = saved
    source = f"local-dir:{folder}"
    loaded = timm.create_model(source, pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images())) and loaded.config == model.config
    data = timm.data.resolve_model_data_config(loaded)
    assert (tuple(data["mean"]), tuple(data["std"])) == (IMAGES.mean, IMAGES.std)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, 32, 32), 0.8, "bilinear")
    assert loaded.pretrained_cfg["label_names"] == list("abcdefghij")
    fresh = timm.create_model(source, drop_path_rate=0.2)
    assert fresh.config.drop_path_rate == 0.2 and not torch.equal(fresh.eval()(images()), model(images()))
    features = timm.create_model(source, pretrained=True, features_only=True).eval()
    for level, wanted in zip(features(images()), model.forward_intermediates(images(), 3)[1], strict=True):
        assert_close(level, wanted)


def test_saved_models_are_adapted_as_timm_adapts_its_own(saved):
    folder, model = saved
    source = f"local-dir:{folder}"
    changed = timm.create_model(source, pretrained=True, num_classes=5, in_chans=1, img_size=48, drop_path_rate=0.1)
    assert changed.eval()(images(48, channels=1)).shape == (2, 5) and changed.config.drop_path_rate == 0.1
    assert torch.equal(changed.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    # one channel stands for three equal ones
    grey = timm.create_model(source, pretrained=True, in_chans=1).eval()
    assert_close(grey(images(channels=1)), model(images(channels=1).expand(2, 3, 32, 32)))
    features = timm.create_model(source, pretrained=True, num_classes=0).eval()
    assert_close(model.head(features(images())), model(images()))
    mean = timm.create_model(source, pretrained=True, global_pool="avg").eval()
    assert torch.equal(mean.head.weight, model.head.weight) and mean.config.pool == "mean"
    with pytest.raises(ValueError, match="has depth 4, but 3 is asked for"):
        timm.create_model(source, pretrained=True, depth=3)


def test_what_timm_saves_comes_back(tmp_path):
    model = create(num_classes=10).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "vmoe_base_patch16_224"
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, img_size=48).num_classes == 3


def test_hub_models_come_through_timm(saved, tmp_path, monkeypatch):
    folder, model = saved
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path)
        commit = hub.seed("alice/model", folder)
        for source in ("hf-hub:alice/model", f"hf-hub:alice/model@{commit}"):
            loaded = timm.create_model(source, pretrained=True).eval()
            assert isinstance(loaded, VMoE) and loaded.source == f"alice/model@{commit}"
            assert torch.equal(loaded(images()), model(images()))
        other = timm.create_model("hf-hub:alice/model", pretrained=True, cache_dir=tmp_path / "cache")
        assert other.source == loaded.source and list((tmp_path / "cache").rglob("*.safetensors"))
