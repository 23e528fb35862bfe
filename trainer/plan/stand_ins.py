"""A run whose data is not opened and whose teacher has no weights: enough to know every size of every phase."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from models.detection.backbone import Backbone, Made
from models.files.places import expanded
from models.preprocessing import Preprocessing
from models.teacher.classes import without_head
from models.teacher.load import Teacher
from trainer.config.recipe import Recipe
from trainer.context import Opened, Run
from trainer.data.sources import open_source
from trainer.distributed.ranks import Dist
from trainer.plan.preflight import STAND_IN
from trainer.request.graph import row_of
from trainer.teaching.teachers import planned_teacher

TIMM = "timm/"


@dataclass(frozen=True)
class CountedImages:
    """Images of which only the number is known."""

    count: int
    labels: list[str]
    name: str = "images that are only counted"
    origin: str = "not opened"
    targets: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class BoxedImages:
    """The images of a detector, of which only the numbers are known."""

    count: int
    num_categories: int
    assumed: str = "images are taken to be of 640 x 480 pixels, as most of COCO's are"

    def __len__(self) -> int:
        return self.count

    @property
    def categories(self) -> list[str]:
        """Names that stand for those of the data."""
        return [str(number) for number in self.category_ids]

    @property
    def category_ids(self) -> list[int]:
        """Counted from 1."""
        return list(range(1, self.num_categories + 1))

    def sizes(self) -> Counter[tuple[int, int]]:
        """See trainer.data.boxes.base.BoxSource.sizes."""
        return Counter({(480, 640): self.count})


def planned_run(
    recipe: Recipe,
    ds_values: dict[str, Any],
    out: Path,
    nodes: int,
    per_node: int,
    images: int | None,
    classes: int,
    boxed: BoxedImages | None = None,
) -> Run:
    """The run of a recipe on some ranks; nothing is downloaded where the teacher is one of timm's.

    Args:
        images: training images, where the data is not to be opened.
        classes: of the data, in that case.
        boxed: the images of a detector, where theirs are not to be opened.

    Raises:
        ValueError: data that only a download could count, and `images` is not given; a teacher that is not known.
    """
    dist = Dist(0, nodes * per_node, 0, per_node, torch.device("cpu"))
    sources = _sources(recipe, images, classes)
    opened = Opened({"sources": (sources, sources)})
    run = Run(recipe, ds_values, out, dist, "plan", opened=opened)
    teacher = _teacher(run)
    if not run.classifies:
        teacher = without_head(teacher)
    things: dict[str, Any] = {"sources": (sources, sources), "teacher": teacher}
    if recipe.student.init == "teacher":
        things["dense start"] = teacher
    if not row_of("detect").refused(recipe):
        things |= _of_detector(recipe, boxed)
    return Run(recipe, ds_values, out, dist, "plan", opened=Opened(things))


def _sources(recipe: Recipe, images: int | None, classes: int) -> Any:
    data = recipe.data
    if images is not None:
        return CountedImages(images, [str(number) for number in range(classes)])
    elsewhere = data.path and not Path(data.path).expanduser().exists()
    if data.source == "hub" or (data.source == "auto" and elsewhere):
        raise ValueError(
            f"a plan does not download data.path={data.path}: say how many training images it has, and how many "
            "classes, e.g. --images 1281167 --classes 1000"
        )
    return open_source(data, "train", labels_needed=False)


def _of_detector(recipe: Recipe, boxed: BoxedImages | None) -> dict[str, Any]:
    """What phase detect opens, as far as a plan does not."""
    things: dict[str, Any] = {}
    detect = recipe.detect
    if boxed is not None:
        things["boxes"] = (boxed, boxed)
    elif detect.data.path and not Path(expanded(detect.data.path)).is_dir():
        raise ValueError(
            f"detect.data.path={detect.data.path} is not there: say how many training images it has, and of how many "
            "categories, e.g. --box-images 118287 --categories 80"
        )
    if detect.backbone.startswith(TIMM):
        vit = _of_timm("detect.backbone", detect.backbone, num_classes=0)
        things["backbone to plan with"] = Backbone(vit, _preprocessing(vit), Made("timm", {}), detect.backbone)
    return things


def _teacher(run: Run) -> Teacher:
    t, labels = run.recipe.teacher, run.labels
    if not t.source:
        return planned_teacher(t, labels)
    if not t.source.startswith(TIMM):
        return run.teacher
    arguments = {"img_size": t.image_size} if t.image_size else {}
    model = _of_timm("teacher.source", t.source, num_classes=len(labels), **arguments)
    return Teacher(model.eval().requires_grad_(False), _preprocessing(model), t.source, labels, len(labels))


def _of_timm(key: str, source: str, **arguments: Any) -> nn.Module:
    """The shapes of a model of timm's, `source` as the recipe names it under `key`."""
    architecture = source.removeprefix(TIMM).split("@")[0]
    try:
        with torch.device("meta"):
            return timm.create_model(architecture, pretrained=False, **arguments)
    except RuntimeError as error:
        raise ValueError(f"{key}={source}: timm {timm.__version__} cannot build it: {error}") from None


def _preprocessing(model: nn.Module) -> Preprocessing:
    return Preprocessing(model.patch_embed.img_size[0], STAND_IN.mean, STAND_IN.std)
