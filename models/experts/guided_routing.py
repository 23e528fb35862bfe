"""Teacher-guided routing: the frozen dense teacher says which expert each token should go to, from the first step on.

After "Teacher-Guided Routing for Sparse Vision Mixture-of-Experts" (arXiv 2604.21330): a router made from the teacher's
intermediate features supervises the student's router by KL, so that every expert's score gets a gradient, not only the
chosen ones'. Here that router is made of clusters: E centroids of the teacher's features per MoE block, from spherical
k-means (only the paper's abstract was read; its own construction may differ).

    sources = matching_blocks(student, student_depths, teacher_depths)
    routers = teacher_routers(teacher, student, images, sources, E, seed)
    guide = Guide(routers, teacher, weight)
    teacher(images, beside, guide.sources)  # beside, out = {}, {}
    student(images, out)
    loss = loss + guide.loss(out, guide.targets(beside))

B images, T tokens of an image, D width of the teacher, E experts, L guided blocks, N tokens that are clustered.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flops import forward_flops
from ..moe.layer import routed_layers
from ..moe.out import Out, by_layer
from .kmeans import spherical_kmeans

BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)(?=\.|$)")  # numbers are those of the whole model, in a stage too
TOKENS_PER_IMAGE = 16  # drawn for the clusters: neighbours in an image say much the same
ITERATIONS = 25
SURENESS = 0.5  # mean entropy of the targets, relative to log E: a token has about sqrt(E) experts to choose from


class TeacherRouters(nn.Module):
    """A frozen router per MoE block of the student: softmax(cosine(teacher's feature - mean, centroid) / temperature).

    Args:
        sources: for each guided block of the student, the block of the teacher whose output is looked at.
        means, centroids, temperatures: of the guided blocks in that order: (D,), (E, D) with rows of length 1, number.
    """

    def __init__(
        self,
        sources: Mapping[int, int],
        means: Sequence[Tensor],
        centroids: Sequence[Tensor],
        temperatures: Sequence[float],
    ) -> None:
        super().__init__()
        self.sources = dict(sources)
        self.register_buffer("mean_LD", torch.stack(list(means)))
        self.register_buffer("centroid_LED", torch.stack(list(centroids)))
        self.register_buffer("temperature_L", torch.tensor(temperatures))

    def forward(self, features: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Wanted share of each expert, (B, T, E) in float32 by student block.

        Args:
            features: (B, T, D) by teacher block; guided blocks whose teacher block is not there are left out.
        """
        routers = zip(self.sources.items(), self.mean_LD, self.centroid_LED, self.temperature_L)
        shares = {}
        for (block, source), mean_D, centroid_ED, temperature in routers:
            if source in features:
                shares[block] = _shares(features[source], mean_D, centroid_ED, temperature)
        return shares

    def flops_per_image(self, tokens: int) -> int:
        """What the targets of one image cost beside the teacher's own forward."""
        return 2 * tokens * self.centroid_LED.numel()


def matching_blocks(student: nn.Module, student_depths: Sequence[int], teacher_depths: Sequence[int]) -> dict[int, int]:
    """For each MoE block of the student, the teacher's block that ends at the same share of the same module.

    Args:
        student: a student module or the whole student; its block numbers are those of the whole.
        student_depths, teacher_depths: blocks per module.

    Raises:
        ValueError: no MoE block, or one beyond the depths.
    """
    blocks = sorted(_block_of(layer) for layer in routed_layers(student))
    if not blocks:
        raise ValueError("there is no router to guide: the student has no MoE block here. Set routing_weight to 0.")
    teachers = {}
    first_of_student = 0
    first_of_teacher = 0
    for student_depth, teacher_depth in zip(student_depths, teacher_depths):
        for place in range(student_depth):
            # the share of the module that ends with this block, rounded up to whole blocks of the teacher
            blocks_done = math.ceil((place + 1) * teacher_depth / student_depth)
            teachers[first_of_student + place] = first_of_teacher + blocks_done - 1
        first_of_student += student_depth
        first_of_teacher += teacher_depth
    if blocks[-1] not in teachers:
        raise ValueError(f"block {blocks[-1]} of the student lies beyond its depths {list(student_depths)}.")
    return {block: teachers[block] for block in blocks}


@torch.no_grad()
def teacher_routers(
    teacher: nn.Module,
    student: nn.Module,
    images: Iterable[Tensor],
    sources: Mapping[int, int],
    num_experts: int,
    seed: int,
    entry: int | None = None,
) -> TeacherRouters:
    """Cluster what the teacher's blocks put out, and number the clusters like the student's experts.

    A student that routes already (distilled, upcycled) keeps its order: each cluster gets the number of the expert that
    the student's router gives its tokens to. The same on every rank, and again after a resume.

    Args:
        teacher: the whole as one stage (models.modules.split), in evaluation mode.
        student: plain, as it is before training; run only when all its experts are there (not on the meta device).
        images: batches (B, C, H, W) as the teacher takes them, the same on every rank; 1000 images are plenty.
        sources: from matching_blocks.
        num_experts: E.
        entry: the teacher's block whose output the student takes; None: the student takes the images.

    Raises:
        ValueError: the teacher lacks a block, or too few tokens for E clusters.
    """
    looked_at = set(sources.values())
    if entry is not None:
        looked_at.add(entry)
    _check_blocks(teacher, looked_at)
    student_runs = not any(parameter.is_meta for parameter in student.parameters())
    student_dtype = next(student.parameters()).dtype
    training = student.training
    student.eval()
    features: dict[int, list[Tensor]] = {block: [] for block in looked_at}
    gates: dict[int, list[Tensor]] = {block: [] for block in sources}
    generator = torch.Generator().manual_seed(seed)
    for batch in images:
        beside: Out = {}
        teacher(batch, beside, looked_at)
        states = _states(beside)
        # the same tokens of every block
        drawn_BT = torch.rand(next(iter(states.values())).shape[:2], generator=generator).argsort(1)
        drawn_BN = drawn_BT[:, :TOKENS_PER_IMAGE].to(batch.device)
        for block in looked_at:
            features[block].append(_rows(states[block], drawn_BN))
        if student_runs:
            fed = batch if entry is None else states[entry]
            out: Out = {}
            student(fed.to(student_dtype), out)
            for block, logits_BTE in _router_logits(out).items():
                if block in sources:
                    gates[block].append(_rows(logits_BTE, drawn_BN).softmax(-1))
    student.train(training)
    means: list[Tensor] = []
    centroids: list[Tensor] = []
    temperatures: list[float] = []
    for block, source in sources.items():
        x_ND = torch.cat(features[source])
        mean_D, centroid_ED, temperature = _cluster(x_ND, num_experts, seed + block)
        if student_runs:
            # row = cluster, column = expert: sum over tokens of share x gate
            share_NE = _shares(x_ND, mean_D, centroid_ED, temperature)
            centroid_ED = centroid_ED[_numbers(share_NE.T @ torch.cat(gates[block]))]
        means.append(mean_D)
        centroids.append(centroid_ED)
        temperatures.append(temperature)
    return TeacherRouters(sources, means, centroids, temperatures).to(means[0].device)


def teacher_routers_flops(
    teacher: nn.Module, student: nn.Module, routers: TeacherRouters, images: int, tokens: int
) -> int:
    """FLOPs of teacher_routers, at most: k-means may end before its last iteration."""
    points = images * min(tokens, TOKENS_PER_IMAGE)
    passes = ITERATIONS + 3  # the seeds, the last assignment, the numbers
    forwards = forward_flops(teacher, tokens) + forward_flops(student, tokens)
    return images * forwards + passes * routers.flops_per_image(points)


def guided_routing_loss(out: Mapping[str, Any], targets: Mapping[int, Tensor]) -> Tensor:
    """Mean over guided blocks and tokens of KL(target || softmax(router's clean logits)).

    Args:
        out: what the student's forward left; plain or expert parallel.
        targets: (B, T, E) by student block.

    Raises:
        ValueError: teacher and student differ in tokens or experts.
    """
    terms = []
    for block, logits_BTE in _router_logits(out).items():
        if block not in targets:
            continue
        target_BTE = targets[block]
        if target_BTE.shape != logits_BTE.shape:
            raise ValueError(
                f"block {block}: the teacher's targets are {tuple(target_BTE.shape)} (images, tokens, experts) and the "
                f"student's router has {tuple(logits_BTE.shape)}: both need the same tokens and experts."
            )
        # sum over tokens and experts of target (log target - log gate), over the number of tokens
        kl = F.kl_div(logits_BTE.log_softmax(-1), target_BTE, reduction="sum")
        terms.append(kl / logits_BTE[..., 0].numel())
    assert terms, "no guided block of the student has run"
    return torch.stack(terms).mean()


class Guide:
    """Guides a student's routers by a teacher that runs beside it, micro-batch by micro-batch.

    Args:
        routers: from teacher_routers; moved to where the teacher's features are, and kept in float32.
        teacher: what runs beside the student: the whole teacher, a chain of its stages, or the stage of this module.
        weight: of the loss.

    Raises:
        ValueError: the teacher lacks a block that is looked at.
    """

    def __init__(self, routers: TeacherRouters, teacher: nn.Module, weight: float) -> None:
        self.routers = routers
        self.weight = weight
        self.sources = frozenset(routers.sources.values())
        _check_blocks(teacher, self.sources)

    @torch.no_grad()
    def targets(self, beside: Mapping[str, Any]) -> dict[int, Tensor]:
        """Wanted share of each expert, (B, T, E) by student block, from the states the teacher's forward left."""
        states = _states(beside)
        assert states.keys() >= self.sources, "the teacher was not asked for guide.sources"
        device = next(iter(states.values())).device
        return self.routers.to(device)(states)

    def loss(self, out: Mapping[str, Any], targets: Mapping[int, Tensor]) -> Tensor:
        """The weighted loss; `out` is what the student's forward left."""
        return self.weight * guided_routing_loss(out, targets)


def _check_blocks(teacher: nn.Module, looked_at: Collection[int]) -> None:
    blocks = set()
    for name, _ in teacher.named_modules():
        numbers = BLOCK.findall(name)
        if numbers and name.endswith(f"blocks.{numbers[-1]}"):
            blocks.add(int(numbers[-1]))
    missing = sorted(set(looked_at) - blocks)
    if missing:
        raise ValueError(
            f"the teacher has blocks {sorted(blocks)}, not {missing}: its modules do not fit the student's"
        )


def _states(beside: Mapping[str, Any]) -> dict[int, Tensor]:
    """The outputs of blocks (B, T, D) that the teacher was asked for."""
    return {int(number): told["state"] for number, told in beside["blocks"].items() if "state" in told}


def _block_of(layer: str) -> int:
    """stage.blocks.3.mlp -> 3."""
    return int(BLOCK.findall(layer)[-1])


def _router_logits(out: Mapping[str, Any]) -> dict[int, Tensor]:
    """Clean logits (B, T, E) of the routers that ran, by block, in network order."""
    return {_block_of(layer): logits_BTE for layer, logits_BTE in by_layer(out, "logits").items()}


def _rows(x_BTD: Tensor, drawn_BN: Tensor) -> Tensor:
    """The drawn tokens of every image, one after another, (B x N, D) in float32."""
    index_BND = drawn_BN.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1])
    return x_BTD.gather(1, index_BND).flatten(0, 1).float()


