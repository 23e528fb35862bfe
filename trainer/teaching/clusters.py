"""Which expert of a module learns from which images or tokens: OUT/cluster_<i>, computed once and stored.

The features are the meta model's hidden state at the border in front of the module. Module 0 is fed pixels, whose
directions say little about content; for it the state behind the meta model's own stage 0 is taken, which is what its
experts are to produce. B images, T tokens, D the teacher's width, E experts.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models.experts.kmeans import nearest, spherical_kmeans
from models.flops import forward_flops
from models.modules.meta import MetaModel
from trainer import artifacts
from trainer.context import Run, Trained, save_weights
from trainer.data.base import ImageSource
from trainer.data.loader import Batch, eval_batches
from trainer.disk import move_into_place
from trainer.distributed.interrupt import HEARTBEAT
from trainer.loop.fit import Outcome
from trainer.request import graph
from trainer.teaching.meta import trained_meta

log = logging.getLogger(__name__)
FILE = "clusters.safetensors"
POINTS = 100_000  # tokens clustered at most; where there are more, as many of each image
ITERATIONS = 25  # of k-means, at most


@dataclass(frozen=True)
class Clusters:
    """The fixed rule of a module: nearest centroid (cosine) of a border state less the mean state."""

    mean_D: Tensor
    centroid_ED: Tensor  # rows of length 1
    train: np.ndarray | None  # cluster of every training image, -1 = it cannot be read; None = tokens are assigned
    val: np.ndarray | None
    shares: list[float]  # of the images (or tokens) in each cluster

    def of_tokens(self, state_BTD: Tensor) -> Tensor:
        """Cluster of every token (B, T), whatever its image's cluster is."""
        return assign(state_BTD.flatten(0, -2), self.mean_D, self.centroid_ED).view(state_BTD.shape[:-1])


def assign(state_ND: Tensor, mean_D: Tensor, centroid_ED: Tensor) -> Tensor:
    """Cluster of every state (N,)."""
    return nearest(F.normalize(state_ND.float() - mean_D, dim=1), centroid_ED)[0]


def border_state(meta: MetaModel, h: Tensor, module: int) -> Tensor:
    """The state (B, T, D) that is clustered, from what the module is fed (images for module 0)."""
    return meta.stages[0](h) if module == 0 else h


def goes_by_image(run: Run, module: int) -> bool:
    """Whether whole images are assigned. Always in the last module: it has no border of tokens to be taught at."""
    return run.recipe.expert.assign == "image" or module == run.recipe.modules - 1


def untrained(run: Run, module: int) -> Clusters:
    """A rule of the right form before anything is clustered, for a rehearsal."""
    no_images = np.zeros(0, int) if goes_by_image(run, module) else None
    width, experts = run.teacher.model.embed_dim, run.recipe.student.moe.num_experts
    return Clusters(torch.zeros(width), torch.zeros(experts, width), no_images, no_images, [])


def ensure(run: Run, module: int, needed_by: str) -> Clusters:
    """The clusters of a module, made first where they are missing (collective).

    Jobs that start at once may all make them: each does so in a folder of its own, and the first to move it into place
    wins. The others take that one.

    Raises:
        ValueError: made with another recipe, damaged, or of other data; or what `make` raises.
    """
    name = graph.artifact_name("cluster", module)
    if not run.dist.gather((run.out / name).is_dir())[0]:
        make(run, module)
    with run.dist.together():
        if not (run.out / name / "result.json").is_file():
            raise ValueError(
                f"{run.out / name} has no result.json, though it was put there as a whole: delete it and run the same "
                "command again"
            )
        folder, result = artifacts.require(run.out, name, run.recipe, needed_by)
        with artifacts.reading(folder):
            return _load(run, folder, result["metrics"])


