"""Evaluation fewshot: k-way n-shot episodes by nearest class mean, a linear head on frozen features, or fine-tuning.

An episode draws k classes; of each n training images, three validation images per shot (the published setting of
m2mKD, whose code validates on training images) and other images that are told. Validation chooses what there is to
choose, the learning rate and when to stop; its images are never trained on and never counted. E episodes, W ways, S
training images (shots) and V validation images of a class, Q queries of a class, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.labels import first_names
from trainer.config.evaluate import FewShotConfig
from trainer.config.tasks import TaskSpec
from trainer.data.base import ImageSource
from trainer.data.loader import eval_batches
from trainer.distributed.interrupt import HEARTBEAT
from trainer.judge.images import measured_images
from trainer.judge.intervals import of_episodes
from trainer.judge.outputs import Bench, Outputs
from trainer.judge.subjects import Subject, at_size
from trainer.judge.task import Measured

VALIDATION_PER_SHOT = 3
AT_ONCE = 50  # episodes
# of the linear head: AdamW at the published rate, and at larger ones for features that need it
RATES = (0.002, 0.02, 0.2)
HEAD_RATE = 10  # times that of the model, for the new head of a fine-tuning
SHUFFLED = 32  # images of a step of fine-tuning, at most


@dataclass(frozen=True)
class Episodes:
    """Places of images in the split, class by class of each episode: the three have none in common."""

    train_EWS: np.ndarray
    val_EWV: np.ndarray
    query_EWQ: np.ndarray


def prepare(subject: Subject, spec: TaskSpec, bench: Bench) -> Callable[[], Measured]:
    """Whether there are classes and images enough; see task.py."""
    settings: FewShotConfig = spec.settings
    subject = at_size(subject, settings.image_size)
    source = measured_images(spec.data(bench.data), settings.split)
    episodes = draw_episodes(source, settings, bench.seed)

    def measure() -> Measured:
        if settings.head == "finetune":
            accuracies = _finetuned(subject, source, episodes, settings, bench)
        else:
            outputs = bench.features(subject, source)
            features_NF = _normalised(outputs, len(source))
            score = _by_mean if settings.head == "mean" else _by_linear_head
            accuracies = np.concatenate([score(features_NF, part, settings) for part in _in_parts(episodes)])
        name = f"{settings.ways}-way {settings.shots}-shot, {settings.head}"
        what = (
            f"{source.name}: {len(accuracies)} episodes of {settings.ways} of {len(source.labels)} classes, "
            f"{settings.queries} images of each told; interval over episodes"
        )
        return Measured({name: of_episodes(accuracies)}, len(accuracies), what, {"head": settings.head})

    return measure


def draw_episodes(source: ImageSource, settings: FewShotConfig, seed: int) -> Episodes:
    """The episodes: a function of the seed, the settings and the labels alone.

    Raises:
        ValueError: too few classes with images enough.
    """
    shots, queries = settings.shots, settings.queries
    validation = VALIDATION_PER_SHOT * shots
    needed = shots + validation + queries
    places_of = [np.flatnonzero(source.targets == number) for number in range(len(source.labels))]
    large = [number for number, places in enumerate(places_of) if len(places) >= needed]
    if len(large) < settings.ways:
        counts = [len(places) for places in places_of]
        small = [f"{name} {count}" for name, count in zip(source.labels, counts) if count < needed]
        about = f"; too few have {first_names(small)}" if small else ""
        raise ValueError(
            f"{source.name} has {len(large)} classes of {needed} images or more ({shots} to train, {validation} to "
            f"validate, {queries} to tell), and an episode of fewshot takes {settings.ways}: lower ways, shots or "
            f"queries{about}"
        )
    drawn = []
    for episode in range(settings.episodes):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, episode])))
        chosen = rng.choice(large, size=settings.ways, replace=False)
        drawn.append([rng.choice(places_of[number], size=needed, replace=False) for number in chosen])
    places_EWN = np.array(drawn)
    return Episodes(*np.split(places_EWN, [shots, shots + validation], axis=2))


def _in_parts(episodes: Episodes) -> list[Episodes]:
    parts = []
    for first in range(0, len(episodes.train_EWS), AT_ONCE):
        HEARTBEAT.beat()
        here = slice(first, first + AT_ONCE)
        parts.append(Episodes(episodes.train_EWS[here], episodes.val_EWV[here], episodes.query_EWQ[here]))
    return parts


def _normalised(outputs: Outputs, images: int) -> Tensor:
    """Features of unit length (N, F) by place in the split, as SimpleShot has them (Wang et al. 2019, 1911.04623)."""
    if len(outputs.index) != images:
        raise ValueError(
            f"{images - len(outputs.index)} images cannot be read, and an episode may draw them: remove them"
        )
    return F.normalize(torch.from_numpy(outputs.values), dim=1)


def _by_mean(features_NF: Tensor, episodes: Episodes, settings: FewShotConfig) -> np.ndarray:
    """Accuracy (E,) of the nearest mean of a class's training images; nothing is chosen, so nothing is validated."""
    means_EWF = features_NF[torch.from_numpy(episodes.train_EWS)].mean(2)
    query_EQF = features_NF[torch.from_numpy(episodes.query_EWQ)].flatten(1, 2)
    told_EQ = torch.cdist(query_EQF, means_EWF).argmin(2)
    return _share(told_EQ, episodes.query_EWQ)


