"""COCO's average precision by our path against pycocotools on the files themselves, and on any number of ranks."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from models.detection import Detector, DetectorConfig
from models.detection.backbone import Made
from models.detection.detector import Detections
from models.preprocessing import Preprocessing
from models.vmoe import VMoE, VMoEConfig
from trainer.config.detect import BoxDataConfig
from trainer.data.boxes.batches import BoxData
from trainer.data.boxes.coco import CocoSource
from trainer.data.boxes.sources import ShapesSource
from trainer.distributed.ranks import Dist
from trainer.evaluation import detection
from trainer.evaluation.routing import RoutingWatch
from trainer.objectives.detect import Detect

PRE = Preprocessing(32, (0.5,) * 3, (0.25,) * 3)
SHAPES = ShapesSource(BoxDataConfig(train_pictures=4, val_pictures=10, size=48), "val")
IDS = [1, 5, 9, 13, 40, 90]  # of the categories in the file: not as we number them


class Wobbling:
    """Finds what is there, each box a little off and some of another category, and a few things that are not there."""

    def __init__(self, source):
        self.source = source
        self.module = torch.nn.Identity()

    def __call__(self, index):
        draws = np.random.RandomState(index)
        known = self.source.annotated(index)
        left, top, width, height = known.box_N4.T
        corners = np.stack([left, top, left + width, top + height], axis=1)
        corners = np.concatenate([corners + draws.normal(0, 1.5, corners.shape), corners[:1] * 0.5 + [0, 0, 5, 5]])
        categories = np.append(known.category_N, 0)
        categories[draws.random_sample(len(categories)) < 0.2] = 2
        masks = known.masks()
        masks = np.concatenate([np.roll(masks, 1, axis=1), masks[:1]]).astype(bool)
        scores = draws.random_sample(len(categories))
        tensors = map(torch.from_numpy, (scores, categories, corners, masks))
        return Detections(*tensors)


def files(folder):
    """The shapes as COCO's annotation file, ids and order unlike ours, with a crowd; and the images."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for index in reversed(range(len(SHAPES))):
        known = SHAPES.annotated(index)
        SHAPES.image(index).save(folder / "images" / f"{index}.png")
        images.append(
            {"id": 100 + 3 * index, "file_name": f"{index}.png", "height": known.height, "width": known.width}
        )
        for number, outline in enumerate(known.outlines):
            annotations.append({
                "id": 1000 + len(annotations),
                "image_id": 100 + 3 * index,
                "category_id": IDS[known.category_N[number]],
                "bbox": known.box_N4[number].tolist(),
                "area": float(known.area_N[number]),
                "iscrowd": int(index == 3 and number == 0),
                "segmentation": outline | {"counts": outline["counts"].decode()},
            })  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in zip(IDS, SHAPES.categories)]
    path = folder / "boxes.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def by_pycocotools(path, results, kind):
    """The twelve numbers and the precision of pycocotools alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_our_path_gives_what_pycocotools_gives(tmp_path, kind):
    path = files(tmp_path)
    source = CocoSource(tmp_path / "images", path, 10_000, masks=True)
    found = Wobbling(source)
    ours, theirs = [], []
    for index in range(len(source)):
        detections = found(index)
        ours += detection.results_of(index, detections)
        for number in range(len(detections.score_N)):
            left, top, right, bottom = detections.box_N4[number].tolist()
            mask_HW = np.asfortranarray(detections.mask_NHW[number].numpy().astype(np.uint8))
            entry = {
                "image_id": source.annotated(index).id,
                "category_id": IDS[detections.category_N[number]],
                "score": float(detections.score_N[number]),
            }
            shape = {"bbox": [left, top, right - left, bottom - top]}
            if kind == "segm":
                shape = {"segmentation": coco_mask.encode(mask_HW)}
            theirs.append(entry | shape)
    metrics = detection.average_precision(source.coco(), ours, masks=True)
    expected = by_pycocotools(path, theirs, kind)
    prefix = "mask_" if kind == "segm" else ""
    for name, place in detection.SUMMARY.items():
        if expected.stats[place] >= 0:
            assert metrics[prefix + name] == expected.stats[place], name
    assert 0.05 < metrics[f"{prefix}ap"] < metrics[f"{prefix}ap50"] < 1
    precision = expected.eval["precision"]
    for place, name in enumerate(source.categories):
        of_category = precision[:, :, place, 0, -1]
        if (of_category > -1).any():
            assert metrics[f"{prefix}ap/{name}"] == of_category[of_category > -1].mean()
    assert metrics["images"] == 10


def test_everything_right_is_1_and_nothing_found_is_0():
    truth = SHAPES.coco()
    results = []
    for entry in truth["annotations"]:
        wanted = ("image_id", "category_id", "bbox", "segmentation")
        results.append({name: entry[name] for name in wanted} | {"score": 1.0})
    perfect = detection.average_precision(truth, results, masks=True)
    assert perfect["ap"] == perfect["mask_ap"] == perfect["ap75"] == 1
    nothing = detection.average_precision(truth, [], masks=True)
    assert nothing == dict.fromkeys(
        ["ap", "ap50", "ap75", "ar", "mask_ap", "mask_ap50", "mask_ap75", "mask_ar"], 0.0
    ) | {"images": 10}


def ranks(world):
    """Dists of so many ranks that are run one after another: what each gathers is collected by hand."""
    return [Dist(rank, world, rank, world, torch.device("cpu")) for rank in range(world)]


def tiny():
    moe = {"num_experts": 4, "k": 1, "images_per_group": 1, "eval_capacity_factor": 0.5}
    vit = VMoE(
        VMoEConfig(
            image_size=32,
            patch_size=8,
            width=16,
            depth=2,
            heads=2,
            mlp_dim=16,
            num_classes=0,
            moe_blocks="all",
            moe=moe,
        )
    )
    config = DetectorConfig(
        SHAPES.categories, range(6), PRE, shorter_side=32, longest_side=64, width=16, queries=6, groups=1, layers=1,
        heads=2, mlp_dim=16, maps=1,
    )  # fmt: skip
    return Detect(Detector(config, vit, Made("vmoe", {})), patches=16), config


def test_every_image_once_whatever_the_ranks_and_the_batch():
    objective, config = tiny()
    data = BoxData(SHAPES, SHAPES, config, 0.0, (1.0, 1.0), 0)
    alone = ranks(1)[0]
    watch = RoutingWatch(objective.module, len(SHAPES), alone)
    metrics = detection.evaluate(objective, data, torch.float32, 1, alone, observe=watch.observe)
    layers = watch.take().layers
    assert layers.keys() == {"backbone.vit.blocks.0.mlp", "backbone.vit.blocks.1.mlp"}
    assert metrics["images"] == 10 and objective.module.training
    assert detection.evaluate(objective, data, torch.float32, 7, alone) == metrics
    objective.module.eval()
    expected = detection._found(objective, data, torch.float32, alone, None)
    assert len(expected) == 10 * 6 * 6
    for world in (2, 3):
        found = []
        for dist in ranks(world):
            found += detection._found(objective, data, torch.float32, dist, None)
        assert sorted(found, key=lambda result: result["image_id"]) == expected


def test_masks_of_a_detector_are_measured():
    objective, config = tiny()
    config = replace(config, masks=True)
    made = objective.module.made
    masked = Detect(Detector(config, objective.detector.backbone.vit, made), patches=16)
    data = BoxData(SHAPES, SHAPES, config, 0.0, (1.0, 1.0), 0)
    metrics = detection.evaluate(masked, data, torch.float32, 1, ranks(1)[0])
    assert {"ap", "mask_ap", "mask_ar"} <= metrics.keys()