def make(run: Run, module: int) -> None:
    """Cluster the border states of `expert.cluster_images` training images, assign all images, write OUT/cluster_<i>.

    Raises:
        ValueError: the states do not make as many clusters as there are experts, or no meta model is there.
    """
    started = time.perf_counter()
    recipe = run.recipe
    name = graph.artifact_name("cluster", module)
    meta, meta_result = trained_meta(run, f"--phase cluster --module {module}")
    meta.to(run.dist.device).eval().requires_grad_(False)
    states = _States(run, meta, module)
    centers, sampled = _centers(run, states, module)
    mean_D, centroid_ED = centers
    tensors = {"mean": mean_D, "centroids": centroid_ED}
    if states.by_image:
        tensors["train"] = _assigned(states, run.data.train, centers)
        tensors["val"] = _assigned(states, run.data.val, centers)
        sampled = tensors["train"][tensors["train"] >= 0]
    count_E = torch.bincount(sampled.long(), minlength=recipe.student.moe.num_experts)
    shares = (count_E / len(sampled)).tolist()
    images, flops = cost(run, meta, module)
    outcome = Outcome({}, time.perf_counter() - started, steps=0, images_seen=images)
    aside = Path()
    with run.dist.together():
        if run.dist.main:
            run.out.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=run.out))
            about = {"phase": "cluster", "module": module, "command": run.command, "ds_config": run.ds_values}
            artifacts.open_folder(aside, name, recipe, about)
            save_weights(aside / name / FILE, {key: value.contiguous() for key, value in tensors.items()})
    run.finish(
        aside / name,
        "cluster",
        module,
        Trained(outcome, {}, epochs=0, flops_per_image=0),
        states.settings,
        metrics={f"share/{e}": share for e, share in enumerate(shares)},
        extra_flops=flops,
        made_with={"teacher": run.teacher_record, "meta": meta_result["files"]["model.safetensors"]},
    )
    with run.dist.together():
        if run.dist.main:
            _put_in_place(aside, run.out, name)
            _report(shares, "images" if states.by_image else "tokens", module)


def cost(run: Run, meta: MetaModel, module: int) -> tuple[int, float]:
    """Images passed through the meta model, and FLOPs, of clustering for a module, before it is done."""
    states = _States(run, meta, module)
    images = len(states.sample)
    if states.by_image:  # then all are assigned
        images += len(run.data.train)
    return images, states.cost(images)