def _by_linear_head(features_NF: Tensor, episodes: Episodes, settings: FewShotConfig) -> np.ndarray:
    """Accuracy (E,) of a linear head, at the rate and after the epoch that are best on the validation images.

    All episodes are trained at once, each by its own gradients: AdamW works element by element.
    """
    train_EMF, truth_EM = _with_truth(features_NF, episodes.train_EWS)
    val_EMF, val_truth_EM = _with_truth(features_NF, episodes.val_EWV)
    query_EMF, _ = _with_truth(features_NF, episodes.query_EWQ)
    # features of unit variance: the rates then mean the same for every width
    scale = features_NF.shape[1] ** 0.5
    train_EMF, val_EMF, query_EMF = (part * scale for part in (train_EMF, val_EMF, query_EMF))
    best_E = torch.full((len(train_EMF),), -torch.inf)
    told_EQ = torch.zeros(query_EMF.shape[:2], dtype=torch.int64)
    for rate in RATES:
        weight_EFW = torch.zeros(len(train_EMF), train_EMF.shape[2], settings.ways, requires_grad=True)
        bias_E1W = torch.zeros(len(train_EMF), 1, settings.ways, requires_grad=True)
        optimizer = torch.optim.AdamW([weight_EFW, bias_E1W], lr=rate)
        for _ in range(settings.epochs):
            optimizer.zero_grad()
            logits = torch.baddbmm(bias_E1W, train_EMF, weight_EFW)
            # a sum over episodes of each one's mean loss
            loss = F.cross_entropy(logits.flatten(0, 1), truth_EM.flatten(), reduction="sum") / truth_EM.shape[1]
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                val_logits = torch.baddbmm(bias_E1W, val_EMF, weight_EFW)
                score_E = _validation_score(val_logits, val_truth_EM)
                better_E = score_E > best_E
                if better_E.any():
                    best_E = torch.where(better_E, score_E, best_E)
                    now_EQ = torch.baddbmm(bias_E1W, query_EMF, weight_EFW).argmax(2)
                    told_EQ = torch.where(better_E[:, None], now_EQ, told_EQ)
    return _share(told_EQ, episodes.query_EWQ)


def _validation_score(logits_EMW: Tensor, truth_EM: Tensor) -> Tensor:
    """(E,) accuracy, and among equal ones the lower cross-entropy: a share of less than one image of it."""
    accuracy_E = (logits_EMW.argmax(2) == truth_EM).float().mean(1)
    loss_EM = F.cross_entropy(logits_EMW.transpose(1, 2), truth_EM, reduction="none")
    return accuracy_E - loss_EM.mean(1).clamp(0, 100) / (1000 * truth_EM.shape[1])


