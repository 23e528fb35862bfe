"""Batches are the same whatever loads them: workers, ranks, a resume, or a process that drew random numbers before."""

import gc
import multiprocessing
import random

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import Dataset

from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig, DataConfig
from trainer.data.loader import Batch, eval_batches, load_requests, make_mixup, steps_per_epoch, train_batches
from trainer.data.sources import open_source

PRE = Preprocessing(12, (0.5, 0.4, 0.3), (0.5, 0.5, 0.5))
# draws from `random` (crop, erasing), torch (flip, erasing's noise) and numpy (the choice of operations)
AUG = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)


@pytest.fixture(scope="module")
def source():
    return open_source(DataConfig(limit=40), "train")


def batches(source, aug=AUG, **options) -> list[Batch]:
    options = {"seed": 5, "epoch": 2, "micro_batch": 8} | options
    return list(train_batches(source, PRE, aug, **options))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for name in ("images", "labels", "mask", "index"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def random_state() -> tuple:
    _, words, *position = np.random.get_state()
    return random.getstate(), words.tolist(), position, torch.get_rng_state().tolist()


def test_a_batch_holds_what_the_source_has(source):
    plain = AugmentConfig(hflip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    pre = Preprocessing(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    (first, *_) = train_batches(source, pre, plain, seed=0, epoch=0, micro_batch=8)
    assert first.images.shape == (8, 3, 8, 8)
    assert (first.images.dtype, first.labels.dtype, first.index.dtype) == (torch.float32, torch.int64, torch.int64)
    assert first.mask.all()
    for image, label, index in zip(first.images, first.labels, first.index.tolist(), strict=True):
        assert label == source.label(index)
        assert torch.equal((image * 255).round().byte(), torch.tensor(np.array(source.image(index))).permute(2, 0, 1))


def test_workers_change_nothing(source):
    assert_same(batches(source, workers=0, epochs=2), batches(source, workers=2, epochs=2))
    assert_same(
        list(eval_batches(source, PRE, batch=16, workers=0)), list(eval_batches(source, PRE, batch=16, workers=2))
    )


def test_resume_equals_no_interrupt(source):
    # 40 images, G = 8: 5 steps an epoch
    full = batches(source, epoch=0, epochs=3, micro_batch=4, accumulation=2)
    for epoch, step in ((0, 3), (1, 0), (2, 4)):
        resumed = batches(source, epoch=epoch, start_step=step, epochs=3 - epoch, micro_batch=4, accumulation=2)
        assert_same(resumed, full[(epoch * 5 + step) * 2 :])


@pytest.mark.parametrize(("world", "micro_batch", "accumulation"), [(2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)])
def test_world_changes_nothing(source, world, micro_batch, accumulation):
    sizes = {"world": world, "micro_batch": micro_batch, "accumulation": accumulation}
    ranks = [batches(source, rank=rank, **sizes) for rank in range(world)]
    for step, whole in enumerate(batches(source, micro_batch=8)):
        parts = [ranks[r][step * accumulation + a] for a in range(accumulation) for r in range(world)]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)


def test_draws_differ_between_images_and_epochs(source):
    # two copies of an image in one epoch, and an image in two epochs, are augmented differently
    aug = AugmentConfig(repeats=2, scale=(0.3, 0.9))
    first = batches(source, aug)[0]
    assert first.index[0] == first.index[1]
    assert not torch.equal(first.images[0], first.images[1])
    by_index = [
        {int(i): image for batch in batches(source, epoch=e) for i, image in zip(batch.index, batch.images)}
        for e in (0, 1)
    ]
    assert set(by_index[0]) == set(by_index[1]) == set(range(40))
    assert not any(torch.equal(by_index[0][i], by_index[1][i]) for i in range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_neither_used_nor_moved(source, workers):
    reference = batches(source, workers=workers)
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    before = random_state()
    assert_same(batches(source, workers=workers), reference)
    list(eval_batches(source, PRE, batch=16, workers=workers))
    assert random_state() == before


def test_workers_end_with_the_iterator(source):
    iterator = train_batches(source, PRE, AUG, seed=0, epoch=0, epochs=50, micro_batch=8, workers=2)
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    iterator.close()
    gc.collect()
    assert multiprocessing.active_children() == []


class Broken:
    """What a worker hands over whose connection breaks before all of it is there."""

    def __init__(self, error: type[Exception]):
        self.error = error

    def __reduce__(self) -> tuple:
        return self.fetched, (self.error,)

    @staticmethod
    def fetched(error: type[Exception]) -> None:
        raise error(*([104, "Connection reset by peer"] if error is ConnectionResetError else []))


class OneBrokenItem(Dataset):
    def __init__(self, at: str, error: type[Exception]):
        self.at, self.error = at, error

    def __getitem__(self, index: int) -> Broken:
        if self.at == "source":
            raise self.error("the server of the pictures is away")
        return Broken(self.error)


@pytest.mark.parametrize(
    ("error", "told"),
    [(ConnectionResetError, r"\[Errno 104\] Connection reset by peer"), (EOFError, "EOFError")],
)
def test_a_connection_to_a_worker_that_breaks_is_told_as_its_death(source, error, told):
    """It is what torch raises when a worker that is being killed has closed its socket and has not ended yet."""
    with pytest.raises(RuntimeError, match=f"^DataLoader worker broke off: {told}$"):
        list(load_requests(OneBrokenItem("worker", error), [0], source, workers=1))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_connection_of_the_source_that_breaks_stays_what_it_is(source, workers):
    with pytest.raises(ConnectionResetError, match="the server of the pictures is away"):
        list(load_requests(OneBrokenItem("source", ConnectionResetError), [0], source, workers=workers))


def test_too_few_images_for_a_global_batch(source):
    with pytest.raises(
        ValueError, match=r"40 training images are fewer than one global batch of 48 \(world 2 x micro-"
    ):
        train_batches(source, PRE, AUG, seed=0, epoch=0, micro_batch=8, accumulation=3, world=2)
    assert steps_per_epoch(40, micro_batch=8, accumulation=5) == 1
    with pytest.raises(ValueError, match=r"start_step 6 is not in 0\.\.5"):
        train_batches(source, PRE, AUG, seed=0, epoch=0, micro_batch=8, start_step=6)


@pytest.mark.parametrize(("batch", "world"), [(16, 1), (16, 2), (7, 4), (64, 2)])
def test_evaluation_sees_every_image_once_in_equal_shapes(source, batch, world):
    ranks = [list(eval_batches(source, PRE, batch=batch, world=world, rank=rank)) for rank in range(world)]
    assert {len(rows) for rows in ranks} == {-(-40 // (batch * world))}
    seen = []
    for part in (part for rows in ranks for part in rows):
        batch = min(batch, 40)  # no room is taken for images that are not there
        assert part.images.shape == (batch, 3, 12, 12)
        assert part.labels.shape == part.mask.shape == part.index.shape == (batch,)
        seen += part.index[part.mask].tolist()
        assert part.labels[part.mask].tolist() == [source.label(i) for i in part.index[part.mask].tolist()]
        assert not part.images[~part.mask].any()
        assert part.index[~part.mask].eq(-1).all()
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images(tmp_path, workers):
    for number in range(6):
        path = tmp_path / "train" / ("cat", "dog")[number == 5] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    (tmp_path / "train" / "cat" / "4.png").write_text("not an image")
    config = {"source": "folder", "path": str(tmp_path), "val_split": "train"}
    strict = open_source(DataConfig(**config), "train")
    with pytest.raises(ValueError, match=r"cat/4\.png cannot be read"):
        batches(strict, micro_batch=3, workers=workers)

    lenient = open_source(DataConfig(**config, skip_unreadable=True), "train")
    index = torch.cat([batch.index for batch in batches(lenient, micro_batch=3, workers=workers)])
    assert sorted(index.tolist()) == [0, 1, 2, 3, 5, 5]  # replaced in training, by the next
    assert lenient.skipped == {4}

    lenient = open_source(DataConfig(**config, skip_unreadable=True), "val")
    index = torch.cat([batch.index for batch in eval_batches(lenient, PRE, batch=3, workers=workers)])
    assert index.tolist() == [0, 1, 2, 3, -1, 5]  # masked out in evaluation
    assert lenient.skipped == {4}


def test_batch_moves_all_its_tensors():
    batch = Batch(torch.ones(2, 3, 4, 4), torch.ones(2).long(), torch.ones(2).bool(), torch.ones(2).long(), (3,))
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.labels.device.type, moved.mask.device.type, moved.index.device.type} == {
        "meta"
    }
    assert moved.skipped == (3,)


# JPEGs that are decoded smaller, and once for several views


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """16 pictures many times larger than the views of PRE, so that each crop decides how much smaller it is decoded."""
    folder = tmp_path_factory.mktemp("jpegs")
    rng = np.random.default_rng(0)
    for number in range(16):
        path = folder / "train" / ("cat", "dog")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        grey.resize((360, 270), Image.Resampling.BICUBIC).save(path)
    return open_source(DataConfig(source="folder", path=str(folder), val_split="train"), "train")


REPEATED = AugmentConfig(repeats=3, rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)


def test_views_of_one_picture_are_those_of_pictures_read_anew(jpegs):
    """Whatever stands beside it in a micro-batch: ranks, accumulation and workers cut the repeats of an image apart."""
    whole = batches(jpegs, REPEATED, epochs=2)
    assert_same(batches(jpegs, REPEATED, epochs=2, workers=2), whole)
    ranks = [batches(jpegs, REPEATED, epochs=2, micro_batch=1, accumulation=4, world=2, rank=rank) for rank in (0, 1)]
    for step, expected in enumerate(whole):
        parts = [ranks[rank][step * 4 + part] for part in range(4) for rank in range(2)]
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)


def test_a_picture_is_decoded_once_for_each_size_it_is_wanted_in(jpegs, monkeypatch):
    sizes = []

    def counted(content, *arguments, **options):
        sizes.append((content, options["min_factor"]))
        return original(content, *arguments, **options)

    original = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    (batch, *_) = train_batches(jpegs, PRE, REPEATED, seed=5, epoch=2, micro_batch=15)
    assert len(batch.index.unique()) == 5
    assert len(sizes) == len(set(sizes)) < 15
    assert len({shrink for _, shrink in sizes}) > 1


def test_images_and_labels_come_on_the_device(jpegs):
    """On the meta device, which raises where a value is asked for, also while they are mixed."""
    aug = AugmentConfig(random_erasing=1.0, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    mix = make_mixup(aug, num_classes=2)
    for number, batch in enumerate(train_batches(jpegs, PRE, aug, seed=0, epoch=0, micro_batch=4, device="meta")):
        assert (batch.images.device.type, batch.labels.device.type) == ("meta", "meta")
        assert (batch.images.shape, batch.images.dtype) == ((4, 3, 12, 12), torch.float32)
        mixed, targets = mix(batch.images, batch.labels, number)
        assert (mixed.device.type, targets.shape) == ("meta", (4, 2))
    assert number == 3


# mixup


def test_mixup_by_hand():
    mix = make_mixup(AugmentConfig(mixup=0.8, label_smoothing=0.1), num_classes=4)
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 2, 2).clone()
    labels = torch.tensor([0, 1, 2, 3])
    mixed, targets = mix(images.clone(), labels, 3)
    # image i is mixed with image 3 - i: value lam * i + (1 - lam) * (3 - i), so lam = 1 - x_0 / 3
    lam = 1 - float(mixed[0, 0, 0, 0]) / 3
    assert 0 < lam < 1
    torch.testing.assert_close(mixed, lam * images + (1 - lam) * images.flip(0))
    # smoothing 0.1 over 4 classes: 0.925 for the class, 0.025 elsewhere
    smooth = torch.full((4, 4), 0.025) + 0.9 * torch.eye(4)
    torch.testing.assert_close(targets, lam * smooth + (1 - lam) * smooth.flip(0))


def test_mixup_depends_on_its_seed_alone_and_leaves_numpy_alone():
    mix = make_mixup(AugmentConfig(mixup=0.8, cutmix=1.0), num_classes=3)
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    one = mix(images.clone(), labels, 2**40 + 1)
    np.random.seed(1)
    before = random_state()
    again = mix(images.clone(), labels, 2**40 + 1)
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    results = [mix(images.clone(), labels, seed)[0] for seed in range(4)]
    assert len({result.numpy().tobytes() for result in results}) == 4
    assert random_state() == before


def test_mixup_switch_prob_and_off():
    assert make_mixup(AugmentConfig(label_smoothing=0.1), num_classes=3) is None
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    # switch_prob 1 is CutMix only: every pixel comes from one of two images
    cutmix_only = make_mixup(AugmentConfig(mixup=0.8, cutmix=1.0, switch_prob=1.0), 3)
    for seed in range(8):
        mixed, _ = cutmix_only(images.clone(), labels, seed)
        assert ((mixed == images) | (mixed == images.flip(0))).all()
    with pytest.raises(ValueError, match="must be even, got 3"):
        make_mixup(AugmentConfig(mixup=0.8), 3)(images[:3], labels[:3], 0)
