"""Experts taught one by one as dense modules (distill.level=expert), and the module put together from them.

B images, T tokens, N = B * T, D the student's width, E experts.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from models.experts.branches import (
    SCALES_S,
    ByCluster,
    Watch,
    decided_scale,
    merged_state,
    router_rows,
    stand_ins,
    top_gates,
)
from models.flops import forward_flops
from models.modules.meta import MetaModel
from models.modules.stitch import StudentModule
from models.moe.layer import MoE
from models.moe.out import routings
from models.moe.parallel import load_full_state_dict
from trainer import artifacts
from trainer.context import Run
from trainer.data.loader import eval_batches
from trainer.distributed.interrupt import HEARTBEAT
from trainer.loop.fit import Data
from trainer.request import graph
from trainer.teaching import clusters
from trainer.teaching.clusters import Clusters
from trainer.teaching.meta import trained_meta
from trainer.teaching.students import student_modules
from trainer.tracking.measures import measure_of

log = logging.getLogger(__name__)


def check(run: Run) -> None:
    """Find out before anything trains whether experts can be taught one by one.

    Raises:
        ValueError: no border to cluster at, nothing a token's cluster would change, or a module without experts.
    """
    recipe = run.recipe
    if recipe.modules < 2:
        raise ValueError(
            "distill.level=expert assigns images by the state at a module border, but modules is 1, which has none: "
            "use two modules or more, or distill.level=module"
        )
    if recipe.expert.assign == "token" and recipe.distill.border == "none" and run.classifies:
        raise ValueError(
            "expert.assign=token teaches an expert at the border, on the tokens of its cluster, but distill.border is "
            "none, so all experts would be the same: set distill.border=mse or cosine, or expert.assign=image"
        )
    with torch.device("meta"):
        modules = student_modules(_plain(run))
    for i, module in enumerate(modules):
        if not any(isinstance(part, MoE) for part in module.modules()):
            raise ValueError(
                f"distill.level=expert: student module {i} (blocks {module.stage.start}..{module.stage.stop - 1}) has "
                f"no experts with student.moe_blocks={recipe.student.moe_blocks}: give every module an MoE block, or "
                "use distill.level=module"
            )


def dense_modules(run: Run, drop_path: float = 0.0) -> list[StudentModule]:
    """The student's modules with a dense MLP in place of every MoE; the same start in every job."""
    return student_modules(_plain(run, moe_blocks="none"), drop_path)


def _plain(run: Run, **changes: str) -> Run:
    """The same run with changes to its student, whose experts start alike: what is in them comes from elsewhere."""
    return run.with_student(experts="copy", expert_noise=0.0, **changes)


def share_of(run: Run, rule: Clusters, module: int, expert: int, global_batch: int) -> Data | None:
    """What an expert learns from and is measured on; None when no training image belongs to it.

    Fewer images than a global batch are repeated (with augmentations of their own) until they fill one. Without a
    validation image of its own the expert is measured on all of them.
    """
    if rule.train is None:
        return run.data
    train = np.flatnonzero(rule.train == expert)
    val = np.flatnonzero(rule.val == expert)
    if not len(train):
        return None
    about = f"expert {expert} of module {module}"
    if len(train) < global_batch:
        if run.dist.main:
            text = "%s has %d training images, fewer than one batch of %d: they are repeated to fill it"
            log.warning(text, about, len(train), global_batch)
        train = np.resize(train, global_batch)
    data = dataclasses.replace(run.data, train=run.data.train.subset(train))
    if len(val):
        return dataclasses.replace(data, val=run.data.val.subset(val))
    if run.dist.main:
        log.warning("%s has no validation image of its own: it is measured on all of them", about)
    return data


def belongs_to(rule: Clusters, meta: MetaModel, module: int, expert: int) -> Callable[[Tensor], Tensor]:
    """Which tokens are an expert's own, (B, T) bool, from what its module is fed: images or (B, T, D)."""

    def is_own(h: Tensor) -> Tensor:
        return rule.of_tokens(clusters.border_state(meta, h, module)) == expert

    return is_own


def assembly_flops(run: Run, meta: MetaModel, student: StudentModule, module: int) -> int:
    """FLOPs of an Assembly: inputs of the routers, their gates, agreement before and after tuning, each one pass."""
    front = sum(forward_flops(stage, run.tokens) for stage in meta.stages[:module])
    images = min(run.recipe.expert.cluster_images, len(run.sources[0]))
    return 4 * images * (front + forward_flops(student, run.tokens))