def _shares(x: Tensor, mean_D: Tensor, centroid_ED: Tensor, temperature: float | Tensor) -> Tensor:
    """softmax(cosine(x - mean, centroid) / temperature), (..., D) -> (..., E)."""
    return (_directions(x, mean_D) @ centroid_ED.T / temperature).softmax(-1)


def _numbers(together_EE: Tensor) -> list[int]:
    """For every expert its cluster: the pairs (row = cluster, column = expert) that meet most, one after another."""
    left_EE = together_EE.double().cpu().clone()
    cluster_of = {}
    for _ in range(len(left_EE)):
        cluster, expert = divmod(int(left_EE.argmax()), len(left_EE))
        cluster_of[expert] = cluster
        # both are taken: below every count
        left_EE[cluster] = -1.0
        left_EE[:, expert] = -1.0
    return [cluster_of[expert] for expert in sorted(cluster_of)]


def _directions(x: Tensor, mean_D: Tensor) -> Tensor:
    # a transformer's features share a large constant part: without it their directions tell tokens apart
    return F.normalize(x.float() - mean_D, dim=-1)


def _cluster(x_ND: Tensor, num_experts: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """(mean, centroids, temperature) of one block's tokens."""
    mean_D = x_ND.mean(0)
    directions_ND = _directions(x_ND, mean_D)
    centroid_ED, _ = spherical_kmeans(directions_ND, num_experts, seed=seed, iterations=ITERATIONS)
    return mean_D, centroid_ED, _temperature(directions_ND @ centroid_ED.T)


def _temperature(cosine_NE: Tensor) -> float:
    """At which the mean entropy of the shares is SURENESS x log E; found by halving on a log scale."""
    log_E = max(math.log(cosine_NE.shape[1]), 1e-9)
    low = 1e-3
    high = 10.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        share_NE = (cosine_NE / middle).softmax(-1)
        # mean over tokens of -sum p log p, relative to its largest value
        entropy = torch.special.entr(share_NE).sum(-1).mean() / log_E
        if entropy < SURENESS:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
