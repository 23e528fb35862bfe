"""Images with boxes: drawn shapes, COCO's annotation files with all that can be wrong in them, and training batches."""

import copy
import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from models.detection import DetectorConfig
from models.preprocessing import Preprocessing
from trainer.config.detect import BoxDataConfig, DetectConfig
from trainer.data.boxes.base import record_of
from trainer.data.boxes.batches import BoxData, shares
from trainer.data.boxes.coco import CocoSource
from trainer.data.boxes.sources import ShapesSource, open_boxes
from trainer.data.drawing import shapes
from trainer.data.drawing.common import TRAIN

PRE = Preprocessing(32, (0.5,) * 3, (0.25,) * 3)
DRAWN = BoxDataConfig(train_pictures=12, val_pictures=6, size=48)
# a square of 4 x 4 pixels at (2, 3), as a polygon; a crowd in run lengths over columns of 20: 5 pixels down from (0, 0)
POLYGON = [[2, 3, 6, 3, 6, 7, 2, 7]]
CROWD = {"size": [20, 30], "counts": [0, 5, 595]}
COCO = {
    "images": [
        {"id": 70, "file_name": "b.png", "height": 20, "width": 30},
        {"id": 7, "file_name": "a.png", "height": 20, "width": 30},
    ],
    "annotations": [
        {"id": 1, "image_id": 70, "category_id": 90, "bbox": [2, 3, 4, 4], "area": 16, "iscrowd": 0,
         "segmentation": POLYGON},
        {"id": 2, "image_id": 70, "category_id": 3, "bbox": [0, 0, 1, 5], "area": 5, "iscrowd": 1,
         "segmentation": CROWD},
        {"id": 3, "image_id": 70, "category_id": 3, "bbox": [5, 5, 0, 4], "segmentation": POLYGON},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "toothbrush"}],
}  # fmt: skip


def write(folder, content=COCO):
    """COCO's layout of one split: images/ and boxes.json."""
    (folder / "images").mkdir()
    for name in ("a.png", "b.png"):
        pixels = np.arange(20 * 30 * 3).reshape(20, 30, 3) % 251
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name)
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder


def opened(folder, masks=True):
    return CocoSource(folder / "images", folder / "boxes.json", 10_000, masks)


def detector_config(source, masks=True):
    return DetectorConfig(source.categories, source.category_ids, PRE, masks=masks, shorter_side=32, longest_side=64)


def data_of(train, val=None, **changes):
    options = {"hflip": 0.5, "jitter": (0.5, 1.5), "workers": 0} | changes
    return BoxData(train, val or train, detector_config(train), **options)


def batches(data, **where):
    options = {"seed": 3, "epoch": 1, "start_step": 0, "epochs": 1, "micro_batch": 4, "accumulation": 1}
    ranks = {"world": 1, "rank": 0, "workers": 0, "device": "cpu"}
    return list(data.train_batches(**(options | ranks | where)))


def flat(found):
    """Pictures and targets of batches, one after another."""
    everything = []
    for batch in found:
        everything += zip(batch.images.bytes_, batch.labels.targets)
    return everything


def test_drawn_pictures_are_the_same_every_time_and_boxes_fit_their_masks():
    first, again = (ShapesSource(DRAWN, "train") for _ in range(2))
    other = ShapesSource(DRAWN, "val")
    sizes = set()
    for index in range(len(first)):
        known = first.annotated(index)
        image = np.asarray(first.image(index))
        assert np.array_equal(image, np.asarray(again.image(index)))
        sizes.add(image.shape[:2])
        assert 1 <= len(known.category_N) <= DRAWN.objects
        for mask_HW, (left, top, width, height), area in zip(known.masks(), known.box_N4, known.area_N):
            rows, columns = np.nonzero(mask_HW)
            assert [columns.min(), rows.min()] == [left, top]
            assert [np.ptp(columns) + 1, np.ptp(rows) + 1] == [width, height]
            assert area == mask_HW.sum()
    assert sizes == {(48, 48), (36, 48), (48, 36)}
    assert not np.array_equal(np.asarray(first.image(0)), np.asarray(other.image(0)))
    assert record_of(first) == record_of(again) != record_of(other)


