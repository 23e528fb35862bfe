"""The student's start from dense weights (student.init): copied, cut into experts by clusters, or projected.

Plain copies are made anew by whoever builds the student. What takes images to compute, experts from clusters or a
student of other sizes, is computed once, by whichever phase needs it first (phase meta, so that jobs of an array find
it), and kept as OUT/upcycle, so that every phase starts from the same weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.experts.from_clusters import cluster_experts
from models.experts.projection import (
    LITTLE,
    Projected,
    StreamBasis,
    check_projection,
    project,
    projection_flops,
    stream_basis,
)
from models.experts.upcycle import add_noise, covered_layers, is_copy, norm_eps, upcycle
from models.files.hub import CheckpointFiles
from models.flops import forward_flops, num_tokens
from models.modules.basis import Basis, FittedBasis
from models.moe.layer import MoE
from models.teacher.classes import without_head
from models.teacher.load import Teacher, fingerprint, load_teacher
from trainer import artifacts
from trainer.config.load import first_difference, one_line, split_evenly, to_dict
from trainer.context import Run
from trainer.data.base import ImageSource
from trainer.disk import file_record, move_into_place
from trainer.distributed.interrupt import HEARTBEAT
from trainer.distributed.main_rank import on_main
from trainer.request.graph import defining_images
from trainer.teaching import bases, calibration
from trainer.teaching.families import family_of

log = logging.getLogger(__name__)
FOLDER = "upcycle"
POINTS = 65_536  # tokens per layer that are kept for clustering: 200 MB at width 768
BASIS_TOKENS = 16  # tokens for each channel of the dense model, that the basis is measured on
BASIS_IMAGES = 64  # and at least as many images


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
    """A student started from student.init (collective where something is still to be computed).

    On the meta device, and outside of a process group (a dry run), it only looks at whether everything fits.

    Args:
        depths: blocks per module of the student.

    Raises:
        ValueError: what does not fit; both sides are named.
    """
    dense, s = dense_start(run), run.recipe.student
    covered = _covered(run, dense, depths)
    copied = _is_copied(run, dense, config, covered)
    config = dataclasses.replace(config, norm_eps=_norm_eps(dense, copied))
    if not copied and not config.num_classes:  # its tokens lie in a basis of their own, at equal widths too
        config = dataclasses.replace(config, feature_width=run.teacher.model.embed_dim)
    student = family_of(run.recipe).build(config)
    own_classes = s.init == "teacher"
    if copied:
        layers = [first for first, _ in covered]
        images = run.teacher.preprocessing
        left_behind = upcycle(student, dense, layers, images, noise=s.expert_noise, own_classes=own_classes)
    else:
        left_behind = check_projection(student, dense, covered, images=fit_images(run, dense), own_classes=own_classes)
    if student.pos_embed.is_meta:
        return student
    if left_behind:
        said = f"the student starts from {dense.source} without {', '.join(left_behind)}"
        run.opened.once(f"said: {said}", lambda: log.info(said))  # every phase builds it again
    if torch.distributed.is_initialized() and (not copied or s.experts == "clusters"):
        with_head = not any(phrase.startswith("its head") for phrase in left_behind)
        student.load_state_dict(_computed(run, student, _Plan(depths, covered, copied, with_head)))
    return student


def start_bases(run: Run) -> list[Basis] | None:
    """The basis of each inner border, where the student's start was projected from the teacher; else None."""
    folder = run.out / FOLDER
    if run.recipe.student.init != "teacher" or not (folder / bases.FILE).is_file():
        return None
    width = dense_start(run).model.embed_dim
    return [FittedBasis(**vars(basis)) for basis in bases.load(folder, run.recipe.modules - 1, width)]


