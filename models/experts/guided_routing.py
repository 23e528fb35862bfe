"""Teacher-guided routing: the frozen dense teacher says which expert each token should go to, from the first step on.

After "Teacher-Guided Routing for Sparse Vision Mixture-of-Experts" (arXiv 2604.21330): a router made from the teacher's
intermediate features supervises the student's router by KL, so that every expert's score gets a gradient, not only the
chosen ones'. Here that router is made of clusters: E centroids of the teacher's features per MoE block, from spherical
k-means (only the paper's abstract was read; its own construction may differ).

    sources = matching_blocks(student, student_depths, teacher_depths)
    routers = teacher_routers(teacher, student, images, sources, E, seed)
    guide = Guide(routers, teacher, student, weight)
    with guide.watching():
        teacher(images)
    student(images)
    loss = loss + guide.loss()

B images, T tokens of an image, D width of the teacher, E experts, L guided blocks, N tokens that are clustered.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flops import forward_flops
from ..moe.layer import Routed, routed_layers
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
        self, sources: Mapping[int, int], means: Sequence[Tensor], centroids: Sequence[Tensor],
        temperatures: Sequence[float],
    ) -> None:  # fmt: skip
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
        return {
            block: (_directions(features[source], mean_D) @ centroid_ED.T / temperature).softmax(-1)
            for (block, source), mean_D, centroid_ED, temperature in routers
            if source in features
        }

    def flops_per_image(self, tokens: int) -> int:
        """What the targets of one image cost beside the teacher's own forward."""
        return 2 * tokens * self.centroid_LED.numel()


def matching_blocks(
    student: nn.Module, student_depths: Sequence[int], teacher_depths: Sequence[int]
) -> dict[int, int]:  # fmt: skip
    """For each MoE block of the student, the teacher's block that ends at the same share of the same module.

    Args:
        student: a student module or the whole student; its block numbers are those of the whole.
        student_depths, teacher_depths: blocks per module.

    Raises:
        ValueError: no MoE block, or one beyond the depths.
    """
    blocks = sorted(block for block, _ in _routers(student))
    if not blocks:
        raise ValueError("there is no router to guide: the student has no MoE block here. Set routing_weight to 0.")
    teachers, first = {}, 0
    for depth, (start, taught) in zip(student_depths, _spans(teacher_depths)):
        for place in range(depth):
            teachers[first + place] = start + math.ceil((place + 1) * taught / depth) - 1
        first += depth
    if blocks[-1] not in teachers:
        raise ValueError(f"block {blocks[-1]} of the student lies beyond its depths {list(student_depths)}.")
    return {block: teachers[block] for block in blocks}


@torch.no_grad()
def teacher_routers(
    teacher: nn.Module, student: nn.Module, images: Iterable[Tensor], sources: Mapping[int, int], num_experts: int,
    seed: int, entry: int | None = None,
) -> TeacherRouters:  # fmt: skip
    """Cluster what the teacher's blocks put out, and number the clusters like the student's experts.

    A student that routes already (distilled, upcycled) keeps its order: each cluster gets the number of the expert that
    the student's router gives its tokens to. The same on every rank, and again after a resume.

    Args:
        teacher: whole (or a chain of its stages), in evaluation mode.
        student: plain, as it is before training; run only when all its experts are there (not on the meta device).
        images: batches (B, C, H, W) as the teacher takes them, the same on every rank; 1000 images are plenty.
        sources: from matching_blocks.
        num_experts: E.
        entry: the teacher's block whose output the student takes; None: the student takes the images.

    Raises:
        ValueError: the teacher lacks a block, or too few tokens for E clusters.
    """
    wanted = {*sources.values(), *(() if entry is None else (entry,))}
    features: dict[int, list[Tensor]] = {block: [] for block in wanted}
    choices: dict[int, list[Tensor]] = {block: [] for block in sources}
    generator, runs = torch.Generator().manual_seed(seed), not any(p.is_meta for p in student.parameters())
    mode = student.training
    student.eval()
    for batch in images:
        seen: dict[int, Tensor] = {}
        with _watched(teacher, wanted, seen.__setitem__):
            teacher(batch)
        chosen_BN = torch.rand(next(iter(seen.values())).shape[:2], generator=generator).argsort(1)
        chosen_BN = chosen_BN[:, :TOKENS_PER_IMAGE].to(batch.device)  # the same tokens of every block
        for block in wanted:
            features[block].append(_rows(seen[block], chosen_BN))
        if runs:
            logits = _logits(student, batch if entry is None else seen[entry])
            for block in sources:
                choices[block].append(_rows(logits[block], chosen_BN).softmax(-1))
    student.train(mode)
    found = []
    for block, source in sources.items():
        mean_D, centroid_ED, temperature = _cluster(torch.cat(features[source]), num_experts, seed + block)
        if runs:
            share_NE = (_directions(torch.cat(features[source]), mean_D) @ centroid_ED.T / temperature).softmax(-1)
            centroid_ED = centroid_ED[_numbers(share_NE.T @ torch.cat(choices[block]))]
        found.append((mean_D, centroid_ED, temperature))
    return TeacherRouters(sources, *zip(*found)).to(found[0][0].device)