def test_the_drawn_pictures_are_these():
    """Their bytes are part of every figure that was measured on them."""
    drawn = shapes.draw(seed=0, kind=TRAIN, index=4, size=48, shapes=6, objects=4)
    assert drawn.image_HWC.shape == (36, 48, 3)
    assert (zlib.crc32(drawn.image_HWC.tobytes()), drawn.shape_K.tolist()) == (2869116895, [4, 2])
    assert drawn.mask_KHW.sum((1, 2)).tolist() == [97, 70]


def test_an_annotation_file_is_read(tmp_path):
    source = opened(write(tmp_path))
    assert source.categories == ["cat", "toothbrush"] and source.category_ids == [3, 90]
    assert [known.name for known in source.images] == ["a.png", "b.png"]  # by id
    nothing, known = source.annotated(0), source.annotated(1)
    assert len(nothing.category_N) == 0 and nothing.masks().shape == (0, 20, 30)
    # the box of no width is left out
    assert known.category_N.tolist() == [1, 0] and known.crowd_N.tolist() == [False, True]
    square, crowd = known.masks()
    assert square.sum() == 16 and square[3:7, 2:6].all()
    assert crowd.sum() == 5 and crowd[:5, 0].all()
    assert opened(tmp_path, masks=False).annotated(1).outlines == ()


def test_crowds_are_not_taught_and_a_mirror_turns_boxes_and_masks(tmp_path):
    source = opened(write(tmp_path))
    taught = {}
    for hflip in (0.0, 1.0):
        data = data_of(source, hflip=hflip, jitter=(1.0, 1.0))
        pairs = flat(batches(data, micro_batch=2))
        taught[hflip] = next((picture, target) for picture, target in pairs if len(target.category_N))
    (picture, target), (mirrored, turned) = taught[0.0], taught[1.0]
    assert picture.shape == (3, 32, 48)
    assert target.category_N.tolist() == [1]
    # (2 + 4 / 2) / 30, (3 + 4 / 2) / 20, 4 / 30, 4 / 20
    assert_close(target.box_N4, torch.tensor([[4 / 30, 0.25, 4 / 30, 0.2]]))
    assert_close(turned.box_N4, torch.tensor([[26 / 30, 0.25, 4 / 30, 0.2]]))
    assert torch.equal(picture.flip(-1), mirrored) and torch.equal(target.mask_NHW.flip(-1), turned.mask_NHW)
    assert abs(int(target.mask_NHW.sum()) - 16 * 1.6**2) < 10


def test_a_box_over_the_edge_is_cut():
    assert_close(shares(np.array([[-0.5, 0.0, 10.5, 20.5]]), 20, 30), torch.tensor([[1 / 6, 0.5, 1 / 3, 1.0]]))


def test_batches_are_the_same_on_any_ranks_and_workers_and_after_a_resume():
    data = data_of(ShapesSource(DRAWN, "train"))
    everything = flat(batches(data))
    assert len({tuple(picture.shape) for picture, _ in everything}) > 3
    on_two = [batches(data, micro_batch=2, world=2, rank=rank, workers=rank) for rank in range(2)]
    in_turn = flat([batch for pair in zip(*on_two) for batch in pair])
    resumed = flat(batches(data, start_step=1))
    for found, expected in ((in_turn, everything), (resumed, everything[4:])):
        assert len(found) == len(expected)
        for (picture, target), (other, same) in zip(found, expected):
            assert torch.equal(picture, other) and torch.equal(target.box_N4, same.box_N4)
            assert torch.equal(target.mask_NHW, same.mask_NHW)
    assert not torch.equal(flat(batches(data, epoch=2))[0][0], everything[0][0])
    with pytest.raises(ValueError, match="12 training images are fewer than one global batch of 16"):
        batches(data, micro_batch=16)


