"""Batches of the training and the evaluation loop: source + transform + sampler in a torch DataLoader.

What an image looks like after its random transform depends on (seed, epoch, position in the epoch) only: not on worker,
rank, world size, or on what else the process drew. B = batch, C = channels or classes, H, W = height and width.
"""

import math
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from torch.utils.data import DataLoader, Dataset

from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig
from trainer.data.augment import Crop, Erased, TrainTransform, finish, gathered
from trainer.data.base import ImageSource
from trainer.data.decode import Pixels
from trainer.data.sampler import TrainRequest, eval_requests, train_requests
from trainer.data.transforms import eval_transform, train_transform

Change = Callable[[Image.Image, int], Image.Image]  # a picture of the model's size, and its row in the data
MixFunction = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Batch:
    """A micro-batch of training or a batch of an evaluation."""

    images: torch.Tensor  # (B, C, H, W) float32
    labels: torch.Tensor  # (B,) int64; 0 where mask is False
    mask: torch.Tensor  # (B,) bool, False on padding and on skipped images
    index: torch.Tensor  # (B,) int64, position in the source; -1 where mask is False
    skipped: tuple[int, ...] = ()  # indices found unreadable while this batch was made (skip_unreadable)
    padding: int = 0  # rows at the end that stand for no image

    def without_padding(self) -> "Batch":
        """The same without the padding; one row of it stays where there is nothing else, as no model takes none."""
        rows = max(1, len(self.mask) - self.padding)
        return replace(self._each(lambda tensor: tensor[:rows]), padding=rows + self.padding - len(self.mask))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; from pinned memory without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory; torch's DataLoader calls it."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                changed[field.name] = function(value)
        return replace(self, **changed)