def teacher_routers_flops(
    teacher: nn.Module, student: nn.Module, routers: TeacherRouters, images: int, tokens: int
) -> int:  # fmt: skip
    """FLOPs of teacher_routers, at most: k-means may end before its last iteration."""
    points = images * min(tokens, TOKENS_PER_IMAGE)
    passes = ITERATIONS + 3  # the seeds, the last assignment, the numbers
    forwards = forward_flops(teacher, tokens) + forward_flops(student, tokens)
    return images * forwards + passes * routers.flops_per_image(points)


def guided_routing_loss(module: nn.Module, targets: Mapping[int, Tensor]) -> Tensor:
    """Mean over guided blocks and tokens of KL(target || softmax(router's clean logits)) of the last forward.

    Args:
        module: student, plain or expert parallel, whose routers kept their logits (Routed.keep_logits).
        targets: (B, T, E) by student block.

    Raises:
        ValueError: teacher and student differ in tokens or experts.
    """
    terms = []
    for block, layer in _routers(module):
        if block not in targets:
            continue
        target_BTE, logits_BTE = targets[block], layer.logits_BTE
        assert logits_BTE is not None, "the student has not run since its targets were made"
        if target_BTE.shape != logits_BTE.shape:
            raise ValueError(
                f"block {block}: the teacher's targets are {tuple(target_BTE.shape)} (images, tokens, experts) and the "
                f"student's router has {tuple(logits_BTE.shape)}: both need the same tokens and experts."
            )
        kl = F.kl_div(logits_BTE.log_softmax(-1), target_BTE, reduction="sum")
        terms.append(kl / logits_BTE[..., 0].numel())
    return torch.stack(terms).mean()


class Guide:
    """Guides a student's routers by a teacher that runs beside it, micro-batch by micro-batch.

    Args:
        routers: from teacher_routers; moved to where the teacher's features are, and kept in float32.
        teacher: what is run in watching(): the whole teacher, a chain of its stages, or the stage of this module.
        student: what is trained; may be made expert parallel later.
        weight: of the loss.
    """

    def __init__(self, routers: TeacherRouters, teacher: nn.Module, student: nn.Module, weight: float) -> None:
        self.routers, self.teacher, self.student, self.weight = routers, teacher, student, weight
        self.targets: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the teacher's forward: takes its features, and lets the student's next forward keep its logits."""

        @torch.no_grad()
        def look(source: int, feature_BTD: Tensor) -> None:
            self.targets |= self.routers.to(feature_BTD.device)({source: feature_BTD})

        self.targets = {}
        with _watched(self.teacher, self.routers.sources.values(), look):
            yield
        _keep_logits(self.student, True)

    def loss(self) -> Tensor:
        """The weighted loss, after the student's forward; what was kept for it is let go."""
        loss = self.weight * guided_routing_loss(self.student, self.targets)
        self.targets = {}
        _keep_logits(self.student, False)
        return loss


@contextmanager
def _watched(teacher: nn.Module, blocks: Iterable[int], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Show `see` the output of these blocks of the teacher whenever one runs under the block."""
    named = {int(found[-1]): part for name, part in teacher.named_modules()
             if (found := BLOCK.findall(name)) and name.endswith(f"blocks.{found[-1]}")}  # fmt: skip
    if missing := sorted(set(blocks) - set(named)):
        raise ValueError(f"the teacher has blocks {sorted(named)}, not {missing}: its modules do not fit the student's")
    with ExitStack() as hooks:
        for block in set(blocks):
            hook = named[block].register_forward_hook(lambda _part, _given, out, block=block: see(block, out))
            hooks.callback(hook.remove)
        yield


def _routers(module: nn.Module) -> list[tuple[int, Routed]]:
    """(number of the block, what routes in it), in network order."""
    return [(int(BLOCK.findall(name)[-1]), layer) for name, layer in routed_layers(module).items()]


def _keep_logits(module: nn.Module, keep: bool) -> None:
    for _, layer in _routers(module):
        layer.keep_logits, layer.logits_BTE = keep, None


def _logits(student: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """Logits (B, T, E) of every router in one forward, by block."""
    _keep_logits(student, True)
    student(x.to(next(student.parameters()).dtype))
    found = {block: layer.logits_BTE for block, layer in _routers(student)}
    _keep_logits(student, False)
    return found


def _rows(x_BTD: Tensor, chosen_BN: Tensor) -> Tensor:
    """The chosen tokens of every image, one after another, (B x N, D) in float32."""
    return x_BTD.gather(1, chosen_BN.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1])).flatten(0, 1).float()


def _numbers(together_EE: Tensor) -> list[int]:
    """For every expert its cluster: the pairs (row = cluster, column = expert) that meet most, one after another."""
    left_EE, cluster_of = together_EE.double().cpu().clone(), {}
    for _ in range(len(left_EE)):
        cluster, expert = divmod(int(left_EE.argmax()), len(left_EE))
        cluster_of[expert] = cluster
        left_EE[cluster], left_EE[:, expert] = -1.0, -1.0
    return [cluster_of[expert] for expert in sorted(cluster_of)]


def _spans(depths: Sequence[int]) -> list[tuple[int, int]]:
    """(first block, blocks) of each module."""
    return list(zip(itertools.accumulate(depths, initial=0), depths))


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
    low, high = 1e-3, 10.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        share_NE = (cosine_NE / middle).softmax(-1)
        entropy = torch.special.entr(share_NE).sum(-1).mean() / max(math.log(cosine_NE.shape[1]), 1e-9)
        low, high = (middle, high) if entropy < SURENESS else (low, middle)
    return math.sqrt(low * high)
