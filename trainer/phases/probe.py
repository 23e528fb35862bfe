"""Phase probe: give a teacher whose head does not fit a linear classifier of the data's classes, and tune it if asked.

The frozen teacher runs once over all images without augmentation (trainer/teaching/features.py); the classifier is
fitted on what its head would read. Where teacher.head=auto finds that the teacher's own head fits, it says so and ends.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.flops import forward_flops, num_tokens
from models.labels import first_names
from models.modules.stages import set_drop_path
from models.teacher.classes import feature_width, with_probe
from models.teacher.load import Teacher, fingerprint
from trainer import heads
from trainer.context import Run, Trained, save_weights
from trainer.distributed.engine import working_type
from trainer.distributed.main_rank import on_main
from trainer.evaluation.linear import LinearFit, fit_linear
from trainer.heads import Head
from trainer.loop.fit import Outcome
from trainer.objectives import Classify
from trainer.teaching import features
from trainer.teaching.estimate import Cost, Known, Rehearsed, of_training
from trainer.teaching.features import Features

log = logging.getLogger(__name__)
NOTHING = "nothing to fit: the teacher's own head has the data's classes, or there are none"
NUMBER = 4  # bytes of a feature: they are kept in fp32, whatever they were computed in
COPIES = 4  # of the training features that a fit holds at once: given, standardised, and its two parts


def run(run: Run) -> None:
    """Make OUT/probe."""
    folder, complete = run.open("probe")
    if complete:
        return
    teacher = run.take_checkpoint()
    head = run.head_of(teacher)
    settings = run.settings_without_training()
    if head.kind != "probe":
        _leave_as_it_is(run, folder, head, settings)
        return
    if run.dist.main:
        log.info("the teacher's head is a probe: %s", head.why)
    fit, metrics, seconds = _fit(run, teacher, folder, settings)
    images = sum(map(len, run.sources))
    feature_flops = images * _flops(teacher)
    trained = Trained(Outcome({}, seconds, steps=0, images_seen=images), {}, epochs=0, flops_per_image=0)
    weights = {"head.weight": fit.weight, "head.bias": fit.bias}
    del teacher  # on the device, and rounded to the type it was run in
    if run.recipe.teacher.finetune_epochs:
        probed = with_probe(run.take_checkpoint(), fit.weight, fit.bias, run.labels)
        trained, settings = _tune(run.with_teacher(probed), folder)
        weights = trained.weights
        metrics |= trained.outcome.evaluation | {"probe_accuracy": metrics["accuracy"]}
        outcome = replace(trained.outcome, seconds=trained.outcome.seconds + seconds)
        trained = replace(trained, outcome=outcome)
    with run.dist.together():
        if run.dist.main:
            save_weights(folder / "model.safetensors", weights)
    run.dist.barrier()
    whole = trained.epochs > 0
    fitted = run.opened.once(
        "teacher", lambda: heads.with_fitted_probe(run.take_checkpoint(), run.labels, folder, whole=whole)
    )
    run.finish(
        folder,
        "probe",
        None,
        trained,
        settings,
        metrics=metrics,
        extra_flops=feature_flops,
        made_with={"head": _record(head), "teacher": fingerprint(fitted) if run.dist.main else {}},
    )


def check(run: Run) -> None:
    """Whether every class has the images that a probe needs.

    Raises:
        ValueError: a class with one training image.
    """
    if run.planned_teacher is None:
        return  # its own head serves, or the probe is there
    train = run.sources[0]
    images_of = np.bincount(train.targets, minlength=len(run.labels))
    single = [name for name, images in zip(run.labels, images_of) if images == 1]
    if single:
        raise ValueError(
            "phase probe needs two training images of every class, one of them to choose its regularisation by; "
            f"{train.name} has one of {first_names(single, 3)}: give more images of them, remove them, or set "
            "teacher.head=none"
        )


def objective(run: Run) -> Classify:
    """The probed teacher on the labels (teacher.finetune_epochs)."""
    return Classify(run.teacher.model, run.tokens, run.recipe.augment.label_smoothing)


def taught(run: Run, module: int | None) -> Classify:
    """What teacher.finetune_epochs trains."""
    run.teacher.model.requires_grad_(True)
    return objective(run)


def rehearse(run: Run, module: int | None, known: Known) -> Rehearsed:
    """One forward of the teacher per image, the size of its features, and what fine-tuning will cost."""
    result = run.out / "probe" / "result.json"
    done = result.is_file()
    if not done and run.planned_teacher is None:
        return Rehearsed(NOTHING, {"probe": Cost(0.0, 0.0)})
    if done and json.loads(result.read_text())["head"]["kind"] != "probe":
        return Rehearsed(NOTHING, {"probe": Cost(0.0, 0.0)})
    training, validation = map(len, run.sources)
    images = training + validation
    width = feature_width(run.teacher)
    flops = images * _flops(run.teacher)
    files = images * width * NUMBER
    memory = COPIES * training * width * NUMBER
    text = (
        f"{images:,} images through the teacher once; {width:,} features of each, {_size(files)} on disk, "
        f"{_size(memory)} in memory for the fit"
    )
    cost = Cost(float(images), float(flops))
    parameters = 0
    problem = ""
    if run.recipe.teacher.finetune_epochs:
        tuned = of_training(_for_tuning(run), "teacher", "probe", objective(run).flops_per_image)
        text += f"; then {tuned.text}"
        problem = tuned.problem
        cost = Cost(images + tuned.costs["probe"].images, flops + tuned.costs["probe"].flops)
        parameters = sum(p.numel() for p in run.teacher.model.parameters())
    return Rehearsed(text, {"probe": cost}, parameters, files=files, problem=problem)


def _leave_as_it_is(run: Run, folder: Any, head: Head, settings: Any) -> None:
    """The result of a teacher that needs no probe."""
    if run.dist.main:
        log.info("nothing to fit: %s", head.why)
        epochs = run.recipe.teacher.finetune_epochs
        if epochs:
            log.warning("teacher.finetune_epochs=%d has no effect without a probe: the teacher stays as it is", epochs)
    nothing = Trained(Outcome({}, 0.0, steps=0, images_seen=0), {}, epochs=0, flops_per_image=0)
    made_with = {"head": _record(head), "teacher": run.teacher_record if run.dist.main else {}}
    run.finish(folder, "probe", None, nothing, settings, metrics={}, made_with=made_with)


def _record(head: Head) -> dict[str, str]:
    """What result.json says of the head that was taken."""
    return {"kind": head.kind, "why": head.why}


def _fit(run: Run, teacher: Teacher, folder: Any, settings: Any) -> tuple[LinearFit, dict[str, float], float]:
    """The classifier, on every rank, what it reaches, and the seconds it took, also in starts before (collective)."""
    dtype = working_type(settings)
    model = teacher.model.to(run.dist.device, dtype).eval()

    def forward(images: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(images), pre_logits=True)

    kept = {name: folder / "features" / name for name in ("train", "val")}
    data = run.data_for(teacher.preprocessing)
    computed = 0
    for (name, place), source in zip(kept.items(), run.sources):
        computed += features.compute(
            forward,
            source,
            teacher.preprocessing,
            place,
            run.dist,
            dtype=dtype,
            batch=run.eval_batch(settings),
            workers=data.workers,
            description=f"probe, features of {name}",
        )

    def fitted() -> tuple[LinearFit, dict[str, float], float]:
        images = sum(map(len, run.sources))
        log.info("features of %s images, %s of them computed now", f"{images:,}", f"{computed:,}")
        train = features.read(run.sources[0], kept["train"])
        val = features.read(run.sources[1], kept["val"])
        started = time.perf_counter()
        fit, metrics = _fitted(train, val, len(run.labels), run.recipe.seed, _where(train, run.dist.device))
        seconds = (train.seconds + val.seconds) / run.dist.world + time.perf_counter() - started
        return fit, metrics, seconds

    fit, metrics, seconds = run.dist.gather(on_main(run.dist, fitted))[0]
    if run.dist.main:
        log.info(
            "probe: accuracy %.1f%% on %s validation images, %.1f%% on held-out training images, L2 %g",
            100 * metrics["accuracy"],
            f"{len(run.sources[1]):,}",
            100 * fit.held_out_accuracy,
            fit.regularisation,
        )
    return fit, metrics, seconds


def _fitted(
    train: Features, val: Features, num_classes: int, seed: int, device: torch.device
) -> tuple[LinearFit, dict[str, float]]:
    fit = fit_linear(train.features.to(device), train.labels, num_classes, seed=seed)
    fit = replace(fit, weight=fit.weight.cpu(), bias=fit.bias.cpu())
    predicted_N = (val.features @ fit.weight.T + fit.bias).argmax(1)
    return fit, {
        "accuracy": float((predicted_N == val.labels).float().mean()),
        "held_out_accuracy": fit.held_out_accuracy,
        "regularisation": fit.regularisation,
    }


def _where(train: Features, device: torch.device) -> torch.device:
    """The device, where the fit has room there; else the CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if free < 2 * COPIES * train.features.nbytes:
            return torch.device("cpu")
    return device


def _for_tuning(run: Run) -> Run:
    """The same run, in which section teacher is the schedule of the fine-tuning."""
    t = run.recipe.teacher
    return replace(run, recipe=replace(run.recipe, teacher=replace(t, epochs=t.finetune_epochs)))


def _tune(run: Run, folder: Any) -> tuple[Trained, Any]:
    """Train the whole teacher with its new head; resumed from the checkpoints of `folder`."""
    run = _for_tuning(run)
    schedule = run.recipe.teacher
    model = run.teacher.model
    set_drop_path(model, schedule.drop_path)
    model.requires_grad_(True)
    settings = run.settings("teacher")
    trained = run.train(objective(run), run.data, schedule, settings, folder, "probe", evaluate_start=True)
    return trained, settings


def _flops(teacher: Teacher) -> int:
    """FLOPs of the features of one image: a forward without the head."""
    return forward_flops(teacher.model, num_tokens(teacher.model)) - forward_flops(teacher.model.head, 1)


def _size(number: float) -> str:
    """Bytes for people."""
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"
