"""Teachers from transformers and timm directories."""

import json
import shlex

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from transformers import DeiTImageProcessor, ViTImageProcessor
from vit_families import TINY, edit_config, every_family, images, save_timm, save_transformers, tiny

from models.preprocessing import Preprocessing
from models.teacher import layouts, refusals
from models.teacher.load import load_teacher, new_teacher, save_teacher

IMAGENET_MEAN = (0.485, 0.456, 0.406)
SQUASH = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "squash")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_norm_eps": 0.3},  # large enough to show in the logits if it were not carried over
        {"qkv_bias": False},
        {"num_attention_heads": 6, "num_labels": 7},
        {"hidden_act": "gelu_new", "num_channels": 1},
        {"hidden_size": 42, "intermediate_size": 51},  # int(42 * (51 / 42)) is 50
    ],
)
@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"]
)
def test_transformers_logits(tmp_path, name, changes):
    channels = changes.get("num_channels", 3)
    mean = [0.5] * channels
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=mean, image_std=mean)
    original = save_transformers(tmp_path, name, processor, **changes)
    teacher = load_teacher(str(tmp_path))
    x = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original(pixel_values=x).logits
        assert torch.allclose(teacher.model(x), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1
    assert teacher.num_classes == teacher.model.num_classes == expected.shape[1]
    assert teacher.source == str(tmp_path)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.model.num_prefix_tokens == (1 if name.startswith("ViT") else 2)


@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_weights_are_there_also_inside_a_meta_device(tmp_path, layout):
    if layout == "timm":
        save_timm(tmp_path, tiny("vit"))
    else:
        save_transformers(tmp_path, "ViTForImageClassification")
    with torch.device("meta"):
        teacher = load_teacher(str(tmp_path))
    assert torch.equal(teacher.model(images()), load_teacher(str(tmp_path)).model(images()))


def test_conversion_checks_itself(tmp_path, monkeypatch):
    save_transformers(tmp_path, "ViTForImageClassification", layer_norm_eps=0.3)
    monkeypatch.setattr(layouts, "partial", lambda norm, eps: norm)
    with pytest.raises(RuntimeError, match="tokens differ"):
        load_teacher(str(tmp_path))


def test_labels(tmp_path):
    names = {0: "cat", 1: "dog", 2: "eel"}
    save_transformers(tmp_path / "named", "ViTForImageClassification", id2label=names, num_labels=3)
    save_transformers(tmp_path / "unnamed", "ViTForImageClassification")
    assert load_teacher(str(tmp_path / "named")).labels == ["cat", "dog", "eel"]
    assert load_teacher(str(tmp_path / "unnamed")).labels is None


def test_processor_squash_and_crop(tmp_path):
    save_transformers(tmp_path, "ViTForImageClassification")
    # google/vit-*: an old config with a bare size and no resampling named is a plain bilinear resize
    old = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert load_teacher(str(tmp_path)).preprocessing == SQUASH

    deit = DeiTImageProcessor(
        size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}, image_mean=IMAGENET_MEAN
    )
    deit.save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path)).preprocessing == Preprocessing(
        32, IMAGENET_MEAN, (0.5,) * 3, "bicubic", 32 / 36, "squash"
    )
    square = {"height": 32, "width": 32}
    ViTImageProcessor(size={"shortest_edge": 36}, do_center_crop=True, crop_size=square).save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path)).preprocessing == Preprocessing(
        32, (0.5,) * 3, (0.5,) * 3, "bilinear", 32 / 36, "center"
    )
    ViTImageProcessor(size=square, do_normalize=False).save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path)).preprocessing.mean == (0, 0, 0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": {"height": 64, "width": 64}}, "gives 64x64 images .* takes 32x32"),
        ({"size": {"shortest_edge": 32}}, "no square images"),
        ({"size": {"height": 32, "width": 32}, "do_rescale": False}, "do_rescale=False .* white ends at 255"),
    ],
)
def test_processor_that_does_not_fit(tmp_path, settings, message):
    save_transformers(tmp_path, "ViTForImageClassification", ViTImageProcessor(**settings))
    with pytest.raises(ValueError, match=message):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("crop_pct, crop_mode", [(1.0, "squash"), (0.9, "center"), (0.875, "squash"), (1.0, "center")])
