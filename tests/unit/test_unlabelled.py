"""Images without labels: flat folders, hub sets without a label column, and settings that cannot do without labels."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from models.modules.meta import MetaModel
from trainer.config.data import DataConfig
from trainer.config.load import load_recipe
from trainer.context import Run
from trainer.data.classes import describe, doubts
from trainer.data.fingerprint import fingerprint
from trainer.data.sources import open_source
from trainer.distributed.ranks import Dist
from trainer.teaching.students import student_config
from trainer.teaching.teachers import planned_teacher

COUNT = 10


def fill(folder, count=COUNT, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for value in range(start, start + count):
        Image.new("RGB", (8, 8), (value, value, value)).save(folder / f"{value:03}.png")
    return folder


def config(path, **more) -> DataConfig:
    return DataConfig(source="folder", path=str(path), **more)


def greys(source) -> list[int]:
    return [source.image(index).getpixel((0, 0))[0] for index in range(len(source))]


def test_flat_folders_of_both_splits_are_images_without_labels(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val", 4, start=100)
    train, val = (open_source(config(tmp_path), split, labels_needed=False) for split in ("train", "val"))
    assert (train.labels, val.labels) == ([], [])
    assert greys(train) == list(range(10))
    assert greys(val) == [100, 101, 102, 103]
    assert {train.label(index) for index in range(len(train))} == {0}
    assert describe(train, val) == "without labels"
    assert doubts(train, val) == []
    assert fingerprint(train)["images"] == 10
    assert fingerprint(train)["classes"] == {}
    assert fingerprint(train)["sha256"] != fingerprint(
        open_source(config(tmp_path, limit=5), "train", labels_needed=False)
    )


def test_a_flat_folder_without_splits_is_held_out_the_same_way_every_time(tmp_path):
    fill(tmp_path)
    data = config(tmp_path, val_share=0.3)
    train, val = (open_source(data, split, labels_needed=False) for split in ("train", "val"))
    assert (len(train), len(val)) == (7, 3)
    assert sorted(greys(train) + greys(val)) == list(range(10))
    again = open_source(data, "val", labels_needed=False)
    assert greys(again) == greys(val)
    assert greys(val) != [0, 1, 2]  # drawn, not the first of them


def test_where_labels_are_needed_a_flat_folder_is_refused_with_the_next_step(tmp_path):
    fill(tmp_path / "train")
    with pytest.raises(ValueError, match=r"no class folders in .*train; expected images .* teacher.head=none"):
        open_source(config(tmp_path, val_split="train"), "train")
    with pytest.raises(ValueError, match=r"no class folders in .*flat; expected images .* teacher.head=none"):
        open_source(config(fill(tmp_path / "flat"), val_share=0.5), "train")


def test_class_folders_stay_classes_also_where_no_label_is_needed(tmp_path):
    fill(tmp_path / "train" / "cat", 2)
    fill(tmp_path / "train" / "dog", 2)
    fill(tmp_path / "train", 1, start=50)  # a stray picture
    source = open_source(config(tmp_path, val_split="train"), "train", labels_needed=False)
    assert source.labels == ["cat", "dog"]
    assert source.remarks == "left out: 1 beside the class folders (.png 1)"


def test_a_flat_split_beside_one_of_class_folders_is_refused(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val" / "cat")
    fill(tmp_path / "val" / "dog")
    with pytest.raises(ValueError, match=r"holds pictures without class folders, but .*val does not"):
        open_source(config(tmp_path), "val", labels_needed=False)


def test_one_class_folder_stays_refused(tmp_path):
    fill(tmp_path / "train" / "cat")
    with pytest.raises(ValueError, match="has one class"):
        open_source(config(tmp_path, val_split="train"), "train", labels_needed=False)


def saved(path, **columns) -> DataConfig:
    images = [{"bytes": None, "path": str(file)} for file in sorted(fill(path / "pictures").glob("*.png"))]
    features = datasets.Features({"image": datasets.Image(), **{name: datasets.Value("int64") for name in columns}})
    split = datasets.Dataset.from_dict({"image": images, **columns}, features)
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(str(path / "data"))
    return DataConfig(source="hub", path=str(path / "data"))


def test_a_hub_set_without_the_label_column_is_images_without_labels(tmp_path):
    source = open_source(saved(tmp_path), "val", labels_needed=False)
    assert source.labels == []
    assert source.targets.tolist() == [0] * COUNT
    with pytest.raises(ValueError, match=r"data.label_key 'label' is not a column .* teacher.head=none"):
        open_source(saved(tmp_path / "again"), "val")


def test_a_label_column_that_is_named_has_to_be_there(tmp_path):
    data = DataConfig(source="hub", path=saved(tmp_path, kind=[0, 1] * 5).path, label_key="kinds")
    with pytest.raises(ValueError, match=r"data.label_key 'kinds' is not a column .* there: image, kind"):
        open_source(data, "train", labels_needed=False)
    named = DataConfig(source="hub", path=data.path, label_key="kind")
    assert np.bincount(open_source(named, "train", labels_needed=False).targets).tolist() == [5, 5]


def test_hub_reads_a_flat_folder_as_folder_does(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "validation", 4, start=100)
    for split in ("train", "val"):
        by_folder, by_hub = (
            open_source(DataConfig(source=source, path=str(tmp_path)), split, labels_needed=False)
            for source in ("folder", "hub")
        )
        assert by_hub.labels == by_folder.labels == []
        assert greys(by_hub) == greys(by_folder)


def recipe(tmp_path, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text("student: {patch_size: 4, width: 8, depth: 4, heads: 2, mlp_dim: 16}\n")
    return load_recipe(path, list(overrides))


def test_what_needs_labels_is_named(tmp_path):
    given = "teacher.source=owner/name"
    assert recipe(tmp_path).needs_labels().startswith("teacher.source=''")
    assert recipe(tmp_path, given, "teacher.head=own").needs_labels() == "teacher.head=own"
    assert recipe(tmp_path, given, "teacher.head=probe").needs_labels() == "teacher.head=probe"
    assert recipe(tmp_path, given, "meta.objective=labels").needs_labels() == "meta.objective=labels"
    assert recipe(tmp_path, given).needs_labels() == ""
    assert recipe(tmp_path, given, "teacher.head=none").needs_labels() == ""


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("meta.objective=labels", "meta.objective is 'labels', expected theseus or matching"),
        ("meta.kl_weight=0", "meta.kl_weight is 0.*final tokens"),
        ("distill.border_weight=0", "distill.border_weight is 0.*the border is all"),
        ("teacher.grown=true", "with teacher.head=none"),
    ],
)
def test_settings_that_have_no_meaning_without_a_head_are_refused(tmp_path, setting, message):
    overrides = ["teacher.head=none", "teacher.source=owner/name", setting]
    if setting == "teacher.grown=true":
        overrides += ["teacher.source=''", "meta.init=scratch", "meta.objective=labels"]
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, *overrides)


def test_keys_for_labels_alone_are_named(tmp_path):
    set_ones = ["distill.tau=2.0", "train.kd_weight=0.5", "augment.label_smoothing=0.1"]
    found = recipe(tmp_path, "teacher.head=none", *set_ones).without_effect()
    assert found == ["augment.label_smoothing", "distill.tau", "train.kd_weight"]
    assert recipe(tmp_path, "teacher.head=none", "distill.border=mse", "augment.mixup=0.2").without_effect() == []


def test_a_teacher_that_is_still_to_be_trained_is_planned_without_its_head(tmp_path):
    """Labelled digits, which it is trained on; what it teaches are features."""
    plain = recipe(tmp_path, "teacher.head=none", "teacher.width=8", "teacher.heads=2", "teacher.depth=4")
    alone = Dist(0, 1, 0, 1, torch.device("cpu"))
    run = Run(plain, {}, tmp_path, alone, "test")
    assert not run.classifies
    assert len(run.labels) == 10
    run = run.with_teacher(planned_teacher(plain.teacher, run.labels))
    assert run.teacher.num_classes == 0
    assert not MetaModel(run.teacher_stages()).classifies
    assert run.classes == []
    config = student_config(run)
    # patches of 4 pixels; as wide as the teacher, so there is nothing between its tokens and the teacher's
    assert (config.num_classes, config.width, config.feature_width) == (0, 8, 0)
    wider = run.with_student(width=16)
    assert student_config(wider).feature_width == 8
