"""COCO's AP over every validation image, each counted once, by pycocotools; the same on any number of ranks.

Every image is looked at alone, so that what is found on it depends on nothing else.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.detection.detector import Detections
from models.detection.images import normalised
from models.moe.layer import routed_layers
from models.moe.out import Out
from trainer.data.boxes.batches import BoxData
from trainer.data.loader import Batch
from trainer.data.sampler import eval_requests
from trainer.distributed.interrupt import HEARTBEAT
from trainer.distributed.ranks import Dist

# of COCOeval's summary: name -> place
SUMMARY = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar": 8}
ALWAYS = ("ap", "ap50", "ap75", "ar")  # 0 where nothing is there to be found; of the others nothing is said then


def evaluate(
    objective: Any,
    data: BoxData,
    dtype: torch.dtype,
    batch: int,
    dist: Dist,
    observe: Callable[[Batch, Tensor, Out], None] | None = None,
) -> dict[str, float]:
    """COCO's AP of boxes, and with masks of masks (mask_ap, ...), over all validation images (collective).

    Args:
        objective: with `detect`, as trainer.objectives.Detect.
        batch: no matter: images are looked at one by one.
        observe: is shown every image with what the forward told of its routing.

    Returns:
        ap, ap50, ap75, ap_small, ap_medium, ap_large, ar as COCO defines them (0..1), ap/<category>, and images.
    """
    modules = [objective.module, *objective.frozen]
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    tells = observe is not None and bool(routed_layers(objective.module))
    found = _found(objective, data, dtype, dist, observe if tells else None)
    for module, mode in zip(modules, modes):
        module.train(mode)
    results = sorted(itertools.chain(*dist.gather(found)), key=lambda result: result["image_id"])
    metrics = None
    if dist.main:
        metrics = average_precision(data.val.coco(), results, masks=data.config.masks)
    return dist.gather(metrics)[0]


@torch.no_grad()
def _found(
    objective: Any,
    data: BoxData,
    dtype: torch.dtype,
    dist: Dist,
    observe: Callable[[Batch, Tensor, Out], None] | None,
) -> list[dict[str, Any]]:
    """COCO's results of the images of this rank."""
    found = []
    for request in eval_requests(len(data.val), batch=1, world=dist.world, rank=dist.rank):
        HEARTBEAT.beat()
        # ranks that share experts make as many passes as each other: one without an image looks at the first again
        index = int(request[0]) if len(request) else 0
        picture, original = data.picture(index)
        picture = normalised(picture.to(dist.device), data.preprocessing, dtype)
        out: Out = {}
        detections = objective.detect(picture, original, None if observe is None else out)
        if not len(request):
            continue
        found += results_of(index, detections)
        if observe is not None:
            observe(_one(index), picture[None], out)
    return found


def results_of(index: int, detections: Detections) -> list[dict[str, Any]]:
    """The objects found on image `index`, as COCO's result files have them."""
    from pycocotools import mask as coco_mask

    found = []
    corners = detections.box_N4.double().tolist()
    for number, (left, top, right, bottom) in enumerate(corners):
        result = {
            "image_id": index,
            "category_id": int(detections.category_N[number]),
            "bbox": [left, top, right - left, bottom - top],
            "score": float(detections.score_N[number]),
        }
        if detections.mask_NHW is not None:
            mask_HW = detections.mask_NHW[number].numpy().astype(np.uint8)
            result["segmentation"] = coco_mask.encode(np.asfortranarray(mask_HW))
        found.append(result)
    return found


def average_precision(
    dataset: dict[str, Any], results: Sequence[dict[str, Any]], *, masks: bool = False
) -> dict[str, float]:
    """What pycocotools says of results.

    Args:
        dataset: COCO's annotation file.
        results: COCO's result file.
        masks: of masks as well; every annotation and result has a segmentation then.
    """
    metrics = _summary(dataset, results, "bbox", "")
    if masks:
        metrics |= _summary(dataset, results, "segm", "mask_")
    return metrics | {"images": len(dataset["images"])}


def _summary(dataset: dict[str, Any], results: Sequence[dict[str, Any]], kind: str, prefix: str) -> dict[str, float]:
    if not results:
        return {f"{prefix}{name}": 0.0 for name in ALWAYS}
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # of what loadRes writes into results, nothing is kept; boxes are read off the masks where both are there
    wanted = "segmentation" if kind == "segm" else "bbox"
    of_kind = []
    for result in results:
        of_kind.append({name: result[name] for name in ("image_id", "category_id", "score", wanted)})
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(of_kind), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {}
    for name, place in SUMMARY.items():
        value = float(evaluation.stats[place])
        if value >= 0 or name in ALWAYS:  # -1: there is no such object
            metrics[f"{prefix}{name}"] = max(0.0, value)
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    # (thresholds, recalls, categories, areas, most detections): all areas, 100 detections
    precision_TRK = evaluation.eval["precision"][..., 0, -1]
    for place, category in enumerate(evaluation.params.catIds):
        of_category = precision_TRK[..., place]
        if (of_category > -1).any():
            metrics[f"{prefix}ap/{names[category]}"] = float(of_category[of_category > -1].mean())
    return metrics


def _one(index: int) -> Batch:
    """What an observer of evaluation is told of a single image."""
    return Batch(
        images=torch.empty(1, 0),
        labels=torch.zeros(1, dtype=torch.int64),
        mask=torch.ones(1, dtype=torch.bool),
        index=torch.tensor([index]),
    )
