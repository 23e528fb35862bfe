"""Every architecture a teacher can have: the table of docs/teachers.md, image sizes, heads that are none, odd files."""

import json
import logging

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from vit_families import IMAGE_SIZE, edit_config, every_family, images, save_timm, scramble, taught, tiny

from benchmarks import teachers
from models.flops import forward_flops, num_tokens
from models.modules.meta import MetaModel
from models.modules.stages import split
from models.teacher.layouts import LAYOUTS
from models.teacher.load import TIMM_CLASSES, TIMM_MODULES, fingerprint, load_teacher
from models.teacher.refusals import REFUSED
from models.teacher.resize import set_image_size

TABLE = teachers.FILE.read_text()
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 48, "patch_size": 8}


def save(directory, model, size=IMAGE_SIZE):
    """A model of transformers as people save it, with a processor for images of this size."""
    scramble(model.eval())
    model.save_pretrained(directory)
    square = {"height": size, "width": size}
    transformers.ViTImageProcessor(size=square, do_normalize=True).save_pretrained(directory)
    return model


def clip(**changes):
    vision = SIZES | {"intermediate_size": 40, "image_size": IMAGE_SIZE}
    config = transformers.CLIPConfig(vision_config=vision | changes, text_config=teachers.TEXT)
    return transformers.CLIPModel(config)


@pytest.mark.parametrize("row", teachers.ROWS, ids=lambda row: f"{row.name}, {row.layout}")
def test_the_table_is_what_comes_out(row):
    assert teachers.line(row, teachers.measure(row)) in TABLE.splitlines()


def test_the_table_is_whole():
    assert TABLE.startswith(teachers.TEXT_ABOVE)
    assert len(TABLE.splitlines()) == len(teachers.TEXT_ABOVE.splitlines()) + len(teachers.ROWS)
    assert "not equal" not in TABLE and "differs by" not in TABLE
    assert len({row.name for row in teachers.ROWS}) >= 20


def test_every_model_type_has_a_row():
    types = set()
    for row in teachers.ROWS:
        if row.layout == "transformers":
            types.add(row.headless().config.model_type)
    vision_parts_alone = {"metaclip_2_vision_model", "siglip_vision_model", "aimv2"}
    assert set(LAYOUTS) - types <= vision_parts_alone


def test_ids_of_timm_are_those_it_knows():
    texts = [row.ids for row in teachers.ROWS] + [nearest for _, _, nearest in REFUSED.values()]
    names = [word.removeprefix("timm/").strip(",") for text in texts for word in text.split() if "timm/" in word]
    assert len(names) > 25
    assert set(names) <= set(timm.list_pretrained())


ARCHITECTURES = [
    name for name in timm.list_models() if timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1] in TIMM_MODULES
]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_every_architecture_of_timm_splits(architecture):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    if "sapiens2" in architecture:  # one number for each of its blocks
        sizes["num_kv_heads"] = (3, 1, 1, 3)
    model = timm.create_model(architecture, **sizes).eval().requires_grad_(False)
    scramble(model)
    assert type(model) in TIMM_CLASSES
    assert forward_flops(model, num_tokens(model)) > 0
    for size in (32, 48):
        model.set_input_size(img_size=(size, size))
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        in_turn = x
        for stage in split(model, [1, 2, 1]):
            in_turn = stage(in_turn)
        assert torch.equal(in_turn, taught(model, x))
        meta = MetaModel.from_teacher(model, 2, init="scratch", teacher_depths=[2, 2]).eval()
        assert meta(x).shape == in_turn.shape


# image sizes


@every_family
@torch.no_grad()
def test_another_image_size(tmp_path, family):
    model = tiny(family).requires_grad_(False)
    save_timm(tmp_path, model, crop_pct=0.8)
    own = load_teacher(str(tmp_path))
    larger = load_teacher(str(tmp_path), image_size=48)
    assert larger.preprocessing.image_size == 48
    assert larger.preprocessing.crop_pct == own.preprocessing.crop_pct == 0.8
    assert larger.model.patch_embed.grid_size == (6, 6)
    assert fingerprint(larger) == fingerprint(own)
    model.set_input_size(img_size=(48, 48))
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    assert torch.equal(taught(larger.model, x), taught(model, x))
    for stage in split(larger.model, [1, 3]):
        x = stage(x)
    again = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    assert torch.equal(x, taught(model, again))


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        (44, "the nearest are 40 and 48"),
        (3, "the nearest are 8"),
        (0, "the nearest are 8"),
        (33, "the nearest are 32 and 40"),
    ],
)
def test_sizes_that_do_not_fit_the_patches(tmp_path, size, nearest):
    save_timm(tmp_path, tiny("dinov3"))
    with pytest.raises(ValueError, match=f"{tmp_path}.*teacher.image_size {size} is no multiple.* 8: {nearest}"):
        load_teacher(str(tmp_path), image_size=size)