class _States:
    """Border states of images without augmentation, shared out over the ranks."""

    def __init__(self, run: Run, meta: MetaModel, module: int) -> None:
        self.run, self.meta, self.module = run, meta, module
        self.by_image = goes_by_image(run, module)
        self.sample = run.data.train.spread(run.recipe.expert.cluster_images)
        self.settings = run.settings("expert")
        self.per_image = 1  # points that are clustered
        if not self.by_image:
            self.per_image = max(1, min(run.tokens, POINTS // len(self.sample)))
        self.points = self.per_image * len(self.sample)
        self.flops = sum(forward_flops(stage, run.tokens) for stage in meta.stages[: max(module, 1)])

    def cost(self, images: int) -> float:
        """FLOPs of clustering with this many images passed through the meta model."""
        products = 2 * self.run.recipe.student.moe.num_experts * self.run.teacher.model.embed_dim  # of one state
        return images * self.flops + (ITERATIONS * self.points + images) * products

    @torch.no_grad()
    def of(self, source: ImageSource) -> Iterator[tuple[Batch, Tensor]]:
        """This rank's batches of a source with their states (B, T, D), or their images' means (B, 1, D)."""
        run = self.run
        batches = eval_batches(
            source,
            run.data.preprocessing,
            batch=run.eval_batch(self.settings),
            world=run.dist.world,
            rank=run.dist.rank,
            workers=run.data.workers,
        )
        for batch in batches:
            HEARTBEAT.beat()
            h = self.meta.front(batch.images.to(run.dist.device), self.module)
            state_BTD = border_state(self.meta, h, self.module)
            if self.by_image:
                state_BTD = state_BTD.mean(1, keepdim=True)
            yield batch, state_BTD.float()


def _centers(run: Run, states: _States, module: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(mean, centroids) on the CPU, and the cluster of every point they were made from."""
    points_NPD = None
    seen_N = torch.zeros(len(states.sample), device=run.dist.device)
    for batch, state_BTD in states.of(states.sample):
        if points_NPD is None:
            points_NPD = state_BTD.new_zeros(len(states.sample), states.per_image, state_BTD.shape[-1])
        for place in batch.mask.nonzero().flatten().tolist():
            index = int(batch.index[place])
            draws = torch.Generator().manual_seed(run.recipe.seed * 1_000_003 + index)  # not where the rank stands
            chosen = torch.randperm(state_BTD.shape[1], generator=draws)[: states.per_image]
            points_NPD[index] = state_BTD[place, chosen.to(state_BTD.device)]
            seen_N[index] = 1
    points_ND = run.dist.sum(points_NPD)[run.dist.sum(seen_N) > 0].flatten(0, 1).cpu()
    clustered = None
    with run.dist.together():
        if run.dist.main:
            # spherical k-means of the states less their mean
            mean_D = points_ND.mean(0)
            try:
                centroid_ED, cluster_N = spherical_kmeans(
                    points_ND - mean_D, run.recipe.student.moe.num_experts, seed=run.recipe.seed, iterations=ITERATIONS
                )
            except ValueError as error:
                raise ValueError(
                    f"module {module} cannot be shared out among {run.recipe.student.moe.num_experts} experts by "
                    f"{len(states.sample)} images (expert.cluster_images, student.moe.num_experts): {error}"
                ) from None
            clustered = (mean_D, centroid_ED), cluster_N
    return run.dist.gather(clustered)[0]  # rank 0's: another kind of machine may round otherwise


def _assigned(states: _States, source: ImageSource, centers: tuple[Tensor, Tensor]) -> Tensor:
    """Cluster of every image of a source (int16 where that holds them), -1 where it cannot be read."""
    dist = states.run.dist
    mean_D, centroid_ED = (tensor.to(dist.device) for tensor in centers)
    found_N = torch.zeros(len(source), dtype=torch.int64, device=dist.device)
    for batch, state_B1D in states.of(source):
        real = batch.mask.to(dist.device)
        found_N[batch.index.to(dist.device)[real]] = assign(state_B1D[:, 0][real], mean_D, centroid_ED) + 1
    kind = torch.int16 if len(centroid_ED) < 2**15 else torch.int32
    return (dist.sum(found_N) - 1).to("cpu", kind)


def _put_in_place(aside: Path, out: Path, name: str) -> None:
    """Move the whole folder at once, unless another job was first."""
    try:
        if not move_into_place(aside / name, out / name, "result.json"):
            log.info("%s was made by another job meanwhile", out / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _load(run: Run, folder: Path, metrics: dict[str, float]) -> Clusters:
    try:
        tensors = load_file(folder / FILE)
        mean_D = tensors["mean"].to(run.dist.device)
        centroid_ED = tensors["centroids"].to(run.dist.device)
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{folder / FILE} cannot be read: {error}") from None
    splits = {}
    for split, source in (("train", run.data.train), ("val", run.data.val)):
        cluster_N = tensors.get(split)
        if cluster_N is not None and len(cluster_N) != len(source):
            raise ValueError(
                f"{folder / FILE} assigns {len(cluster_N)} {split} images, but the data has {len(source)} now"
            )
        splits[split] = None if cluster_N is None else cluster_N.numpy()
    shares = [metrics[f"share/{expert}"] for expert in range(len(centroid_ED))]
    return Clusters(mean_D, centroid_ED, **splits, shares=shares)


def _report(shares: list[float], what: str, module: int) -> None:
    shown = ", ".join(f"{e}: {100 * share:.1f}%" for e, share in enumerate(shares))
    log.info("module %d, share of the %s per expert: %s", module, what, shown)
    empty = [e for e, share in enumerate(shares) if not share]
    if empty:
        log.warning(
            "module %d: no %s belong to expert%s %s. Each starts as a copy of the expert with the nearest cluster; "
            "fewer experts (student.moe.num_experts) or more expert.cluster_images may be better",
            module,
            what,
            "s" if len(empty) > 1 else "",
            ", ".join(map(str, empty)),
        )