def planned_bases(run: Run, student: nn.Module, depths: tuple[int, ...]) -> list[Basis] | None:
    """The same in shape alone, before the start is computed."""
    if run.recipe.student.init != "teacher":
        return None
    dense = dense_start(run)
    if _is_copied(run, dense, student.config, _covered(run, dense, depths)):
        return None
    width, dense_width = student.embed_dim, dense.model.embed_dim
    basis = FittedBasis(torch.zeros(dense_width), torch.zeros(dense_width, width), torch.ones(width))
    return [basis] * (run.recipe.modules - 1)


def fit_images(run: Run, dense: Teacher) -> int:
    """Training images that a projected start is fitted on."""
    return calibration.image_count(run, dense.model, run.recipe.student.start_images)


def planned_flops(run: Run, student: nn.Module, depths: tuple[int, ...]) -> int:
    """FLOPs that OUT/upcycle will take; 0 for plain copies, or no start."""
    if not run.recipe.student.init:
        return 0
    dense = dense_start(run)
    covered = _covered(run, dense, depths)
    if not _is_copied(run, dense, student.config, covered):
        images = fit_images(run, dense)
        for_basis = basis_images(dense.model, images)
        clusters = run.recipe.student.experts == "clusters"
        return projection_flops(student, dense, covered, images, for_basis, clusters=clusters)
    if run.recipe.student.experts == "clusters":
        return _cluster_flops(dense, min(run.recipe.expert.cluster_images, len(run.sources[0])))
    return 0


def record(run: Run) -> dict[str, Any]:
    """What result.json says of the start; nothing for a student that starts anew."""
    s = run.recipe.student
    if not s.init:
        return {}
    how = {"start": s.start, "experts": s.experts, "expert_noise": s.expert_noise}
    return {"student_start": {**fingerprint(dense_start(run)), **how}}


def spent(run: Run) -> int:
    """FLOPs that went into OUT/upcycle; 0 where the start is a plain copy, or none."""
    path = run.out / FOLDER / "result.json"
    if not run.recipe.student.init or not path.is_file():
        return 0
    return int(json.loads(path.read_text())["flops"])


def _covered(run: Run, dense: Teacher, depths: tuple[int, ...]) -> list[tuple[int, int]]:
    """The dense layers that each of the student's blocks stands for, (first, stop)."""
    if run.recipe.student.init == "teacher":
        return covered_layers(run.teacher_depths, depths)
    what = f"student.init {dense.source}"
    return covered_layers(split_evenly(len(dense.model.blocks), len(depths), what), depths)


def _is_copied(run: Run, dense: Teacher, config: Any, covered: Sequence[tuple[int, int]]) -> bool:
    """What student.start says, or where it leaves that open, whether nothing has to be fitted."""
    start = run.recipe.student.start
    if start == "auto":
        return is_copy(config, dense.model, covered)
    return start == "copy"


def _norm_eps(dense: Teacher, copied: bool) -> float | None:
    """Of the student's norms; None = timm's. A start that is fitted takes other norms than LayerNorm too."""
    try:
        eps = norm_eps(dense.model)
    except ValueError:
        if copied:
            raise
        return None
    return None if eps == 1e-6 else eps


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a start is made.

    Attributes:
        depths: blocks per module of the student.
        covered: the dense layers that each block stands for, (first, stop).
        copied: the first of them as it is, else it is projected.
        with_head: the dense model's head becomes the student's.
    """

    depths: tuple[int, ...]
    covered: list[tuple[int, int]]
    copied: bool
    with_head: bool


def _computed(run: Run, student: nn.Module, plan: _Plan) -> dict[str, Tensor]:
    """The student's weights from OUT/upcycle, which rank 0 makes where it is missing (collective)."""
    folder = run.out / FOLDER
    there = run.dist.gather((folder / "result.json").is_file())[0]
    if not there:
        on_main(run.dist, lambda: _make(run, student, plan, folder))
    with run.dist.together():  # every rank sees the file, also on a file system that is slow to show it
        _, result = artifacts.require(run.out, FOLDER, run.recipe, "student.init")
        made_from = {"recipe": _comparable(result["recipe"]), "dense": result["dense"]["sha256"]}
        asked_for = {"recipe": _comparable(_defining(run)), "dense": fingerprint(dense_start(run))["sha256"]}
        if "source" in result:  # taken with modules that were taught from it, on whatever images
            asked_for["recipe"] = made_from["recipe"]
        different = first_difference(made_from, asked_for)
        if different:
            raise ValueError(f"{folder} was made for another start ({different}): use another --out, or delete it")
        return artifacts.load_weights(folder, student.state_dict())