def test_pictures_are_normalised_where_they_are_used():
    batch = batches(data_of(ShapesSource(DRAWN, "train")))[0]
    moved = batch.images.to("cpu", torch.float32)
    assert_close(moved[0], (batch.images.bytes_[0].float() / 255 - 0.5) / 0.25)


def changed(**places):
    """COCO with values put at "images/0/id" or "annotations/1"; None takes an entry away."""
    content = copy.deepcopy(COCO)
    for path, value in places.items():
        *above, last = (int(part) if part.isdigit() else part for part in path.split("__"))
        holder = content
        for key in above:
            holder = holder[key]
        if value is None:
            del holder[last]
        else:
            holder[last] = value
    return content


WRONG = {
    "outside": (changed(annotations__0__bbox=[25, 3, 10, 4]), r"annotation 1 .* \[25, 3, 10, 4\], outside of image 70"),
    "negative": (changed(annotations__0__bbox=[5, 5, -3, 4]), "annotation 1 .*outside of image 70"),
    "no box": (changed(annotations__0__bbox=[1, 2, 3]), "annotation 1 has the box .* expected"),
    "words": (changed(annotations__0__bbox=["a", 2, 3, 4]), "annotation 1 has the box .* expected"),
    "category": (
        changed(annotations__0__category_id=91),
        r"annotation 1 is of category 91, which the file does not have. Known: 3 \(cat\)",
    ),
    "image": (changed(annotations__0__image_id=8), "annotation 1 is of image 8, which the file does not have"),
    "no images": (changed(images=[]), "boxes.json has no images"),
    "twice": (changed(images__1__id=70), "two images of id 70"),
    "no categories": (changed(categories=[], annotations=[]), "has no categories"),
    "one name": (changed(categories__1__name="cat"), "two categories of name cat"),
    "no list": (changed(annotations=None), "has no list 'annotations'"),
    "no size": (changed(images__0__width=None), "an entry of images lacks width"),
    "no file": (
        changed(images__0__file_name="bb.png"),
        r"1 of the 2 images .* first is bb.png \(image id 70\). Did you",
    ),
    "no masks": (changed(annotations__0__segmentation=None), "annotation 1 has no segmentation.*detect.masks=true"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path, name):
    content, message = WRONG[name]
    write(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


def test_files_that_are_not_there_or_no_json(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"annotation file .*boxs.json does not exist. Did you mean boxes.json"):
        CocoSource(tmp_path / "images", tmp_path / "boxs.json", 10_000)
    with pytest.raises(ValueError, match=r"image folder .*imges does not exist. Did you mean images"):
        CocoSource(tmp_path / "imges", tmp_path / "boxes.json", 10_000)
    (tmp_path / "boxes.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"boxes.json is truncated or no JSON"):
        opened(tmp_path)


def test_an_image_of_another_size_than_its_annotations(tmp_path):
    source = opened(write(tmp_path, changed(images__0__width=31)))
    with pytest.raises(ValueError, match=r"b.png \(image id 70\) is 30 x 20 pixels, but .* says 31 x 20"):
        source.image(1)


def test_splits_of_other_categories(tmp_path):
    for split, content in (("train", COCO), ("val", changed(categories__0__name="dog"))):
        (tmp_path / split).mkdir()
        write(tmp_path / split, content)
    names = {"train_images": "train/images", "train_annotations": "train/boxes.json"}
    names |= {"val_images": "val/images", "val_annotations": "val/boxes.json"}
    with pytest.raises(ValueError, match=r"val/boxes.json has other categories than .*train/boxes.json.*dog"):
        open_boxes(DetectConfig(data=BoxDataConfig(path=str(tmp_path), **names)), 10_000)