def test_new_teacher_survives_the_disk(tmp_path, crop_pct, crop_mode):
    preprocessing = Preprocessing(32, (0.1, 0.2, 1 / 3), (0.4, 0.5, 0.6), "bicubic", crop_pct, crop_mode)
    model = new_teacher(
        image_size=32,
        patch_size=8,
        width=24,
        depth=2,
        heads=3,
        mlp_dim=50,
        labels=["a", "b", "c"],
        preprocessing=preprocessing,
    )
    save_teacher(model, tmp_path, preprocessing)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    teacher = load_teacher(str(tmp_path))
    assert teacher.preprocessing == preprocessing
    assert teacher.labels == ["a", "b", "c"]
    with torch.no_grad():
        assert torch.allclose(teacher.model(images()), model.eval()(images()), rtol=0, atol=1e-5)


def test_new_teacher_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of patch_size 5"):
        new_teacher(
            image_size=32, patch_size=5, width=24, depth=1, heads=3, mlp_dim=48, labels=["a"], preprocessing=SQUASH
        )


# timm


@every_family
def test_timm_directory(tmp_path, family):
    model = tiny(family, depth=2).requires_grad_(False)  # torch picks other kernels where gradients are wanted
    save_timm(tmp_path, model, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.9, interpolation="bilinear")
    teacher = load_teacher(str(tmp_path))
    assert torch.equal(teacher.model(images()), model(images()))
    assert teacher.preprocessing == Preprocessing(
        32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9, teacher.preprocessing.crop_mode
    )
    assert teacher.num_classes == model.num_classes
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_timm_labels(tmp_path):
    save_for_hf(tiny("vit"), tmp_path, safe_serialization=True, model_config={"label_names": list("abcde")})
    assert load_teacher(f"local-dir:{tmp_path}").labels == list("abcde")
    edit_config(tmp_path, label_names={str(i): name for i, name in enumerate("vwxyz")})
    assert load_teacher(str(tmp_path)).labels == list("vwxyz")


def test_timm_head_that_config_contradicts(tmp_path):
    save_timm(tmp_path, tiny("vit"))
    edit_config(tmp_path, model_args={**TINY, "depth": 4, "num_classes": 9})  # timm would start a head at random
    with pytest.raises(ValueError, match=r"head of 9 classes .*5 classes"):
        load_teacher(str(tmp_path))


# refusals


