"""Preprocessing: what it refuses, its round trip, and the side it resizes to."""

import json

import pytest

from models.preprocessing import Preprocessing, crop_pct_of


@pytest.mark.parametrize("image_size", [32, 224, 384, 518])
def test_crop_pct_gives_the_resize_back(image_size):
    for resize in range(image_size, 2 * image_size):
        preprocessing = Preprocessing(image_size, (0.5,), (0.5,), crop_pct=crop_pct_of(image_size, resize), in_chans=1)
        assert preprocessing.resize_size == resize


def test_preprocessing_round_trip_and_refusals():
    preprocessing = Preprocessing(32, [0.1, 0.2, 0.3], [1, 1, 1])
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing
    assert preprocessing.mean == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="crop_mode 'border'"):
        Preprocessing.from_dict({**preprocessing.to_dict(), "crop_mode": "border"})
    with pytest.raises(ValueError, match="unknown preprocessing keys"):
        Preprocessing.from_dict({**preprocessing.to_dict(), "crop": 1})
    with pytest.raises(ValueError, match="3 values of mean and std"):
        Preprocessing(32, (0.5,), (0.5,))