def train_batches(
    source: ImageSource,
    pre: Preprocessing,
    aug: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    start_step: int = 0,
    epochs: int = 1,
    micro_batch: int,
    accumulation: int = 1,
    world: int = 1,
    rank: int = 0,
    cycle: int = 0,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """One Batch per micro-step of this rank: from optimiser step `start_step` of `epoch`, through `epochs` epochs.

    Images and labels come on `device`, where the images are normalised and erased: only their bytes are moved there.
    Worker processes live as long as the iterator: pass epochs > 1 to keep them, and their prefetching, across epochs.
    Close the iterator (or drop it) to end them early.

    Raises:
        ValueError: fewer images than one global batch, or start_step beyond the epoch. An unreadable image, while
            iterating (see ImageSource).
    """
    requests = checked_requests(
        len(source),
        seed=seed,
        epoch=epoch,
        start_step=start_step,
        epochs=epochs,
        micro_batch=micro_batch,
        accumulation=accumulation,
        world=world,
        rank=rank,
        repeats=aug.repeats,
        cycle=cycle,
    )
    loaded = load_requests(_TrainImages(source, train_transform(pre, aug)), requests, source, workers)
    return _finished(loaded, pre, device)


def checked_requests(
    n: int, *, start_step: int, micro_batch: int, accumulation: int, world: int, **others: int
) -> Iterator[TrainRequest]:
    """trainer.data.sampler.train_requests of n images, whose arguments these are.

    Raises:
        ValueError: fewer images than one global batch, or start_step beyond the epoch.
    """
    batch = {"micro_batch": micro_batch, "accumulation": accumulation, "world": world}
    steps = steps_per_epoch(n, **batch)
    if not 0 <= start_step <= steps:
        raise ValueError(f"start_step {start_step} is not in 0..{steps}, the steps of an epoch: was the batch changed?")
    return train_requests(n, start_step=start_step, **batch, **others)


def steps_per_epoch(n: int, *, micro_batch: int, accumulation: int = 1, world: int = 1) -> int:
    """Optimiser steps in an epoch of n images. Raises ValueError when there is none."""
    global_batch = world * micro_batch * accumulation
    if n < global_batch:
        raise ValueError(
            f"{n} training images are fewer than one global batch of {global_batch} "
            f"(world {world} x micro-batch {micro_batch} x accumulation {accumulation}). Lower global_batch in the "
            "recipe or the batch sizes of the DeepSpeed JSON, use fewer ranks, or raise data.limit."
        )
    return n // global_batch


def eval_batches(
    source: ImageSource,
    pre: Preprocessing,
    *,
    batch: int,
    world: int = 1,
    rank: int = 0,
    workers: int = 0,
    group: int = 1,
    change: Change | None = None,
) -> Iterator[Batch]:
    """Every image exactly once over all ranks, in as many batches of `batch` on each rank; mask False on padding.

    An unreadable image is masked out when the source skips them, so accuracy is over the readable ones.

    Args:
        batch: images of a batch; no more than there are, as every batch is filled up to it.
        group: images that are routed together; see eval_requests.
        change: what is done to each picture once it has the model's size, before it is normalised.
    """
    batch = min(batch, math.ceil(len(source) / group) * group)
    requests = eval_requests(len(source), batch=batch, world=world, rank=rank, group=group)
    return load_requests(_EvalImages(source, pre, batch, change), requests, source, workers)


def make_mixup(aug: AugmentConfig, num_classes: int) -> MixFunction | None:
    """timm's Mixup/CutMix as a pure function of a seed, or None when both are off.

    Returns:
        (images (B, C, H, W), labels (B,), seed) -> (mixed images, soft targets (B, num_classes)). The images are mixed
        in place; label smoothing is already in the targets.
    """
    if not aug.mixup and not aug.cutmix:
        return None
    timm_mixup = Mixup(
        mixup_alpha=aug.mixup,
        cutmix_alpha=aug.cutmix,
        switch_prob=aug.switch_prob,
        label_smoothing=aug.label_smoothing,
        num_classes=num_classes,
    )

    def mix(images: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        if len(images) % 2:
            raise ValueError(f"mixup pairs images: the micro-batch must be even, got {len(images)}.")
        with _kept_random_state():
            _seed_all(seed % 2**32)
            return timm_mixup(images, labels)

    return mix


@dataclass(frozen=True)
class _Bytes:
    """A micro-batch of training as a worker hands it over: to be normalised and erased where it is used."""

    images: torch.Tensor  # (B, C, H, W) uint8
    erased: Erased
    labels: torch.Tensor  # (B,) int64
    index: torch.Tensor  # (B,) int64
    skipped: tuple[int, ...]

    def pin_memory(self) -> "_Bytes":
        """The same in pinned memory; torch's DataLoader calls it."""
        erased = replace(self.erased, noise_N=self.erased.noise_N.pin_memory())
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory(), erased=erased)


class _TrainImages(Dataset):
    """A whole micro-batch per item, so that the random state is put aside once per batch (86 us), not per image."""

    def __init__(self, source: ImageSource, transform: TrainTransform):
        self.source = source
        self.transform = transform

    def __getitem__(self, request: TrainRequest) -> _Bytes:
        indices, seeds = request
        size = self.transform.pre.image_size
        images_BCHW = torch.empty((len(indices), self.transform.pre.in_chans, size, size), dtype=torch.uint8)
        rectangles = []
        used = []  # the index of each image; not the one asked for where that is unreadable
        skipped_before = set(self.source.skipped)
        reader = _Reader(self.source, self.transform)
        with _kept_random_state():
            for place, (index, seed) in enumerate(zip(indices.tolist(), seeds.tolist(), strict=True)):
                pixels, crop, read = reader.read(index, seed)
                images_BCHW[place] = self.transform.view(pixels, crop)
                rectangles.append(self.transform.rectangle())
                used.append(read)
        return _Bytes(
            images=images_BCHW,
            erased=gathered(rectangles),
            labels=torch.tensor([self.source.label(index) for index in used]),
            index=torch.tensor(used),
            skipped=tuple(self.source.skipped - skipped_before),
        )


class _Reader:
    """Reads the pictures of one micro-batch, one that stands several times in a row (augment.repeats) once per size."""

    def __init__(self, source: ImageSource, transform: TrainTransform):
        self.source = source
        self.transform = transform
        self.asked = -1  # the index that was asked for last
        self.read_as = -1  # the one that was read then
        self.decoded: dict[int, Pixels] = {}  # of it, by what it was asked to be shrunk by

    def read(self, index: int, seed: int) -> tuple[Pixels, Crop, int]:
        """The pixels of an image, the crop that is drawn of it, and the index that was read.

        The random state is left where the transform draws on: it depends on `seed` and the size of the picture.
        """
        crop = None
        shrink = 1

        def draw(width: int, height: int) -> int:
            nonlocal crop, shrink
            _seed_all(seed)
            crop = self.transform.crop(width, height)
            shrink = self.transform.shrink(crop)
            return shrink

        if index == self.asked:
            stored = next(iter(self.decoded.values()))
            draw(stored.width, stored.height)
            if shrink in self.decoded:
                return self.decoded[shrink], crop, self.read_as
        else:
            self.decoded = {}
        pixels, self.read_as = self.source.pixels_or_next(index, draw)
        self.asked = index
        self.decoded[shrink] = pixels
        return pixels, crop, self.read_as


class _EvalImages(Dataset):
    def __init__(self, source: ImageSource, pre: Preprocessing, batch: int, change: Change | None):
        self.source = source
        self.change = change
        self.transform = eval_transform(pre)
        self.shape = (batch, pre.in_chans, pre.image_size, pre.image_size)

    def __getitem__(self, request: np.ndarray) -> Batch:
        images_BCHW = torch.zeros(self.shape)
        labels = torch.zeros(self.shape[0], dtype=torch.int64)
        index = torch.full_like(labels, -1)
        skipped_before = set(self.source.skipped)
        for place, position in enumerate(request.tolist()):
            image = self.source.try_image(position)
            if image is not None:
                images_BCHW[place] = self._prepared(image, position)
                labels[place] = self.source.label(position)
                index[place] = position
        return Batch(
            images=images_BCHW,
            labels=labels,
            mask=index >= 0,
            index=index,
            skipped=tuple(self.source.skipped - skipped_before),
            padding=len(index) - len(request),
        )

    def _prepared(self, image: Image.Image, position: int) -> torch.Tensor:
        if self.change is None:
            return self.transform(image)
        resize_and_crop, *to_tensor = self.transform.transforms
        changed = self.change(resize_and_crop(image), int(self.source.rows[position]))
        for step in to_tensor:
            changed = step(changed)
        return changed


def load_requests(
    dataset: Dataset, requests: Iterable[TrainRequest | np.ndarray], source: Any, workers: int
) -> Iterator:
    """What `dataset` makes of each request.

    Args:
        source: whose `skipped` takes the numbers of images that a worker could not read.

    Raises:
        RuntimeError: "DataLoader worker ...", from torch or as torch does: a process that makes the batches has died.
    """
    loader = DataLoader(
        dataset,
        sampler=requests,
        batch_size=None,  # an item is a batch already
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_outlast_a_warning,
        generator=torch.Generator(),  # torch draws a worker seed per iterator, by default from the global state
    )
    try:
        # the iterator has no name here: an error that is kept would keep its processes with it
        for batch in loader:
            source.skipped.update(batch.skipped)  # a worker's own copy of the source is lost with it
            yield batch
    except (ConnectionError, EOFError) as error:
        # torch looks who died when a batch cannot be fetched, and raises what it met as it is where a process that is
        # being killed has closed its socket already and has not ended yet
        met_by_the_source = not workers or "in DataLoader worker process" in str(error)
        if met_by_the_source:
            raise
        raise RuntimeError(f"DataLoader worker broke off: {str(error) or type(error).__name__}") from error


def _finished(loaded: Iterator[_Bytes], pre: Preprocessing, device: torch.device | str) -> Iterator[Batch]:
    for part in loaded:
        yield Batch(
            images=finish(part.images, part.erased, pre, device),
            labels=part.labels.to(device, non_blocking=True),
            mask=torch.ones(len(part.index), dtype=torch.bool),
            index=part.index,
            skipped=part.skipped,
        )


def _outlast_a_warning(_worker: int) -> None:
    """A SIGTERM to a whole job step warns its ranks: their data workers must live until the checkpoint is saved."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restore the states of `random`, numpy and torch (CPU) on the way out."""
    state_of_random = random.getstate()
    state_of_numpy = np.random.get_state()
    state_of_torch = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state_of_random)
        np.random.set_state(state_of_numpy)
        torch.set_rng_state(state_of_torch)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    # numpy and torch expand an integer alike: the same one would give both the same stream
    np.random.seed(seed ^ 0x9E3779B9)
    torch.default_generator.manual_seed(seed)  # 1 us; torch.manual_seed visits every device, 140 us


