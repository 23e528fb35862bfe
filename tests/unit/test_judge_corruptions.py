"""Corruptions: what is drawn depends on the image alone; errors relative to a reference; images in a folder."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from tests.judging import bench, folder_of, student, subject
from trainer.config.data import DataConfig
from trainer.config.evaluate import ALEXNET, CORRUPTIONS
from trainer.config.tasks import parse_task
from trainer.data.loader import eval_batches
from trainer.data.sources import DigitsSource
from trainer.judge import accuracy, corrupt
from trainer.judge.corrupt import Corruption
from trainer.judge.corruptions import ALEXNET_ERRORS, prepare, with_reference
from trainer.judge.intervals import Figure
from trainer.judge.task import Measured

needs_package = pytest.mark.skipif(
    find_spec("imagecorruptions") is None, reason="pip install imagecorruptions-imaug (requirements-dev.txt)"
)


def picture(side=48):
    values = np.random.RandomState(0).randint(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)


@needs_package
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_kind_at_every_size(kind):
    image = picture()
    weak, strong = (np.asarray(Corruption(kind, severity, seed=0)(image, 7), dtype=float) for severity in (1, 5))
    original = np.asarray(image, dtype=float)
    assert weak.shape == original.shape
    assert 0 < np.abs(weak - original).mean() < np.abs(strong - original).mean()
    for side in (16, 33):  # also below the least the package takes
        assert Corruption(kind, 3, seed=0)(picture(side), 0).size == (side, side)


@needs_package
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_draws_are_of_the_image_alone(kind):
    image = picture()
    np.random.seed(5)
    first = np.asarray(Corruption(kind, 3, seed=0)(image, 7))
    after = np.random.rand()
    np.random.seed(5)
    assert np.random.rand() == after  # numpy's generator is where it was
    assert (np.asarray(Corruption(kind, 3, seed=0)(image, 7)) == first).all()
    drawn = kind not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert (np.asarray(Corruption(kind, 3, seed=0)(image, 8)) != first).any() == drawn
    assert (np.asarray(Corruption(kind, 3, seed=1)(image, 7)) != first).any() == drawn


@needs_package
def test_an_image_is_corrupted_alike_in_any_batch_and_subset():
    source = DigitsSource(DataConfig(limit=20), "val")
    change = Corruption("gaussian_noise", 3, seed=0)
    pre = student().preprocessing
    whole = next(eval_batches(source, pre, batch=20, change=change)).images
    assert not torch.equal(whole, next(eval_batches(source, pre, batch=20)).images)
    parts = [batch.images for batch in eval_batches(source, pre, batch=5, change=change)]
    assert torch.equal(torch.cat(parts), whole)
    part = source.subset(np.array([11, 3]))
    assert torch.equal(next(eval_batches(part, pre, batch=2, change=change)).images, whole[[11, 3]])


@needs_package
def test_the_evaluation():
    spec = parse_task("corruptions:kinds=[contrast,shot_noise],severities=[1,5]")
    measured = prepare(subject(student()), spec, bench())()
    of_kind = measured.details["accuracy"]
    assert measured.images == 60
    mean = np.mean([of_kind[kind][severity] for kind in ("contrast", "shot_noise") for severity in ("1", "5")])
    assert measured.figures["top-1 corrupted"].value == pytest.approx(mean)
    assert measured.figures["error under contrast"].value == pytest.approx(
        1 - (of_kind["contrast"]["1"] + of_kind["contrast"]["5"]) / 2
    )


def test_images_that_are_stored(tmp_path):
    """As ImageNet-C lies: the same images under two severities; the second as black as can be."""
    folder_of(tmp_path / "fog" / "1", {"0": 6, "3": 6})
    folder_of(tmp_path / "fog" / "2", {"0": 6, "3": 6}, seed=9)
    spec = parse_task(f"corruptions:stored={tmp_path},kinds=[fog],severities=[1,2]")
    measured = prepare(subject(student()), spec, bench())()
    assert measured.images == 12
    assert "top-1 undisturbed" not in measured.figures
    one = parse_task(f"accuracy:data={tmp_path / 'fog' / '1'}")
    alone = accuracy.prepare(subject(student()), one, bench())()
    assert measured.details["accuracy"]["fog"]["1"] == alone.figures["top-1"].value
    with pytest.raises(ValueError, match=r"has no folder .*snow/1, expected STORED/<kind>/<severity>/<class>/"):
        prepare(subject(student()), parse_task(f"corruptions:stored={tmp_path},kinds=[snow]"), bench())


def measured(**errors):
    return Measured({}, 1, "", {"errors": errors})


def test_relative_to_a_reference():
    both = {"a": measured(fog=0.5, snow=0.4), "b": measured(fog=0.25, snow=0.6)}
    name = "corruption error (mCE)"
    first = with_reference(both, "")
    assert first["a"].figures[name] == Figure(1.0)
    assert first["b"].figures[name].value == pytest.approx((0.25 / 0.5 + 0.6 / 0.4) / 2)
    assert first["b"].details["reference"] == "a"
    assert with_reference(both, "b")["b"].figures[name] == Figure(1.0)
    published = with_reference(both, ALEXNET)["a"].figures[name].value
    assert published == pytest.approx((0.5 / 0.819 + 0.4 / 0.867) / 2)
    assert list(ALEXNET_ERRORS) == list(CORRUPTIONS)


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_a_severity_outside(severity):
    with pytest.raises(ValueError, match=f"severities is {severity}, expected 1 to 5"):
        parse_task(f"corruptions:severities=[{severity}]")


def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"kinds is 'motion', expected a kind of corruption. Did you mean motion_blur"):
        parse_task("corruptions:kinds=[motion]")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    corrupt._package.cache_clear()
    with pytest.raises(ValueError, match="pip install imagecorruptions-imaug"):
        prepare(subject(student()), parse_task("corruptions:kinds=[fog]"), bench())
    monkeypatch.undo()
    corrupt._package.cache_clear()