class Assembly:
    """Module `module` from its experts: everything in it trained apart, routers started from the clusters (collective).

    Attributes:
        student: the module, on the CPU.
        flops: spent on the way, and on measuring it after tuning; training of the experts is in their own results.

    Raises:
        ValueError: an expert that is missing, damaged or of another recipe, or none of them trained.
    """

    def __init__(self, run: Run, module: int) -> None:
        self.run, self.module = run, module
        needed_by = f"--phase distill --module {module}"
        experts = run.recipe.student.moe.num_experts
        self.clusters = clusters.ensure(run, module, needed_by)
        meta, _ = trained_meta(run, needed_by)
        self.meta = meta.to(run.dist.device).eval().requires_grad_(False)
        dense = self._dense(needed_by, experts)
        self.student = student_modules(_plain(run), run.recipe.distill.drop_path)[module]
        source = stand_ins(self.clusters.centroid_ED, [state is not None for state in dense])
        load_full_state_dict(self.student, merged_state(self.student.state_dict(), dense, source))
        self.flops = assembly_flops(run, self.meta, self.student, module)
        self._start_routers(experts)
        self.before = self._agreement(self.student)

    def metrics(self, state: dict[str, Tensor]) -> dict[str, float]:
        """What the result reports of the experts once the module is tuned (collective).

        Args:
            state: plain names -> weights of the tuned module.

        Returns:
            share of the images or tokens and accuracy (or relative error) of each expert alone, and how often a token's
            first choice is the expert of its cluster, over all MoE blocks, before and after tuning.
        """
        tuned = student_modules(_plain(self.run))[self.module]
        load_full_state_dict(tuned, state)
        metrics = {f"share/{e}": share for e, share in enumerate(self.clusters.shares)}
        return metrics | self.measured | {"agreement_before": self.before, "agreement_after": self._agreement(tuned)}

    def _dense(self, needed_by: str, experts: int) -> list[dict[str, Tensor] | None]:
        """The weights of every dense module, None where a cluster had no images."""
        run = self.run
        states: list[dict[str, Tensor] | None] = []
        expected = dense_modules(run)[self.module].state_dict()
        self.measured: dict[str, float] = {}  # of each expert alone
        with run.dist.together():
            for e in range(experts):
                name = graph.artifact_name("expert", self.module, expert=e)
                folder, result = artifacts.require(run.out, name, run.recipe, needed_by)
                trained = result["metrics"]["images"] > 0
                states.append(artifacts.load_weights(folder, expected) if trained else None)
                if trained:
                    measure = measure_of(result["metrics"]).key
                    self.measured[f"expert_{measure}/{e}"] = result["metrics"][measure]
        return states

    def _start_routers(self, experts: int) -> None:
        """Router rows from the inputs of each cluster's own tokens, in every MoE block, at a scale that decides."""
        dist = self.run.dist
        student = self.student.to(dist.device)
        layers = {name: part for name, part in student.named_modules() if isinstance(part, MoE)}
        zeros = {"dtype": torch.float64, "device": dist.device}
        sums = {name: torch.zeros(experts, layer.dim, **zeros) for name, layer in layers.items()}
        counts = {name: torch.zeros(experts, **zeros) for name in layers}
        gates = {name: torch.zeros(len(SCALES_S), **zeros) for name in layers}
        rows: dict[str, Tensor] = {}

        def add_up(name: str, x_ND: Tensor, cluster_N: Tensor) -> None:
            sums[name].index_add_(0, cluster_N, x_ND.double())
            counts[name].index_add_(0, cluster_N, torch.ones_like(cluster_N, dtype=torch.float64))

        def measure(name: str, x_ND: Tensor, _cluster_N: Tensor) -> None:
            gates[name] += top_gates(x_ND, rows[name])

        self._watch(student, add_up)
        for name in layers:
            sum_ED, count_E = dist.sum(sums[name]), dist.sum(counts[name])
            source = stand_ins(self.clusters.centroid_ED, (count_E > 0).tolist())
            rows[name] = router_rows(sum_ED, count_E, source).float()
        self._watch(student, measure)
        for name, layer in layers.items():
            scale = decided_scale((dist.sum(gates[name]) / counts[name].sum()).cpu(), experts)
            with torch.no_grad():
                layer.router.weight.copy_(scale * rows[name])
        student.cpu()

    def _watch(self, student: StudentModule, watch: Watch) -> None:
        """Run the module on the cluster images, every token through its own cluster's expert."""
        by_cluster = ByCluster(student)
        for h, cluster_BT in self._batches():
            by_cluster(h, cluster_BT, watch)

    @torch.no_grad()
    def _agreement(self, module: StudentModule) -> float:
        """Share of tokens whose first choice is the expert of their cluster, over the module's MoE blocks."""
        module.to(self.run.dist.device).eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.run.dist.device)
        for h, cluster_BT in self._batches():
            out = {}
            module(h, out)
            for routing in routings(out).values():
                same = routing.expert_GSK[..., 0].flatten() == cluster_BT.flatten()
                totals += torch.tensor([int(same.sum()), same.numel()], device=totals.device)
        module.cpu()
        agreeing, tokens = self.run.dist.sum(totals).tolist()
        return agreeing / tokens

    @torch.no_grad()
    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the cluster images: what the module is fed, and the cluster of every token (B, T)."""
        run = self.run
        device, data = run.dist.device, run.data
        count = min(run.recipe.expert.cluster_images, len(data.train))
        chosen = np.arange(count) * len(data.train) // count
        batch_size = run.eval_batch(run.settings("expert"))
        batches = eval_batches(
            data.train.subset(chosen),
            data.preprocessing,
            batch=batch_size,
            world=run.dist.world,
            rank=run.dist.rank,
            workers=data.workers,
        )
        for batch in batches:
            HEARTBEAT.beat()
            if not batch.mask.any():
                continue
            h = self.meta.front(batch.images[batch.mask].to(device), self.module)
            if self.clusters.train is None:
                yield h, self.clusters.of_tokens(clusters.border_state(self.meta, h, self.module))
            else:
                image_B = chosen[batch.index[batch.mask].numpy()]
                cluster_B = torch.from_numpy(self.clusters.train[image_B]).to(device)
                yield h, cluster_B.long().unsqueeze(1).expand(-1, run.tokens)