def try_transforms(data: "Data") -> None:
    """One real image through the training transforms, mixing and evaluation, as a batch of two; draws are put back.

    Raises:
        ValueError: the image cannot be read, a transform refuses its settings, or what comes out is no number.
    """
    image, index = data.train.image_or_next(0)
    label = int(data.train.label(index))
    train = train_transform(data.preprocessing, data.augment)
    mix = make_mixup(data.augment, data.num_classes)
    with _kept_random_state():
        _seed_all(0)
        images = torch.stack([train(image), train(image)])
        if mix is not None:
            images, _ = mix(images, torch.tensor([label, label]), 0)
    evaluated = eval_transform(data.preprocessing)(image)
    if not (images.isfinite().all() and evaluated.isfinite().all()):
        raise ValueError("the transforms make numbers that are not finite: check section augment and the teacher's std")


@dataclass(frozen=True)
class Data:
    """Images of a run: two sources, what the teacher wants done to them, and the training transforms."""

    train: ImageSource
    val: ImageSource
    preprocessing: Preprocessing
    augment: AugmentConfig
    workers: int
    num_classes: int
    skip_unreadable: bool
    measure_workers: bool = False  # for training: trainer/data/workers.py

    def train_batches(self, **where: Any) -> Iterator[Batch]:
        """See the function of that name; all but source, preprocessing and transforms."""
        return train_batches(self.train, self.preprocessing, self.augment, **where)