def test_images_that_are_not_square_need_a_size(tmp_path):
    save_timm(tmp_path, tiny("dinov3", img_size=(32, 24)))
    with pytest.raises(
        ValueError, match=r"takes 32x24 images; only square ones are supported: set teacher.image_size\."
    ):
        load_teacher(str(tmp_path))
    assert load_teacher(str(tmp_path), image_size=24).preprocessing.image_size == 24


@torch.no_grad()
def test_the_processor_says_the_size_where_every_size_goes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    original = save(tmp_path, transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SIZES)))
    teacher = load_teacher(str(tmp_path))  # positions of 48 pixels, a processor of 32
    assert teacher.preprocessing.image_size == teacher.model.patch_embed.img_size[0] == 32
    assert "images of 32 pixels, as its image processor makes them (not 48)" in caplog.text
    expected = original(pixel_values=images()).last_hidden_state
    torch.testing.assert_close(teacher.model.forward_features(images()), expected, rtol=1e-5, atol=1e-5)
    # of the positions as they were saved, not of those for 32 pixels
    whole = load_teacher(str(tmp_path), image_size=48)
    state = whole.model.state_dict()
    assert whole.as_saved == {}
    assert torch.equal(state["pos_embed"], original.state_dict()["embeddings.position_embeddings"][:, 1:])
    assert fingerprint(whole)["sha256"] == fingerprint(teacher)["sha256"]


def test_what_both_libraries_resample_alike_is_compared_again(tmp_path, monkeypatch):
    config = transformers.Dinov2WithRegistersConfig(**SIZES)
    save(tmp_path, transformers.Dinov2WithRegistersModel(config), size=48)

    def without_resampling(model, image_size):
        changed = set_image_size(model, image_size)
        model.pos_embed.data.zero_()
        return changed

    load_teacher(str(tmp_path), image_size=32)
    monkeypatch.setattr("models.teacher.load.set_image_size", without_resampling)
    with pytest.raises(RuntimeError, match="tokens differ from the original's"):
        load_teacher(str(tmp_path), image_size=32)


def test_a_processor_of_another_size_is_refused_where_one_size_goes(tmp_path):
    save(tmp_path, transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=40)))
    with pytest.raises(ValueError, match=r"gives 32x32 images .* takes 48x48"):
        load_teacher(str(tmp_path))


# heads that are none


@pytest.mark.parametrize(
    ("architecture", "width"), [("vit_base_patch32_clip_224", 512), ("vit_pe_core_tiny_patch16_384", 512)]
)
def test_a_projection_is_no_head(tmp_path, caplog, architecture, width):
    caplog.set_level(logging.INFO)
    model = timm.create_model(architecture, **teachers.TIMM_SIZES, num_classes=width).eval().requires_grad_(False)
    scramble(model)
    save_timm(tmp_path, model)
    teacher = load_teacher(str(tmp_path))
    assert (teacher.num_classes, teacher.model.num_classes) == (0, 0)
    assert "its head of 512 outputs is the projection of an image-text model" in caplog.text
    assert torch.equal(teacher.model.forward_features(images()), model.forward_features(images()))
    assert set(teacher.as_saved) == {"head.weight", "head.bias"}
    edit_config(tmp_path, label_names=[f"word {i}" for i in range(width)])
    assert fingerprint(load_teacher(str(tmp_path)))["sha256"] == fingerprint(teacher)["sha256"]


