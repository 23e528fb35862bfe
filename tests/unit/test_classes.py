"""Labels of a data set: names and numbers, splits that disagree, images per class, and what is held out."""

import unicodedata

import datasets
import numpy as np
import pytest
from PIL import Image

from trainer.config.data import DataConfig
from trainer.data.classes import describe, doubts, held_out
from trainer.data.sources import open_source

NAMES = ["owl", "cat", "dog"]
INTEGERS, TEXT = datasets.Value("int64"), datasets.Value("string")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (value, value, value))


def split_of(labels: list, feature) -> datasets.Dataset:
    """Row i is i in grey."""
    columns = {"image": [picture(value) for value in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(columns, datasets.Features(image=datasets.Image(), label=feature))


def saved(path, train, validation, feature, other_feature=None, **more) -> DataConfig:
    splits = {"train": split_of(train, feature)}
    if validation is not None:
        splits["validation"] = split_of(validation, other_feature or feature)
    datasets.DatasetDict(splits).save_to_disk(path)
    return DataConfig(source="hub", path=str(path), **more)


def opened(config: DataConfig):
    return open_source(config, "train"), open_source(config, "val")


def folder(root, counts: dict[str, int], split: str = "") -> None:
    for name, count in counts.items():
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            picture(i).save(root / split / name / f"{i}.png")


# names and numbers


@pytest.mark.parametrize(("numbers", "names"), [([1, 2, 3], ["1", "2", "3"]), ([3, 17, 250], ["3", "17", "250"])])
def test_integers_that_start_at_1_or_have_gaps_make_no_empty_classes(tmp_path, numbers, names):
    train, val = opened(saved(tmp_path, numbers * 2, numbers[::-1], INTEGERS))
    assert train.labels == val.labels == names and train.named
    assert (train.targets.tolist(), val.targets.tolist()) == ([0, 1, 2, 0, 1, 2], [2, 1, 0])
    assert f"label numbers {', '.join(names)} are the classes 0 to 2" in train.remarks
    assert train.counts.tolist() == [2, 2, 2]


def test_integers_from_0_have_no_names_and_need_no_word(tmp_path):
    train, _ = opened(saved(tmp_path, [1, 0], [0], INTEGERS))
    assert (train.labels, train.named, train.remarks) == (["0", "1"], False, "")
    assert opened(saved(tmp_path / "c", [1, 0], [0], datasets.ClassLabel(2)))[0].named


def test_class_labels_of_the_splits_in_another_order_are_read_by_name(tmp_path):
    train, val = opened(
        saved(tmp_path, [0, 1, 2], [0, 1, 2], datasets.ClassLabel(names=NAMES), datasets.ClassLabel(names=NAMES[::-1]))
    )
    assert train.labels == val.labels == NAMES
    assert val.targets.tolist() == [2, 1, 0]


def test_text_in_one_split_and_class_labels_in_the_other_are_read_by_name(tmp_path):
    _, val = opened(saved(tmp_path, [0, 1, 2], ["dog", "owl"], datasets.ClassLabel(names=NAMES), TEXT))
    assert val.targets.tolist() == [2, 0]


def test_the_two_unicode_forms_of_a_name_are_one_class(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Kühe")
    folder(tmp_path, {"Kühe": 1, "Bär": 1, "Kz": 1}, "train")
    folder(tmp_path, {decomposed: 1, "Bär": 1, "Kz": 1}, "validation")
    train, val = opened(DataConfig(source="folder", path=str(tmp_path)))
    assert train.labels == val.labels == ["Bär", "Kz", "Kühe"]
    text = saved(tmp_path / "h", ["Kühe", "Bär"], [decomposed], TEXT)
    assert opened(text)[1].targets.tolist() == [1]
    folder(tmp_path, {decomposed: 1}, "train")
    with pytest.raises(ValueError, match=r"'Ku\\u0308he' and 'K\\xfche'|'K\\xfche' and 'Ku\\u0308he'"):
        open_source(DataConfig(source="folder", path=str(tmp_path), val_split="train"), "train")


@pytest.mark.parametrize(
    ("train", "validation", "feature", "other", "parts"),
    [
        ([0, 1, 2], [0], datasets.ClassLabel(names=NAMES), datasets.ClassLabel(names=["Owl", "cat", "dog"]),
         ["only in train: owl; only in validation: Owl", "differ only in case"]),
        ([0, 1, 2], [0], datasets.ClassLabel(names=NAMES), datasets.ClassLabel(names=["fox", "cat", "dog"]),
         ["only in train: owl; only in validation: fox"]),
        (["owl", "cat"], ["Owl"], TEXT, None, ["row 0 is labelled 'Owl'", "'owl' differs in case"]),
        ([1, 2], [0, 1], INTEGERS, None, ["row 0 is labelled 0", "of split 'train' (1, 2)"]),
        ([1, 2], ["1", "2"], INTEGERS, TEXT, ["the same kind of labels"]),
        ([0, 1], [0, 1], datasets.ClassLabel(2), INTEGERS, ["the same kind of labels"]),
        (["owl", "owl "], ["owl"], TEXT, None, ["'owl' and 'owl '", "white space"]),
        (["owl", " "], ["owl"], TEXT, None, ["' ' is empty"]),
        (["owl", "a\nb"], ["owl"], TEXT, None, ["'a\\nb' whose name is no text"]),
        ([0, 1], [-1, -1], INTEGERS, None, ["2 of 2 rows of split 'validation'", "a split without labels"]),
        ([0, 1], [None, None], INTEGERS, None, ["no label in 2 of 2 rows", "a split without labels"]),
        ([0, 1, -1], [0], INTEGERS, None, ["row 2 is labelled -1", "1 of 3 rows of split 'train'", "Remove"]),
        ([0, None, 1], [0], INTEGERS, None, ["no label in 1 of 3 rows of split 'train', the first is row 1"]),
        ([1.0, 2.0], [1.0], datasets.Value("float32"), None, ["Value('float32') (1.0)", "Cast the column to integers"]),
        ([True, False], [True], datasets.Value("bool"), None, ["Cast true and false"]),
        ([[0], [1, 2]], [[0]], datasets.List(INTEGERS), None, ["One image has one label here"]),
        ([b"a", b"b"], [b"a"], datasets.Value("binary"), None, ["Set data.label_key to the column with the class"]),
    ],
)  # fmt: skip
def test_labels_that_are_refused(tmp_path, train, validation, feature, other, parts):
    config = saved(tmp_path, train, validation, feature, other)
    with pytest.raises(ValueError) as error:
        opened(config)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_a_class_spelt_otherwise_in_validation_is_no_class_of_its_own(tmp_path):
    """What `datasets` makes of train/owl and val/Owl: one list of four names for both."""
    names = ["Owl", "cat", "dog", "owl"]
    config = saved(tmp_path, [1, 2, 3], [0, 1, 2], datasets.ClassLabel(names=names))
    with pytest.raises(ValueError, match=r"class 'Owl' has no training image but 1 validation images, and 'owl'"):
        doubts(*opened(config))


# images per class


def test_images_per_class_in_one_line(tmp_path):
    config = saved(tmp_path, [0, 0, 1, 2], [2], datasets.ClassLabel(names=NAMES))
    assert describe(*opened(config)) == "images per class (training + validation): owl 2 + 0, cat 1 + 0, dog 1 + 1"
    many = saved(tmp_path / "m", [*range(13), 1, 2, 2], [0], datasets.ClassLabel(names=[f"c{i}" for i in range(13)]))
    line = describe(*opened(many))
    assert line.startswith("images per class: training 1 to 3, median 1, smallest c0 1, c3 1, c4 1; validation 0 to 1")


def test_classes_without_images_are_named_and_cut(tmp_path):
    names = [f"c{i}" for i in range(9)]
    found = doubts(*opened(saved(tmp_path, [0, 0, 0, 1], [0], datasets.ClassLabel(names=names))))
    assert [line.partition(": ")[2] for line in found] == [
        "7 of 9 classes have no training image: c2, c3, c4, c5, c6 and 2 more",
        "8 of 9 classes have no validation image: c1, c2, c3, c4, c5 and 3 more",
        "1 of 9 classes have fewer than 3 training images, of which nothing general is learned: c1 1",
    ]
    assert doubts(*opened(saved(tmp_path / "f", [0, 0, 0, 1, 1, 1], [0, 1], datasets.ClassLabel(2)))) == []


def test_letters_in_both_cases_are_classes_of_their_own_and_said_to_be(tmp_path):
    found = doubts(*opened(saved(tmp_path, ["a", "A"] * 3, ["a", "A"], TEXT)))
    assert len(found) == 1 and "A, a differ in case" in found[0]


def test_a_column_of_numbers_of_rows_is_asked_about(tmp_path):
    found = doubts(*opened(saved(tmp_path, [5, 6, 7, 8], [5, 6, 7, 8], INTEGERS)))
    assert "every class has one image; is data.label_key the column with the class?" in found[0]


# held out


def test_what_is_held_out():
    targets = np.array([0] * 10 + [1] * 2 + [2])
    is_val = held_out(targets, ["a", "b", "c"], 0.2)
    assert [is_val[targets == c].sum() for c in range(3)] == [2, 1, 0]  # round(2.0), at least one, a single one stays
    assert (held_out(targets, ["a", "b", "c"], 0.2) == is_val).all()
    assert held_out(targets, ["a", "b", "c"], 0.99)[:12].sum() == 9 + 1  # one of each class stays in training
    # the draw of a class depends on its own name and number alone, and never changes: the places below are fixed
    assert np.flatnonzero(held_out(targets[3:], ["x", "b", "c"], 0.5))[-1] == np.flatnonzero(is_val)[-1] - 3
    assert np.flatnonzero(held_out(np.array([0] * 10 + [1] * 10), ["a", "b"], 0.2)).tolist() == [0, 5, 14, 17]
    with pytest.raises(ValueError, match="no class has two images"):
        held_out(np.array([0, 1]), ["a", "b"], 0.5)


def together(config: DataConfig) -> list:
    """(class, grey) of all images of both sides, none twice."""
    sides = opened(config)
    seen = [(s.labels[s.label(i)], s.image(i).getpixel((0, 0))[0]) for s in sides for i in range(len(s))]
    assert len(set(seen)) == len(seen)
    return sorted(seen)


@pytest.mark.parametrize("source", ["folder", "hub"])
@pytest.mark.parametrize("split", ["", "train"])
def test_a_folder_without_validation_split(tmp_path, source, split):
    folder(tmp_path, {"cat": 10, "dog": 4, "owl": 1}, split)
    config = DataConfig(source=source, path=str(tmp_path), val_share=0.25)
    train, val = opened(config)
    assert train.labels == val.labels == ["cat", "dog", "owl"]
    assert (train.counts.tolist(), val.counts.tolist()) == ([8, 3, 1], [2, 1, 0])  # round(2.5) is 2
    assert together(config) == sorted((n, i) for n, c in (("cat", 10), ("dog", 4), ("owl", 1)) for i in range(c))
    assert "owl" in doubts(train, val)[0]
    assert "without the 0.25 held out" in train.name


def test_a_data_set_without_validation_split(tmp_path):
    labels = [i % 3 for i in range(30)]
    config = saved(tmp_path, labels, None, datasets.ClassLabel(names=NAMES), val_share=0.1)
    train, val = opened(config)
    assert (train.counts.tolist(), val.counts.tolist()) == ([9, 9, 9], [1, 1, 1])
    assert [labels[val.image(i).getpixel((0, 0))[0]] for i in range(3)] == val.targets.tolist()
    limited = DataConfig(source="hub", path=str(tmp_path), val_share=0.1, limit=6)
    assert list(map(len, opened(limited))) == [6, 3]  # of each side, after the share


def test_a_missing_validation_split_names_the_knob_and_one_that_is_there_is_not_passed_over(tmp_path):
    saved(tmp_path / "h", [0, 1, 0, 1], None, datasets.ClassLabel(2))
    folder(tmp_path / "f", {"cat": 2, "dog": 2}, "train")
    for source in ("hub", "folder"):
        path = str(tmp_path / source[0])
        with pytest.raises(ValueError, match=r"data\.val_split 'validation' .*data\.val_share=0\.1 to hold out"):
            open_source(DataConfig(source=source, path=path, val_share=0), "val")
    saved(tmp_path / "both", [0, 1, 0, 1], [0, 1], datasets.ClassLabel(2))
    folder(tmp_path / "f", {"cat": 2, "dog": 2}, "val")
    for source, path, val_split in (("hub", "both", "validation"), ("folder", "f", "val")):
        config = {"source": source, "path": str(tmp_path / path), "val_share": 0.5}
        with pytest.raises(
            ValueError, match=r"has a split '\w+': set data\.val_share=0 to use it, or 'data\.val_split=\"\"'"
        ):
            open_source(DataConfig(**config, val_split=val_split), "val")
        assert len(open_source(DataConfig(**config, val_split=""), "val")) == 2


def test_folders_of_other_splits_are_not_taken_for_classes(tmp_path):
    folder(tmp_path, {"cat": 2, "dog": 2}, "test")
    folder(tmp_path, {"cat": 2, "dog": 2}, "val")
    with pytest.raises(ValueError, match=r"data\.train_split 'train' is not a folder .* folders there: test, val"):
        open_source(DataConfig(source="folder", path=str(tmp_path), val_share=0.5), "train")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "folder", "path": "x", "val_share": 1.0}, "expected 0 to below 1"),
        ({"source": "folder", "path": "x", "val_share": -0.1}, "expected 0 to below 1"),
        ({"source": "folder", "path": "x", "config": "small"}, r"data\.config is 'small', expected none with"),
    ],
)
def test_values_without_meaning_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


