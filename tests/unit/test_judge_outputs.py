"""What a model gives of every image is the same to the last bit on any ranks, at any batch, and is computed once."""

import numpy as np
import pytest
import torch

from tests.judging import OneOfMany, Said, bench, folder_of, nac, student, subject, told
from trainer.config.data import DataConfig
from trainer.data.loader import eval_batches
from trainer.data.sources import DigitsSource
from trainer.judge.images import measured_images
from trainer.judge.intervals import (
    bins_of,
    calibration_error,
    mean_with_interval,
    of_episodes,
)

CPU = torch.device("cpu")


def logits(model, source, world, batch):
    parts = []
    for rank in range(world):
        with pytest.raises(Said) as said:
            bench(OneOfMany(rank, world, rank, world, CPU), batch=batch)._computed(subject(model), model, source)
        parts.append(said.value.args[0])
    return bench(told(world, parts), batch=batch)._computed(subject(model), model, source)


@pytest.mark.parametrize("images", [5, 100])  # fewer than one forward; three whole ones and four images
@pytest.mark.parametrize(
    "model",
    [
        student(),
        # places in the experts are few, and images compete for them six by six
        student(eval_capacity_factor=0.5, capacity_multiple=1, images_per_group=6, batch_priority=True),
        nac(),
    ],
    ids=["student", "student with capacity", "nac"],
)
def test_neither_batch_nor_ranks_change_a_bit(model, images):
    source = DigitsSource(DataConfig(limit=images), "val")
    expected = logits(model, source, 1, 32)
    assert expected.index.tolist() == list(range(images))  # every image once
    assert (expected.targets == source.targets).all()
    for world in (1, 2, 3):
        for batch in (1, 7, 64):
            outputs = logits(model, source, world, batch)
            assert (outputs.index == expected.index).all()
            assert (outputs.values == expected.values).all(), f"world {world}, batch {batch}"


def test_it_is_what_the_model_says():
    model = student()
    source = DigitsSource(DataConfig(limit=10), "val")
    images = next(eval_batches(source, model.preprocessing, batch=10)).images
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits(model, source, 1, 7).values), model(images))


def test_features_are_kept_and_read_again(tmp_path, monkeypatch):
    judged, source = subject(student()), DigitsSource(DataConfig(limit=20), "val")
    first = bench(cache=tmp_path).features(judged, source)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(judged.model, "forward_features", None)  # nothing is computed any more
    again = bench(cache=tmp_path).features(judged, source)
    assert (again.values == first.values).all()
    with np.load(file) as arrays:
        assert (arrays["values"] == first.values).all()
    with pytest.raises(TypeError):  # other weights have features of their own
        other = student(seed=1)
        monkeypatch.setattr(other, "forward_features", None)
        bench(cache=tmp_path).features(subject(other), source)


def test_features_that_are_no_numbers_are_refused():
    model = student()
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="features of model are not finite on 20 of 20 images of digits val"):
        bench().features(subject(model), DigitsSource(DataConfig(limit=20), "val"))


def test_which_images_are_measured(tmp_path):
    assert measured_images(DataConfig()).name == "digits val"
    flat = folder_of(tmp_path / "flat", {"ant": 2, "bee": 3})
    source = measured_images(DataConfig(path=str(flat)))  # all of them: nothing is held out
    assert source.labels == ["ant", "bee"] and len(source) == 5
    for split, count in (("train", 4), ("test", 2)):
        folder_of(tmp_path / "split" / split, {"ant": count, "bee": count})
    data = DataConfig(path=str(tmp_path / "split"))
    assert len(measured_images(data)) == 4  # the test split, as there is none for validation
    assert len(measured_images(data, "train")) == 8
    with pytest.raises(ValueError, match=r"split 'tets' is not in .*Did you mean test"):
        measured_images(data, "tets")


# intervals: small numbers worked by hand


def test_the_interval_of_a_share_is_that_of_its_binomial():
    correct = np.repeat([1.0, 0.0], [320, 80])
    figure = mean_with_interval(correct, 4000, seed=0)
    assert figure.value == 0.8
    half = 1.96 * np.sqrt(0.8 * 0.2 / 400)  # 0.0392
    assert figure.low == pytest.approx(0.8 - half, abs=0.004)
    assert figure.high == pytest.approx(0.8 + half, abs=0.004)
    assert mean_with_interval(correct, 4000, seed=0) == figure
    assert mean_with_interval(correct, 4000, seed=1) != figure


def test_resamples_are_drawn_alike_in_parts(monkeypatch):
    values = np.random.RandomState(0).rand(50)
    whole = mean_with_interval(values, 300, seed=2)
    monkeypatch.setattr("trainer.judge.intervals.AT_ONCE", 500)  # ten resamples at a time
    assert mean_with_interval(values, 300, seed=2) == whole


def test_calibration_error():
    # bin 0.9333..1: two images, sure by .95, one right: gap .5 - .95 = -.45; bin .6..0.6666: one of .65, right: .35
    confidence = np.array([0.95, 0.95, 0.65])
    correct = np.array([True, False, True])
    assert bins_of(confidence).tolist() == [14, 14, 9]
    assert bins_of(np.array([0.0, 1.0])).tolist() == [0, 14]
    figure = calibration_error(confidence, correct, 100, seed=0)
    assert figure.value == pytest.approx((2 * 0.45 + 0.35) / 3)
    assert figure.low <= figure.value <= figure.high


def test_the_interval_of_episodes():
    figure = of_episodes(np.array([0.5, 0.7, 0.6, 0.8]))
    # s^2 = (.15^2 + .05^2 + .05^2 + .15^2) / 3
    half = 1.96 * np.sqrt(0.05 / 3) / 2
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.65, 0.65 - half, 0.65 + half))