@pytest.mark.parametrize(
    "architecture, family, nearest",
    [
        ("vit_relpos_small_patch16_224", "relative-position ViT", "beitv2"),
        ("samvit_base_patch16", "SAM", "mae"),
        ("naflexvit_base_patch16_gap", "NaFlex", "siglip"),
        ("vit_base_r50_s16_224", "hybrid ViT", "augreg"),
        ("swin_tiny_patch4_window7_224", "Swin", "vit_base"),
        ("pvt_v2_b0", "PVT v2", "vit_base"),
        ("resnet18", "ResNet", "vit_base"),
        ("convnext_tiny", "ConvNeXt", "vit_base"),
    ],
)
def test_timm_families_refused_by_name(tmp_path, architecture, family, nearest):
    assert timm.is_model(architecture)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "num_classes": 5}))
    with pytest.raises(ValueError, match=f"{architecture}.*{family}: .*The nearest that works: .*{nearest}") as refused:
        load_teacher(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "config_class, family, nearest",
    [
        ("SwinConfig", "Swin", "vit_base"),
        ("SamConfig", "SAM", "mae"),
        ("VitDetConfig", "ViTDet", "mae"),
        ("Siglip2VisionConfig", "SigLIP 2 NaFlex", "siglip2-base-patch16-224"),
        ("PvtConfig", "PVT", "vit_base"),
        ("ConvNextConfig", "ConvNeXt", "vit_base"),
        ("DINOv3ConvNextConfig", "DINOv3 ConvNeXt", "dinov3"),
    ],
)
def test_transformers_families_refused_by_name(tmp_path, config_class, family, nearest):
    getattr(transformers, config_class)().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{family}: .*The nearest that works: .*{nearest}") as refused:
        load_teacher(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_other_families_are_refused_with_what_is_supported(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'bert'.*not a vision transformer of this list"):
        load_teacher(str(tmp_path))


def test_families_that_are_refused_are_those_of_the_libraries():
    known = set(transformers.CONFIG_MAPPING) | {
        timm.model_entrypoint(n).__module__.split(".")[-1] for n in timm.list_models()
    }
    assert set(refusals.REFUSED) - {"NaFlexVit"} <= known
    assert not set(refusals.REFUSED) & set(layouts.LAYOUTS)


def test_other_timm_models(tmp_path):
    save_timm(tmp_path, tiny("vit"))
    edit_config(tmp_path, model_args={**TINY, "depth": 4, "use_naflex": True})  # a ViT by name, another class
    with pytest.raises(ValueError, match=r"NaFlexVit.*cannot be split"):
        load_teacher(str(tmp_path))
    edit_config(tmp_path, architecture="no_such_vit")
    with pytest.raises(ValueError, match="knows no architecture 'no_such_vit'"):
        load_teacher(str(tmp_path))


def test_distilled_deit_read_as_plain_gets_no_random_head(tmp_path):
    save_transformers(tmp_path, "DeiTForImageClassificationWithTeacher")
    edit_config(tmp_path, architectures=["DeiTForImageClassification"])
    with pytest.raises(ValueError, match=r"do not fit .*classifier\.weight.*DeiTForImageClassificationWithTeacher"):
        load_teacher(str(tmp_path))


@torch.no_grad()
def test_checkpoint_without_head_gives_features(tmp_path):
    original = save_transformers(tmp_path, "ViTModel")
    teacher = load_teacher(str(tmp_path))
    assert (teacher.num_classes, teacher.model.num_classes, teacher.labels) == (0, 0, None)
    expected = original(pixel_values=images()).last_hidden_state
    torch.testing.assert_close(teacher.model.forward_features(images()), expected, rtol=1e-5, atol=1e-5)


def test_weights_that_lack_a_block(tmp_path):
    save_transformers(tmp_path, "ViTForImageClassification")
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if ".layer.1." not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"num_hidden_layers=3, which does not fit the 2 blocks"):
        load_teacher(str(tmp_path))


def test_pooler_left_from_pretraining_is_no_obstacle(tmp_path):
    save_transformers(tmp_path, "ViTForImageClassification")
    weights = load_file(tmp_path / "model.safetensors") | {"vit.pooler.dense.weight": torch.zeros(24, 24)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    load_teacher(str(tmp_path))
    save_file(weights | {"vit.strange.weight": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected \['vit\.strange\.weight'\]"):
        load_teacher(str(tmp_path))


def test_directories_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_teacher(str(tmp_path))
    (tmp_path / "config.json").write_text('{"hidden": 3}')
    with pytest.raises(ValueError, match="names no transformers model_type"):
        load_teacher(str(tmp_path))
    with pytest.raises(ValueError, match="is not a directory"):
        load_teacher(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="has no revision"):
        load_teacher(str(tmp_path), revision="main")


def test_missing_preprocessing_is_refused(tmp_path):
    save_transformers(tmp_path, "ViTForImageClassification")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_pickled_weights_are_refused(tmp_path, layout, monkeypatch):
    if layout == "timm":
        save_timm(tmp_path, tiny("vit"))
    else:
        save_transformers(tmp_path, "ViTForImageClassification")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="Only safetensors") as refused:
        load_teacher(str(tmp_path))
    # the command it names makes the weights that are read
    command = shlex.split(str(refused.value).partition("FOLDER): ")[2])
    assert command[:2] == ["python", "-c"]
    monkeypatch.chdir(tmp_path)
    exec(command[2], {})
    load_teacher(str(tmp_path))


def test_code_of_a_checkpoint_never_runs(tmp_path):
    save_transformers(tmp_path, "ViTForImageClassification")
    edit_config(tmp_path, auto_map={"AutoModelForImageClassification": "evil.Model", "AutoConfig": "evil.Config"})
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    load_teacher(str(tmp_path))
