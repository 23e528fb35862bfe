"""A run whose data is not opened and whose teacher has no weights: enough to know every size of every phase."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from models.preprocessing import Preprocessing
from models.teacher.classes import without_head
from models.teacher.load import Teacher
from trainer.config.recipe import Recipe
from trainer.context import Opened, Run
from trainer.data.sources import open_source
from trainer.distributed.ranks import Dist
from trainer.plan.preflight import STAND_IN
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


def planned_run(
    recipe: Recipe, ds_values: dict[str, Any], out: Path, nodes: int, per_node: int, images: int | None, classes: int
) -> Run:
    """The run of a recipe on some ranks; nothing is downloaded where the teacher is one of timm's.

    Args:
        images: training images, where the data is not to be opened.
        classes: of the data, in that case.

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
    things = {"sources": (sources, sources), "teacher": teacher}
    if recipe.student.init == "teacher":
        things["dense start"] = teacher
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


def _teacher(run: Run) -> Teacher:
    t, labels = run.recipe.teacher, run.labels
    if not t.source:
        return planned_teacher(t, labels)
    if not t.source.startswith(TIMM):
        return run.teacher
    architecture = t.source.removeprefix(TIMM).split("@")[0]
    arguments = {"img_size": t.image_size} if t.image_size else {}
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False, num_classes=len(labels), **arguments)
    except RuntimeError as error:
        raise ValueError(f"teacher.source={t.source}: timm {timm.__version__} cannot build it: {error}") from None
    size = model.patch_embed.img_size[0]
    preprocessing = Preprocessing(size, STAND_IN.mean, STAND_IN.std)
    return Teacher(model.eval().requires_grad_(False), preprocessing, t.source, labels, len(labels))