# configurations and caches


@pytest.fixture
def two_configurations(tmp_path):
    lines = []
    for name, rows in (("full", 6), ("small", 4)):
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "validation"):
            split_of([0, 1] * (rows // 2), datasets.ClassLabel(2)).to_parquet(tmp_path / name / f"{split}-0.parquet")
            lines += [f"  - split: {split}", f"    path: {name}/{split}-*.parquet"]
    (tmp_path / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))
    return str(tmp_path)


def test_the_configuration_is_asked_for_by_name_and_recorded(two_configurations):
    path = two_configurations
    with pytest.raises(ValueError, match=r"several configurations: set data\.config to one of full, small\."):
        open_source(DataConfig(source="hub", path=path), "train")
    with pytest.raises(ValueError, match=r"'smal' is not a configuration of .* Did you mean small\?"):
        open_source(DataConfig(source="hub", path=path, config="smal"), "train")
    source = open_source(DataConfig(source="hub", path=path, config="small"), "train")
    assert len(source) == 4 and source.origin == f"{path}, configuration small"


def test_what_save_to_disk_wrote_has_no_configurations(tmp_path):
    with pytest.raises(ValueError, match="written by save_to_disk, which has no configurations"):
        open_source(saved(tmp_path, [0, 1], [0], datasets.ClassLabel(2), config="small"), "train")


def test_not_cached_is_not_absent(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    said = [ConnectionError("Couldn't reach 'user/birds' on the Hub (OfflineModeIsEnabled)")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(said[0]))
    message = (
        r"'user/birds' is not in the cache of this machine\. This says nothing of whether it exists.*HF_HUB_OFFLINE"
    )
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(source="hub", path="user/birds"), "train")
    said[0] = ValueError(
        "Couldn't find cache for user/birds for config 'small'\nAvailable configs in the cache: ['full']"
    )
    with pytest.raises(ValueError, match=r"configuration 'small' of 'user/birds' is not in the cache .* of it: 'full'"):
        open_source(DataConfig(source="hub", path="user/birds", config="small"), "train")
    said[0] = ValueError("There are multiple 'user/birds' configurations in the cache: full, small\nPlease specify")
    with pytest.raises(ValueError, match=r"set data\.config to one of full, small\."):
        open_source(DataConfig(source="hub", path="user/birds"), "train")
    said[0] = FileNotFoundError("Couldn't find any data file at /nowhere/birds.")
    with pytest.raises(ValueError, match="there is no such folder on this machine"):
        open_source(DataConfig(source="hub", path="/nowhere/birds"), "train")