def _finetuned(
    subject: Subject, source: ImageSource, episodes: Episodes, settings: FewShotConfig, bench: Bench
) -> np.ndarray:
    """Accuracy (E,) of the whole model, trained on each episode from its own weights; the ranks share the episodes.

    The model is run in evaluation mode, without dropout, noise of a router and augmentation; its weights move.
    """
    mine = {}
    for episode in range(bench.dist.rank, settings.episodes, bench.dist.world):
        HEARTBEAT.beat()
        parts = (episodes.train_EWS, episodes.val_EWV, episodes.query_EWQ)
        mine[episode] = _finetune(subject, source, [part[episode] for part in parts], settings, bench, episode)
    accuracies: dict[int, float] = {}
    for of_rank in bench.dist.gather(mine):
        accuracies |= of_rank
    return np.array([accuracies[episode] for episode in range(settings.episodes)])


def _finetune(
    subject: Subject,
    source: ImageSource,
    places: list[np.ndarray],
    settings: FewShotConfig,
    bench: Bench,
    episode: int,
) -> float:
    device = bench.dist.device
    train, val, query = (_read(subject, source, part).to(device) for part in places)
    truth, val_truth, query_truth = (
        torch.arange(settings.ways, device=device).repeat_interleave(part.shape[1]) for part in places
    )
    model = copy.deepcopy(subject.model).to(device).float().eval().requires_grad_(True)
    tuned = replace(subject, model=model)
    with torch.no_grad():
        width = tuned.features(train[:1]).shape[1]
    head = nn.Linear(width, settings.ways, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    rates = [{"params": model.parameters()}, {"params": head.parameters(), "lr": HEAD_RATE * settings.lr}]
    optimizer = torch.optim.AdamW(rates, lr=settings.lr)
    order = torch.Generator().manual_seed(int(np.random.SeedSequence([bench.seed, episode, 1]).generate_state(1)[0]))
    best = -np.inf
    accuracy = 0.0
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(train), generator=order).to(device).split(SHUFFLED):
            loss = F.cross_entropy(head(tuned.features(train[chosen])), truth[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            val_logits = torch.cat([head(tuned.features(part)) for part in val.split(SHUFFLED)])
            score = float(_validation_score(val_logits[None], val_truth[None])[0])
            if score > best:
                best = score
                logits = torch.cat([head(tuned.features(part)) for part in query.split(SHUFFLED)])
                accuracy = float((logits.argmax(1) == query_truth).double().mean())
    return accuracy


def _read(subject: Subject, source: ImageSource, places_WN: np.ndarray) -> Tensor:
    """Images (W x N, C, H, W), class by class.

    Raises:
        ValueError: one cannot be read.
    """
    chosen = source.subset(places_WN.ravel())
    batch = next(eval_batches(chosen, subject.preprocessing, batch=len(chosen)))
    if not batch.mask.all():
        raise ValueError(f"{int((~batch.mask).sum())} images of an episode cannot be read: remove them")
    return batch.images


def _with_truth(features_NF: Tensor, places_EWN: np.ndarray) -> tuple[Tensor, Tensor]:
    """Features (E, W x N, F) and the class of each, (E, W x N)."""
    episodes, ways, images = places_EWN.shape
    truth = torch.arange(ways).repeat_interleave(images).expand(episodes, -1)
    return features_NF[torch.from_numpy(places_EWN)].flatten(1, 2), truth


def _share(told_EQ: Tensor, places_EWQ: np.ndarray) -> np.ndarray:
    _, ways, images = places_EWQ.shape
    truth_Q = torch.arange(ways).repeat_interleave(images)
    return (told_EQ == truth_Q).double().mean(1).numpy()
