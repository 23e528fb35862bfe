"""Phase detect: a detector on the maps of the trained student, or of any other vision transformer (docs/detection.md).

It reads images of its own (section detect.data) and needs neither teacher nor class labels. The result is a folder that
models.detection.load_detector loads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.detection.backbone import Backbone, Made, load_backbone, set_drop_path
from models.detection.config import DetectorConfig
from models.detection.detector import Detector
from models.detection.files import save_detector
from models.files.places import expanded
from models.teacher.load import Teacher, fingerprint
from trainer import artifacts
from trainer.config.detect import DetectConfig
from trainer.context import Run
from trainer.data.boxes.batches import BoxData
from trainer.evaluation import detection
from trainer.objectives.detect import Detect
from trainer.request.graph import artifact_name
from trainer.teaching.estimate import Known, Rehearsed, of_training
from trainer.teaching.students import new_student

SIZES = ("masks", "shorter_side", "longest_side", "width", "queries", "groups", "layers", "heads", "mlp_dim", "dropout")
SIZES += ("maps", "window", "global_blocks")  # of section detect, as DetectorConfig calls them


def run(run: Run, start: str) -> None:
    """Train OUT/detect, OUT/detect_scratch, ..."""
    schedule = run.recipe.detect
    backbone = backbone_of(run, start)
    made_of_backbone = run.opened.once("backbone record", lambda: record(backbone))
    folder, complete = run.open("detect", start=start)
    if complete:
        return
    settings = run.settings("detect")
    data = data_of(run, backbone)
    whole = objective(run, backbone, data)
    made_with = {"backbone": made_of_backbone, "scratch": schedule.scratch, "frozen": schedule.freeze}
    trained = run.train(
        whole,
        data,
        schedule,
        settings,
        folder,
        "detect" if start == "distilled" else f"detect, {start}",
        layer_decay=schedule.layer_decay,
        ema=schedule.ema,
        evaluate=detection.evaluate,
    )
    if run.dist.main:
        save_detector(whole.detector, folder, _whole(whole, trained.weights))
    run.finish(folder, "detect", None, trained, settings, metrics=trained.outcome.evaluation, made_with=made_with)


def objective(run: Run, backbone: Backbone, data: BoxData) -> Detect:
    """The detector before any training; with detect.freeze its backbone stands beside what is trained."""
    detect = run.recipe.detect
    vit = backbone.vit
    if detect.scratch and not next(vit.parameters()).is_meta:
        vit = backbone.made.build(run.recipe.seed)
    set_drop_path(vit, detect.drop_path)
    detector = Detector(data.config, vit, backbone.made, run.recipe.seed)
    side = detector.backbone.patch_size
    return Detect(detector, data.mean_patches(side), detect.freeze, data.most_patches(side))


def taught(run: Run, module: int | None) -> Detect:
    """What the phase trains, before any training; of a student that is not trained yet, its shapes."""
    backbone = run.opened.once("backbone to plan with", lambda: _planned_backbone(run))
    return objective(run, backbone, data_of(run, backbone))


def check(run: Run) -> None:
    """Data and backbone, and whether they make a detector."""
    detect = run.recipe.detect
    run.boxes  # noqa: B018  opens the data
    start = run.recipe.train.start
    if detect.backbone or (run.out / artifact_name("train", start=start) / "result.json").is_file():
        backbone = backbone_of(run, start)
        objective(run, backbone, data_of(run, backbone))


def rehearse(run: Run, module: int | None, known: Known) -> Rehearsed:
    """What training it will cost, where the backbone is there already."""
    train, val = run.boxes
    images = f"{len(train):,} training and {len(val):,} validation images, {len(train.categories)} categories"
    whole = taught(run, module)
    parameters = sum(p.numel() for p in whole.module.parameters())
    found = of_training(run, "detect", "detect", whole.flops_per_image, images=len(train))
    text = f"{images}; detector of {parameters / 1e6:.3g} M parameters; {found.text}"
    return Rehearsed(text, found.costs, parameters)


def _planned_backbone(run: Run) -> Backbone:
    if run.recipe.detect.backbone:
        with torch.device("cpu"):
            return backbone_of(run, "distilled")
    with torch.device("meta"):
        vit = new_student(run, run.recipe.train.drop_path)
    return Backbone(vit, run.teacher.preprocessing, Made("vmoe", {}), "the student")


def backbone_of(run: Run, start: str) -> Backbone:
    """The student that phase train left, or detect.backbone.

    Raises:
        ValueError: neither is there, or it is no backbone.
    """
    source = run.recipe.detect.backbone
    if not source:
        trained, _ = artifacts.require(run.out, artifact_name("train", start=start), run.recipe, "--phase detect")
        with artifacts.reading(trained):
            return load_backbone(str(trained))
    backbone = load_backbone(run.pinned(expanded(source)))
    run.resolved(source, backbone.source)
    return backbone


def data_of(run: Run, backbone: Backbone) -> BoxData:
    """The images, as this backbone takes them."""
    detect: DetectConfig = run.recipe.detect
    train, val = run.boxes
    sizes: dict[str, Any] = {name: getattr(detect, name) for name in SIZES}
    config = DetectorConfig(tuple(train.categories), tuple(train.category_ids), backbone.preprocessing, **sizes)
    return BoxData(train, val, config, detect.hflip, detect.jitter, run.workers)


def _whole(objective: Detect, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights of the detector; those of a frozen backbone in float32, as they were."""
    if not objective.frozen:
        return weights
    frozen = {f"backbone.{name}": tensor.float() for name, tensor in objective.detector.backbone.state_dict().items()}
    return frozen | {f"heads.{name}": tensor for name, tensor in weights.items()}


def record(backbone: Backbone) -> dict[str, Any]:
    """What tells this backbone from others; ask before it trains."""
    return fingerprint(Teacher(backbone.vit, backbone.preprocessing, backbone.source, None, 0))
