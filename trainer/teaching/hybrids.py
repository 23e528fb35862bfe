"""Hybrid accuracy: the meta model with one of its stages replaced by the teacher's module."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.modules.meta import MetaModel
from trainer.config.ds_config import Settings
from trainer.context import Run
from trainer.distributed.engine import working_type
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.objectives import Pairs
from trainer.tracking.health import NonFiniteLoss, against_chance

log = logging.getLogger(__name__)
FAR_BELOW = 0.9  # a hybrid under this share of the teacher's accuracy teaches little
NOTHING_LEFT = 1.0  # relative error of a hybrid that is no better than zeros


@dataclass(frozen=True)
class TeacherCheck:
    """What the teacher reaches on the validation images by itself.

    Attributes:
        accuracy: None where it tells no classes.
        doubt: empty, or one line: it is not above chance.
    """

    accuracy: float | None
    doubt: str = ""


def check_teacher(run: Run, settings: Settings) -> TeacherCheck:
    """Measure the teacher before anything learns from it (collective).

    Raises:
        ValueError: on all ranks, a teacher.source that is far below chance, unless teacher.allow_chance; or one whose
            features are no numbers.
    """
    dtype = working_type(settings)
    teacher = run.teacher.model.to(run.dist.device, dtype)
    if not run.classifies:
        _refuse_nonfinite(run, settings, dtype)
        return TeacherCheck(None)
    evaluation = evaluate(Predictor(teacher, teacher), run.data, dtype, run.eval_batch(settings), run.dist)
    accuracy, images, classes = evaluation["accuracy"], evaluation["images"], len(run.labels)
    verdict = against_chance(accuracy, images, classes)
    if verdict == "above":
        return TeacherCheck(accuracy)
    found = f"teacher {run.teacher.source} reaches {accuracy:.1%} on {images} validation images"
    chance = f"where guessing among {classes} classes reaches {1 / classes:.1%}"
    cause = "its classes may stand in another order than the data's, its images may need other preprocessing"
    t = run.recipe.teacher
    if verdict == "below" and t.source and not t.allow_chance:
        raise ValueError(
            f"{found}, {chance}: {cause}. Check teacher.classes={t.classes} and its id2label, or set "
            "teacher.allow_chance=true to go on"
        )
    if accuracy >= 2 / classes:
        level = logging.WARNING
        doubt = f"{found}, {chance}: too few images to tell it from luck; validate on more (data.val_share)"
    else:
        level = logging.ERROR
        doubt = f"{found}, {chance}: nothing can be learnt from it; {cause}, or it is not trained"
    if run.dist.main:
        log.log(level, doubt)
    return TeacherCheck(accuracy, doubt)


def _refuse_nonfinite(run: Run, settings: Settings, dtype: torch.dtype) -> None:
    """Raise a ValueError where the teacher's features are not finite on some validation image (collective)."""
    whole = MetaModel(run.teacher_stages())
    itself = Predictor(whole, whole, compare=lambda images: {"": (whole(images),) * 2})
    try:
        evaluation = evaluate(itself, run.data, dtype, run.eval_batch(settings), run.dist)
        count = evaluation.get("nonfinite_images", 0)
    except NonFiniteLoss:
        count = "all"
    if count:
        raise ValueError(
            f"the features of teacher {run.teacher.source} are not finite on {count} of the validation images (in "
            f"{str(dtype).removeprefix('torch.')}): check its weights and the images, or work in fp32"
        )


def measure(
    run: Run, meta: MetaModel, stages: list[nn.Module], settings: Settings, teacher_accuracy: float | None = None
) -> dict[str, float]:
    """Accuracy of the teacher, and of the meta model with each teacher module in its place (collective).

    Without classes: relative error of the final tokens of the same hybrids beside the teacher's.

    Args:
        teacher_accuracy: where it is known already.
    """
    dtype, batch = working_type(settings), run.eval_batch(settings)
    meta.to(run.dist.device, dtype)
    teacher = run.teacher.model.to(run.dist.device, dtype)
    if not run.classifies:
        found = evaluate(_every_hybrid(meta, stages), run.data, dtype, batch, run.dist)
        return {f"hybrid_relative_error/{i}": found[f"relative_error/{i}"] for i in range(len(stages))}
    accuracies = {}
    predictors = {}
    if teacher_accuracy is None:
        predictors["teacher_accuracy"] = Predictor(meta, teacher, (teacher,))
    else:
        accuracies["teacher_accuracy"] = teacher_accuracy
    for i, stage in enumerate(stages):
        predictors[f"hybrid_accuracy/{i}"] = _hybrid(meta, stage, i)
    for name, predictor in predictors.items():
        accuracies[name] = evaluate(predictor, run.data, dtype, batch, run.dist)["accuracy"]
    return accuracies


def _hybrid(meta: MetaModel, stage: nn.Module, i: int) -> Predictor:
    """The meta model with the teacher's module in place i."""
    return Predictor(meta, _through(meta, stage, i), (stage,))


def _every_hybrid(meta: MetaModel, stages: list[nn.Module]) -> Predictor:
    """The final tokens of every hybrid beside the teacher's, which runs once for all of them."""
    teacher = MetaModel(stages)

    def compare(images: Tensor) -> Pairs:
        tokens = teacher(images)
        return {f"/{i}": (_through(meta, stage, i)(images), tokens) for i, stage in enumerate(stages)}

    return Predictor(meta, meta, (teacher,), compare)


def _through(meta: MetaModel, stage: nn.Module, i: int) -> Callable[[Tensor], Tensor]:
    """Images through the meta model with a module in place i."""
    return lambda x: meta.back(stage(meta.front(x, i)), i)


def report(metrics: dict[str, float], modules: int) -> None:
    """Log what `measure` found, and warn of a module that is broken inside the meta model."""
    if "teacher_accuracy" not in metrics:
        _report_errors([metrics[f"hybrid_relative_error/{i}"] for i in range(modules)])
        return
    teacher = metrics["teacher_accuracy"]
    hybrids = [metrics[f"hybrid_accuracy/{i}"] for i in range(modules)]
    shown = ", ".join(f"{i}: {100 * h:.1f}%" for i, h in enumerate(hybrids))
    log.info("teacher %.1f%%, hybrids %s", 100 * teacher, shown)
    for i, hybrid in enumerate(hybrids):
        if hybrid < FAR_BELOW * teacher:
            log.warning(
                "teacher module %d reaches only %.1f%% inside the meta model (teacher %.1f%%): its student will learn "
                "from a broken teacher. Use meta.objective=theseus, meta.init=teacher, more meta.epochs, or "
                "meta.blocks_per_module=0",
                i,
                100 * hybrid,
                100 * teacher,
            )


def _report_errors(hybrids: list[float]) -> None:
    """The same without classes: relative errors of the hybrids' final tokens, 1 for a model that gives zeros."""
    shown = ", ".join(f"{i}: {error:.3g}" for i, error in enumerate(hybrids))
    log.info("relative error of the hybrids %s", shown)
    for i, error in enumerate(hybrids):
        if error >= NOTHING_LEFT:
            log.warning(
                "with teacher module %d in the meta model the final tokens have a relative error of %.3g, no better "
                "than zeros: its student is judged by a broken meta model. Use meta.objective=theseus, "
                "meta.init=teacher, more meta.epochs, or meta.blocks_per_module=0",
                i,
                error,
            )