def _make(run: Run, student: nn.Module, plan: _Plan, folder: Path) -> None:
    """Compute the start, and put the folder in its place in one step: jobs of an array may do so at the same time."""
    begun = time.perf_counter()
    beside = run.out / f"{FOLDER}.tmp" / f"{socket.gethostname()}.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)  # of a killed job: in containers process numbers come again
    beside.mkdir(parents=True)
    try:
        if _take(run, beside, needed=not plan.copied):
            pass
        elif plan.copied:
            made = _cluster(run, student, [first for first, _ in plan.covered])
            _write(run, student, beside, made, begun)
        else:
            made, border_bases = _project(run, student, plan)
            bases.save(beside, border_bases)
            _write(run, student, beside, made, begun)
        move_into_place(beside, folder, "result.json")  # unless another job was faster
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):  # another job may still be at work there
            beside.parent.rmdir()


def _take(run: Run, beside: Path, *, needed: bool) -> bool:
    """The start of the run that the modules are taken from (distill.source), whose borders lie in its basis.

    Args:
        needed: refuse a run that has none: its modules lie in another basis than one that is made here.

    Raises:
        ValueError: it is missing, or a file of it, or its record cannot be read.
    """
    source = run.recipe.distill.source
    if not source:
        return False
    files = CheckpointFiles(run.pinned(source), folder=FOLDER)
    result = files.find("result.json", optional=True)
    if result is None:
        if needed:
            raise ValueError(
                f"{files} has no {FOLDER}/result.json: its modules were not taught from a projected start, which "
                "student.init asks for here; set student.init and student.start as that run has them"
            )
        return False
    try:
        made = dict(json.loads(result.read_text()))
        names = dict(made["files"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"result.json of {files} is truncated or altered ({error!r})") from None
    for name, record in names.items():
        path = files.find(name) if Path(name).name == name else None
        if path is None:
            raise ValueError(f"{files} has no file {name!r}, which its result.json names: take the whole folder again")
        if file_record(path) != record:
            raise ValueError(f"{files}: {name} is truncated or altered (SHA-256 differs from result.json)")
        shutil.copyfile(path, beside / name)
    artifacts.write_result(beside, made | {"source": str(files), "command": run.command})
    log.info("the start of the student was taken from %s", files)
    return True


def _write(run: Run, student: nn.Module, beside: Path, made: dict[str, Any], begun: float) -> None:
    student.save_pretrained(beside, preprocessing=run.teacher.preprocessing, labels=run.classes)
    result = {
        "phase": FOLDER,
        "module": None,
        "seconds_to_make": time.perf_counter() - begun,
        "command": run.command,
        "data": run.sources[0].origin,
        "recipe": _defining(run),
        "dense": fingerprint(dense_start(run)),
    }
    artifacts.write_result(beside, result | made)


def _cluster(run: Run, student: nn.Module, layers: list[int]) -> dict[str, Any]:
    """Cut the experts of copied blocks by clusters of their inputs; what result.json says of it."""
    dense = dense_start(run)
    sparse = [number for number, block in enumerate(student.blocks) if isinstance(block.mlp, MoE)]
    images = run.sources[0].spread(run.recipe.expert.cluster_images)
    log.info("clustering what %d images send into the MLPs of %s", len(images), dense.source)
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
    return {
        "metrics": {},
        "images_seen": len(images),
        "flops": float(_cluster_flops(dense, len(images))),
        "layers": layers,
        "clusters": {str(number): dataclasses.asdict(block) for number, block in clustered.items()},
    }


def _cluster_flops(dense: Teacher, images: int) -> int:
    """A forward of each image; k-means and SVD are under 1% of it."""
    return images * forward_flops(dense.model, num_tokens(dense.model))


def _project(run: Run, student: nn.Module, plan: _Plan) -> tuple[dict[str, Any], list[Basis]]:
    """Start the student by projection; what result.json says of it, and the basis of each inner border."""
    dense, s = dense_start(run), run.recipe.student
    clusters = s.experts == "clusters"
    images = run.sources[0].spread(fit_images(run, dense))
    for_basis = run.sources[0].spread(basis_images(dense.model, len(images)))
    log.info(
        "fitting a student of %d blocks of width %d to the %d of width %d of %s, on %d images",
        len(student.blocks),
        student.embed_dim,
        len(dense.model.blocks),
        dense.model.embed_dim,
        dense.source,
        len(images),
    )
    try:
        dense.model.to(run.dist.device).eval()
        basis = stream_basis(dense.model, calibration.batches(run, for_basis, dense.preprocessing), student.embed_dim)
        projected = project(
            student,
            dense,
            plan.covered,
            basis,
            run.teacher.preprocessing,
            lambda: calibration.batches(run, images, dense.preprocessing),
            with_head=plan.with_head,
            clusters=clusters,
            beat=HEARTBEAT.beat,
        )
    finally:
        dense.model.cpu()
    add_noise(student, s.expert_noise)
    flops = projection_flops(student, dense, plan.covered, len(images), len(for_basis), clusters=clusters)
    _say(basis, projected, student.embed_dim)
    made = {
        "metrics": {f"relative_error/{number}": error for number, error in enumerate(projected.errors)}
        | {"variance_carried": basis.carried},
        "images_seen": len(images),
        "flops": float(flops),
        "covered": [list(layers) for layers in plan.covered],
    }
    return made, _border_bases(plan.depths, basis, projected)


def _border_bases(depths: Sequence[int], basis: StreamBasis, projected: Projected) -> list[Basis]:
    """h ~ left + Q z at the end of every module but the last: the same Q for all, and what P leaves of their mean."""
    found = []
    for last in itertools.accumulate(depths[:-1]):
        mean = projected.means[last - 1]
        left = mean - basis.directions @ (basis.projection @ mean)
        found.append(Basis(left, basis.directions, torch.ones(basis.directions.shape[1])))
    return found


def _say(basis: StreamBasis, projected: Projected, width: int) -> None:
    errors = ", ".join(f"{error:.3f}" for error in projected.errors)
    log.info("relative error of the states behind each block: %s", errors)
    if basis.carried < LITTLE:
        log.warning(
            "the %d channels of the student carry %.1f%% of the variance of the dense model's hidden states: expect a "
            "weak start, or take a larger student.width",
            width,
            100 * basis.carried,
        )
    elif basis.carried < 1:
        log.info("the student's %d channels carry %.2f%% of the variance", width, 100 * basis.carried)


def basis_images(model: nn.Module, images: int) -> int:
    """Images that the basis is measured on, of those that the start is fitted on."""
    return min(max(BASIS_IMAGES, -(-BASIS_TOKENS * model.embed_dim // num_tokens(model))), images)


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
def _mlp_inputs(run: Run, images: ImageSource, layers: list[int]) -> dict[int, Tensor]:
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
        for batch in calibration.batches(run, images, dense.preprocessing):
            dense.model(batch)
            drawn_BT = torch.rand(len(batch), num_tokens(dense.model), generator=generator).argsort(1)
            place_BK1 = drawn_BT[:, :per_image, None].to(device)
            for layer, x_BTD in now.items():
                kept[layer].append(x_BTD.take_along_dim(place_BK1, 1).flatten(0, 1).float().cpu())
    finally:
        dense.model.cpu()
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(parts) for layer, parts in kept.items()}
