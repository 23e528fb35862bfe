"""Image processors as people save them: the same pixels as the processor's own, or refused by name."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from vit_families import save_transformers

from models.teacher.images import from_processor
from models.teacher.load import load_teacher
from trainer.data.transforms import eval_transform

PLAIN = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}
EFFICIENT = {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True, "rescale_factor": 1 / 127.5}
CROP = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
CLIP = {"image_processor_type": "CLIPImageProcessor"}
OF_8_BITS = {"image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}


@pytest.fixture
def saved(tmp_path):
    """Read the image settings of a folder, PLAIN with changes, as `load_teacher` does."""
    model = SimpleNamespace(patch_embed=SimpleNamespace(img_size=(32, 32)), in_chans=3)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')

    def read(changes):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(PLAIN | changes))
        processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        return processor, from_processor(processor, model)

    return read


def pictures() -> list[Image.Image]:
    """Noise, wide and tall; of sizes that leave an even number of pixels beside a crop, which both libraries halve."""
    draws = np.random.default_rng(1)
    made = []
    for height, width in ((60, 100), (120, 72)):
        made.append(Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8)))
    return made


def same_pixels(processor, preprocessing) -> None:
    for picture in pictures():
        theirs = processor(images=picture, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(eval_transform(preprocessing)(picture), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": 0, "image_std": [0.2, 0.3, 0.4]},
        {"do_normalize": False},
        {"do_normalize": False, "image_mean": None, "image_std": None},
        EFFICIENT | {"include_top": False},
        EFFICIENT | {"include_top": True},
        EFFICIENT | {"include_top": True, "image_mean": 0.5, "image_std": 0.5},
        EFFICIENT | {"include_top": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
        {"rescale_factor": 0.003921569},  # as printed with ten digits
        {"do_rescale": False, **OF_8_BITS},
        {"rescale_factor": 1.0, **OF_8_BITS},
        {"size": 32},
        {"size": {"height": 36, "width": 36}, **CROP},
        {"size": {"shortest_edge": 36}, **CROP},
        CLIP | {"size": 36, **CROP, "crop_size": 32},
        {"do_center_crop": False, "crop_size": {"height": 24, "width": 24}},
        {"do_convert_rgb": True},
        {"do_convert_rgb": False},
        {"image_processor_type": "BeitImageProcessor"},
        {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor"},
        {"image_processor_type": "ViTImageProcessorFast"},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_pixels_are_those_of_the_processor(saved, changes):
    same_pixels(*saved(changes))


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
OLD = {"do_rescale": None, "rescale_factor": None}  # not written by early releases


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("dinov2", {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36}, **CROP, **IMAGENET,
                    "resample": 3, "do_convert_rgb": True}, ("bicubic", 32 / 36, "center")),
        ("dinov3_vit", {"image_processor_type": "DINOv3ViTImageProcessorFast", "crop_size": None, "device": None,
                        "do_center_crop": None, **IMAGENET}, ("bilinear", 1.0, "squash")),
        ("clip", {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 32,
                  "do_center_crop": True, "size": 32, "resample": 3, **OPENAI, **OLD}, ("bicubic", 1.0, "center")),
        ("metaclip_2", {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 32}, **CROP,
                        "resample": 3, **OPENAI}, ("bicubic", 1.0, "center")),
        ("siglip", {"image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor"},
         ("bilinear", 1.0, "squash")),
        ("vit_mae", {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor", "size": 32,
                     "resample": 3, **IMAGENET, **OLD}, ("bicubic", 1.0, "squash")),
        ("beit", {"image_processor_type": None, "feature_extractor_type": "BeitFeatureExtractor", "crop_size": 32,
                  "do_center_crop": False, "size": 32, "reduce_labels": False, **OLD}, ("bilinear", 1.0, "squash")),
    ],
)  # fmt: skip
def test_processors_as_the_hub_has_them(tmp_path, model_type, changes, expected):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = {key: value for key, value in (PLAIN | changes).items() if value is not None or key not in OLD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    model = SimpleNamespace(patch_embed=SimpleNamespace(img_size=(32, 32)), in_chans=3)
    preprocessing = from_processor(processor, model)
    assert (preprocessing.interpolation, preprocessing.crop_pct, preprocessing.crop_mode) == expected
    assert list(preprocessing.mean) == settings["image_mean"]


def test_a_processor_that_knows_no_pil_differs_by_rounding(saved):
    """DINOv3's resizes floats; PIL rounds to 8 bits in between."""
    processor, preprocessing = saved({"image_processor_type": "DINOv3ViTImageProcessorFast"})
    steps = torch.tensor(preprocessing.std).view(3, 1, 1) * 255
    for picture in pictures():
        theirs = processor(images=picture, return_tensors="pt").pixel_values[0]
        difference = (eval_transform(preprocessing)(picture) - theirs).abs() * steps
        assert 0.1 < difference.max() < 1.1


