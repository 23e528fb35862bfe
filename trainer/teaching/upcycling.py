"""The student's start from dense weights (student.init): the dense model, its layers, and what its clusters cost.

With student.experts=copy the start is copied anew by whoever builds the student. With clusters it is computed once, by
whichever phase needs it first, and kept as OUT/upcycle, so that every phase starts from the same weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.experts.from_clusters import Clustered, cluster_experts
from models.experts.upcycle import chosen_layers, norm_eps, upcycle
from models.flops import forward_flops, num_tokens
from models.moe.layer import MoE
from models.teacher.classes import without_head
from models.teacher.load import Teacher, fingerprint, load_teacher
from trainer import artifacts
from trainer.config.load import first_difference, one_line, split_evenly, to_dict
from trainer.context import Run
from trainer.data.loader import eval_batches
from trainer.disk import move_into_place
from trainer.distributed.interrupt import HEARTBEAT
from trainer.request.graph import defining_images
from trainer.teaching.families import family_of

log = logging.getLogger(__name__)
FOLDER = "upcycle"
BATCH = 64  # images per forward of the dense model
POINTS = 65_536  # tokens per layer that are kept for clustering: 200 MB at width 768


def dense_start(run: Run) -> Teacher:
    """What student.init names, in float32 on the CPU: apart from the run's teacher, which training moves and rounds."""
    return run.opened.once("dense start", lambda: _load_dense(run))


def _load_dense(run: Run) -> Teacher:
    init = run.recipe.student.init
    if init == "teacher":
        return run.planned_teacher or run.load_teacher()
    dense = load_teacher(run.pinned(init))
    run.resolved(init, dense.source)
    if not run.classifies:
        return without_head(dense)
    if dense.num_classes == len(run.labels):
        try:
            return run.fitted(dense, "names", "student.init")
        except ValueError as error:  # it starts the student all the same, as one with another number of classes does
            log.warning("%s. The student starts without its head", one_line(error).rstrip("."))
            return without_head(dense)
    return dense


def started(run: Run, config: Any, depths: tuple[int, ...]) -> nn.Module:
    """A student started from student.init (collective where the clusters are still to be computed).

    On the meta device, and outside of a process group (a dry run), it only looks at whether everything fits.

    Args:
        depths: blocks per module of the student.

    Raises:
        ValueError: what does not fit; both sides are named.
    """
    dense, s = dense_start(run), run.recipe.student
    eps = norm_eps(dense.model)
    config = dataclasses.replace(config, norm_eps=None if eps == 1e-6 else eps)
    student = family_of(run.recipe).build(config)
    layers = _layers(run, dense, depths)
    left_behind = upcycle(
        student, dense, layers, run.teacher.preprocessing, noise=s.expert_noise, own_classes=s.init == "teacher"
    )
    if student.pos_embed.is_meta:
        return student
    if left_behind:
        said = f"the student starts from {dense.source} without {', '.join(left_behind)}"
        run.opened.once(f"said: {said}", lambda: log.info(said))  # every phase builds it again
    if s.experts == "clusters" and torch.distributed.is_initialized():
        student.load_state_dict(_clustered(run, student, layers))
    return student


def record(run: Run) -> dict[str, Any]:
    """What result.json says of the start; nothing for a student that starts anew."""
    s = run.recipe.student
    if not s.init:
        return {}
    return {"student_start": {**fingerprint(dense_start(run)), "experts": s.experts, "expert_noise": s.expert_noise}}


def spent(run: Run) -> int:
    """FLOPs that went into OUT/upcycle; 0 where the start is a plain copy, or none."""
    path = run.out / FOLDER / "result.json"
    if run.recipe.student.experts != "clusters" or not path.is_file():
        return 0
    return int(json.loads(path.read_text())["flops"])


def _layers(run: Run, dense: Teacher, depths: tuple[int, ...]) -> list[int]:
    if run.recipe.student.init == "teacher":
        return chosen_layers(run.teacher_depths, depths)
    return chosen_layers(split_evenly(len(dense.model.blocks), len(depths), f"student.init {dense.source}"), depths)


def _clustered(run: Run, student: nn.Module, layers: list[int]) -> dict[str, Tensor]:
    """The student's weights after clustering, from OUT/upcycle, which rank 0 makes where it is missing (collective)."""
    folder = run.out / FOLDER
    with run.dist.together():
        if run.dist.main and not (folder / "result.json").is_file():
            _make(run, student, layers, folder)
    with run.dist.together():  # every rank sees the file, also on a file system that is slow to show it
        _, result = artifacts.require(run.out, FOLDER, run.recipe, "student.experts=clusters")
        made_from = {"recipe": _comparable(result["recipe"]), "dense": result["dense"]["sha256"]}
        asked_for = {"recipe": _comparable(_defining(run)), "dense": fingerprint(dense_start(run))["sha256"]}
        different = first_difference(made_from, asked_for)
        if different:
            raise ValueError(f"{folder} was made for another start ({different}): use another --out, or delete it")
        return artifacts.load_weights(folder, student.state_dict())