@pytest.mark.parametrize("num_classes", [512, 7])
def test_named_outputs_of_an_image_text_architecture_are_classes(tmp_path, num_classes):
    save_timm(tmp_path, tiny("clip", num_classes=num_classes))
    if num_classes == 512:
        edit_config(tmp_path, label_names=[f"word {i}" for i in range(num_classes)])
    assert load_teacher(str(tmp_path)).num_classes == num_classes


@torch.no_grad()
def test_a_head_on_class_token_and_mean_takes_another_number_of_classes(tmp_path):
    config = transformers.Dinov2Config(**SIZES, num_labels=4)
    save(tmp_path, transformers.Dinov2ForImageClassification(config), size=48)
    model = load_teacher(str(tmp_path)).model
    tokens = model.forward_features(torch.randn(2, 3, 48, 48))
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 48)
    model.reset_classifier(9)
    assert model.forward_head(tokens).shape == (2, 9)
    model.reset_classifier(0)
    assert torch.equal(model.forward_head(tokens), model.forward_head(tokens, pre_logits=True))


# files


@torch.no_grad()
def test_of_an_image_text_model_the_vision_part_is_read(tmp_path):
    original = save(tmp_path, clip()).vision_model
    weights = load_file(tmp_path / "model.safetensors")
    text = next(name for name in weights if name.startswith("text_model.") and name.endswith("fc1.weight"))
    weights[text][0, 0] = float("nan")  # nobody reads it
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # as old releases saved it
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    teacher = load_teacher(str(tmp_path))
    expected = original.post_layernorm(original(pixel_values=images()).last_hidden_state)
    torch.testing.assert_close(teacher.model.forward_features(images()), expected, rtol=1e-5, atol=1e-5)
    assert not any("text" in name or "projection" in name for name in teacher.model.state_dict())

    name = next(name for name in weights if name.startswith("vision_model.") and name.endswith("fc1.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 values in {name} that are NaN"):
        load_teacher(str(tmp_path))


def test_sizes_of_the_vision_part_are_checked_before_anything_is_built(tmp_path):
    save(tmp_path, clip())
    config = json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, vision_config=config["vision_config"] | {"num_hidden_layers": 1000000})
    with pytest.raises(ValueError, match="num_hidden_layers=1000000, which does not fit the 2 blocks"):
        load_teacher(str(tmp_path))
    edit_config(tmp_path, vision_config=[])
    with pytest.raises(ValueError, match=r"vision_config=\[\], expected an object"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_half_precision_shards_and_subfolders(tmp_path, layout, dtype):
    folder = tmp_path / "weights" / "half"
    if layout == "timm":
        save_timm(folder, tiny("eva02").to(dtype))
    else:
        model = save(folder, clip())
        model.to(dtype).save_pretrained(folder, max_shard_size="50KB")
        if (folder / "model.safetensors").exists():
            (folder / "model.safetensors").unlink()
        assert len(list(folder.glob("*.safetensors"))) > 1
    teacher = load_teacher(str(folder))
    assert {value.dtype for value in teacher.model.state_dict().values()} == {torch.float32}
    assert teacher.model(images()).isfinite().all()


def test_what_timm_has_no_model_for_is_said_in_one_line(tmp_path):
    settings = SIZES | {"intermediate_size": 40, "image_size": IMAGE_SIZE}
    save(tmp_path, transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**settings, key_bias=True)))
    with pytest.raises(ValueError, match=f"{tmp_path}: its keys have a bias") as refused:
        load_teacher(str(tmp_path))
    assert "\n" not in str(refused.value)
    edit_config(tmp_path, key_bias=False, use_gated_mlp=False, hidden_act="relu")
    with pytest.raises(ValueError, match=r"do not fit its config|activation 'relu' is not gelu"):
        load_teacher(str(tmp_path))


def test_augmentation_of_training_is_off(tmp_path):
    """Coordinates of a rotary embedding and patches that are drawn in training: every stage would draw its own."""
    save_timm(tmp_path, tiny("dinov3"))
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    edit_config(tmp_path, model_args=arguments | {"rope_rescale_coords": 2.0, "patch_drop_rate": 0.5})
    built = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert built.rope.aug_active and built.patch_drop is not None
    teacher = load_teacher(str(tmp_path)).model.train()
    stages = split(teacher, [2, 2])
    assert torch.equal(stages[1](stages[0](images())), teacher.forward_features(images()))