@pytest.mark.parametrize("resample", range(6))
def test_every_way_to_resize_is_its_own(saved, resample):
    same_pixels(*saved({"resample": resample}))


def test_digits_of_usual_statistics_are_kept(saved):
    _, preprocessing = saved({"rescale_factor": 0.00392156862745098})
    assert (preprocessing.mean, preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize=False: pictures would reach the model in any size"),
        ({"do_rescale": False}, r"do_rescale=False and .*white ends at 255.* do_rescale true"),
        ({"do_rescale": False, "do_normalize": False}, r"do_rescale=False and .*white ends at 255"),
        ({"rescale_factor": 1 / 255**2}, r"rescale_factor=1\.5.*white ends at 0\.0039"),
        ({"rescale_factor": 0}, "rescale_factor is 0, expected a number above 0"),
        ({"rescale_factor": -1 / 255}, "rescale_factor is -0.0039.*, expected a number above 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255', expected a number"),
        (OF_8_BITS, r"white ends at 1, and mean \(123.675, 116.28, 103.53\)"),
        ({"image_mean": [0.5]}, r"image_mean is \(0.5,\), expected one number or 3"),
        ({"image_std": [0.5] * 4}, r"image_std is \(0.5, 0.5, 0.5, 0.5\), expected one number or 3"),
        ({"image_mean": ["0.5", "0.5", "0.5"]}, "image_mean is .*'0.5'.*, expected one number or 3"),
        ({"image_mean": None}, "image_mean is|transformers cannot load"),
        ({"image_std": [0.2, 0.0, 0.4]}, r"std \(0.2, 0.0, 0.4\)"),
        ({"image_std": 0}, r"std \(0.0, 0.0, 0.0\)"),
        ({"image_std": [0.2, float("nan"), 0.4]}, r"std \(0.2, nan, 0.4\)"),
        ({"image_mean": [float("inf"), 0.5, 0.5]}, r"mean \(inf, 0.5, 0.5\)"),
        ({"size": {"height": 40, "width": 36}, **CROP}, "no square images"),
        ({"size": {"shortest_edge": 36}}, "no square images"),
        ({"size": {"shortest_edge": 36, "longest_edge": 50}, **CROP}, "no square images"),
        ({"size": {"shortest_edge": 24}, **CROP}, r"gives 32x32 images \(resized to 24\)"),
        ({"size": {"height": 36, "width": 36}, **CROP, "crop_size": {"height": 32, "width": 30}}, "gives 32x30 images"),
        ({"resample": 7}, "transformers cannot load|resample is 7"),
        ({"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True, **CROP},
         r"MobileViTImageProcessor\w*\) gives other pixels.*do_flip_channel_order=True"),
        ({"image_processor_type": "VideoMAEImageProcessor", **CROP}, "VideoMAEImageProcessor"),
        ({"do_pad": True, "pad_size": {"height": 48, "width": 48}}, "gives other pixels.*do_pad=True"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_said_is_refused_by_name(saved, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        saved(changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_std": [0.2, 0.0, 0.4]}, r"std \(0.2, 0.0, 0.4\)"),
        ({"size": "large"}, "transformers cannot load"),
        ({"size": {"height": "32", "width": "32"}}, "expected whole numbers of pixels"),
        ({"image_processor_type": "NoSuchProcessor"}, "."),
        ({"resample": "bicubic"}, "resample is 'bicubic', expected one of"),
    ],
)
def test_a_teacher_with_such_a_processor_is_refused_in_one_line(tmp_path, changes, message):
    save_transformers(tmp_path, "ViTForImageClassification")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PLAIN | changes))
    with pytest.raises(ValueError, match=message) as refused:
        load_teacher(str(tmp_path))
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_two_processors_in_one_folder_must_agree(tmp_path):
    """New releases of transformers save it inside processor_config.json, and read it there first."""
    save_transformers(tmp_path, "ViTForImageClassification")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PLAIN))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PLAIN}))
    assert load_teacher(str(tmp_path)).preprocessing.mean == (0.5, 0.4, 0.3)
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_teacher(str(tmp_path)).preprocessing.mean == (0.5, 0.4, 0.3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PLAIN))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PLAIN | {"image_mean": [0.5] * 3}}))
    with pytest.raises(
        ValueError, match=r"two image processors: image_mean is \[0.5, 0.4, 0.3\] in preprocessor_config"
    ):
        load_teacher(str(tmp_path))