def _make(run: Run, student: nn.Module, layers: list[int], folder: Path) -> None:
    """Cluster, and put the folder in its place in one step: jobs of an array may do so at the same time."""
    begun = time.perf_counter()
    sparse = [number for number, block in enumerate(student.blocks) if isinstance(block.mlp, MoE)]
    images = run.sources[0].spread(run.recipe.expert.cluster_images)
    log.info("clustering what %d images send into the MLPs of %s", len(images), dense_start(run).source)
    inputs = _mlp_inputs(run, images, sorted({layers[number] for number in sparse}))
    clustered = {}
    for number in sparse:
        HEARTBEAT.beat()
        try:
            clustered[number] = cluster_experts(
                student.blocks[number].mlp, inputs[layers[number]].to(run.dist.device), run.recipe.seed
            )
        except ValueError as error:
            raise ValueError(f"student block {number} (from layer {layers[number]}): {error}") from None
        log.info("block %d: %s", number, clustered[number])
    beside = run.out / f"{FOLDER}.tmp" / f"{socket.gethostname()}.{os.getpid()}"
    beside.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(beside, preprocessing=run.teacher.preprocessing, labels=run.classes)
    artifacts.write_result(beside, _result(run, len(images), layers, clustered, time.perf_counter() - begun))
    if not move_into_place(beside, folder, "result.json"):  # another job was faster
        shutil.rmtree(beside)
    with contextlib.suppress(OSError):  # another job may still be at work there
        beside.parent.rmdir()


def _result(
    run: Run, images: int, layers: list[int], clustered: dict[int, Clustered], seconds: float
) -> dict[str, Any]:
    dense = dense_start(run)
    return {
        "phase": FOLDER,
        "module": None,
        "metrics": {},
        "images_seen": images,
        "flops": float(images * forward_flops(dense.model, num_tokens(dense.model))),  # k-means and SVD: under 1% of it
        "seconds_to_make": seconds,
        "command": run.command,
        "data": run.sources[0].origin,
        "layers": layers,
        "clusters": {str(number): dataclasses.asdict(block) for number, block in clustered.items()},
        "recipe": _defining(run),
        "dense": fingerprint(dense),
    }


def _defining(run: Run) -> dict[str, Any]:
    """What of the recipe decides the start."""
    values = to_dict(run.recipe)
    data = {key: value for key, value in values["data"].items() if key != "workers"}
    kept = {key: values[key] for key in ("seed", "modules", "student")}
    return kept | {"data": data, "depths": values["teacher"]["depths"], "images": run.recipe.expert.cluster_images}


def _comparable(recorded: dict[str, Any]) -> dict[str, Any]:
    """The same without what defines nothing: where the images lie, and how they are found there."""
    return recorded | {"data": defining_images(recorded["data"])}


@torch.no_grad()
def _mlp_inputs(run: Run, images: Any, layers: list[int]) -> dict[int, Tensor]:
    """What reaches the MLPs of these layers, (N, D) float32 on the CPU: some tokens of every image, drawn by seed."""
    dense, device = dense_start(run), run.dist.device
    per_image = max(1, POINTS // len(images))
    generator = torch.Generator().manual_seed(run.recipe.seed)
    now: dict[int, Tensor] = {}  # of the last forward
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [
        dense.model.blocks[layer].mlp.register_forward_pre_hook(lambda _, given, at=layer: now.update({at: given[0]}))
        for layer in layers
    ]
    try:
        dense.model.to(device)
        for b in eval_batches(images, dense.preprocessing, batch=BATCH, workers=run.recipe.data.workers):
            HEARTBEAT.beat()
            dense.model(b.images[b.mask].to(device))
            drawn_BT = torch.rand(int(b.mask.sum()), num_tokens(dense.model), generator=generator).argsort(1)
            place_BK1 = drawn_BT[:, :per_image, None].to(device)
            for layer, x_BTD in now.items():
                kept[layer].append(x_BTD.take_along_dim(place_BK1, 1).flatten(0, 1).float().cpu())
    finally:
        dense.model.cpu()
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(parts) for layer, parts in kept.items()}
