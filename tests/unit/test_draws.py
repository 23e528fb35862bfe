"""What a training step draws: by the phase, the step and the place of the micro-batch, and by nothing else."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from models.moe.layer import MoE, MoEConfig
from models.moe.out import auxiliary_loss
from models.preprocessing import Preprocessing
from models.vmoe.model import VMoE, VMoEConfig
from tests.launch import ROOT
from trainer import context
from trainer.config.data import AugmentConfig, DataConfig
from trainer.config.load import load_recipe
from trainer.config.runtime import RunConfig
from trainer.data.loader import Batch, Data
from trainer.data.sampler import epoch_plan, phase_seed
from trainer.data.sources import DigitsSource
from trainer.distributed.ranks import Dist, seed_draws
from trainer.loop.fit import other_micro_batch
from trainer.loop.step import Task, TrainStep
from trainer.objectives import Classify
from trainer.request.graph import TABLE, artifact_name, phase_of

PHASES = [row.name for row in TABLE]
AUGMENT = AugmentConfig(mixup=0.8, cutmix=1.0, hflip=0.5)


def test_the_seed_of_a_phase_is_frozen():
    # a resumed run depends on these numbers: they may not change with a release of numpy or python, nor per process
    assert phase_seed(0, "teacher") == 14416772540347037127
    assert phase_seed(3, "train") == 12437303847950920013


def test_no_two_phases_or_neighbouring_seeds_share_a_seed():
    seeds = {phase_seed(seed, phase) for seed in (*range(50), 2**31, 2**64, 10**30) for phase in PHASES}
    assert len(seeds) == 53 * len(PHASES)
    plans = [epoch_plan(40, repeats=1, seed=phase_seed(0, phase), epoch=1) for phase in PHASES]
    for (order, draws), (other_order, other_draws) in itertools.combinations(plans, 2):
        assert (order != other_order).any()
        assert not set(draws.tolist()) & set(other_draws.tolist())


@pytest.mark.parametrize("row", TABLE, ids=PHASES)
def test_every_result_of_a_phase_has_its_seed(row):
    """Modules, experts and starts share what they are shown."""
    expert = 3 if row.repeated == "expert" else None
    module = 2 if row.repeated else None
    names = [artifact_name(row.name, module, expert=expert)]
    if row.by_start:
        names += [artifact_name(row.name, start=start) for start in ("scratch", "scratch_equal_cost", "upcycled")]
    assert {phase_of(name) for name in names} == {row.name}


TRAINED = {
    "teacher": "teacher",
    "distill_1": "distill",
    "refine_1": "refine",
    "expert_1_3": "expert",
    "train_scratch_equal_cost": "train",
}


@pytest.mark.parametrize(("folder", "phase"), TRAINED.items(), ids=TRAINED)
def test_a_phase_trains_with_its_seed(folder, phase, monkeypatch, tmp_path):
    tasks = []
    monkeypatch.setattr(context, "epoch_length", lambda *_: 1)
    monkeypatch.setattr(context, "seed_everything", lambda *_: None)
    monkeypatch.setattr(context, "build_engine", lambda *_, **__: tasks)
    monkeypatch.setattr(context, "fit", lambda engine, objective, data, task, *_: engine.append(task) or 1 / 0)
    run = context.Run(load_recipe(ROOT / "tests/fixtures/tiny.yaml", seed=3), {}, tmp_path, rank_of(0, 1), "")
    objective = SimpleNamespace(flops_per_image=1, module=None)
    with pytest.raises(ZeroDivisionError):
        run.train(objective, None, run.recipe.train, None, tmp_path / folder, "")
    assert [task.seed for task in tasks] == [phase_seed(3, phase)]


class StubEngine:
    """What TrainStep asks of an engine; draws in the forward as dropout would."""

    def __init__(self, micro_batch: int, accumulation: int):
        self.settings = SimpleNamespace(micro_batch=micro_batch, accumulation=accumulation)
        self.dtype = torch.float32
        self.deepspeed = SimpleNamespace(was_step_applied=lambda: True)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append((images.clone(), torch.rand(4)))
        return torch.zeros(len(images), 10, requires_grad=True)

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self, number: int) -> None: ...


def training_step(seed: int, augment: AugmentConfig, micro_batch: int, accumulation: int, dist: Dist, workers: int = 0):
    source = DigitsSource(DataConfig(limit=16), "train")
    data = Data(source, source, Preprocessing(8, (0.5,) * 3, (0.5,) * 3), augment, workers, 10, False)
    objective = Classify(torch.nn.Linear(1, 1), tokens=1)
    task = Task("train", "train", 9, seed, RunConfig())
    return TrainStep(StubEngine(micro_batch, accumulation), objective, data, task, dist)


def rank_of(rank: int, world: int) -> Dist:
    return Dist(rank, world, rank, world, torch.device("cpu"))


def micro_batches(
    *,
    seed: int = 5,
    steps: int = 2,
    micro_batch: int = 4,
    world: int = 1,
    rank: int = 0,
    workers: int = 0,
    accumulation: int = 1,
    first: int = 0,
    augment: AugmentConfig = AUGMENT,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The images and the draws of every forward of one rank, from optimiser step `first` on."""
    step = training_step(seed, augment, micro_batch, accumulation, rank_of(rank, world), workers)
    torch.manual_seed(rank)  # as a rank may have drawn anything before
    batches = step.batches(first, per_epoch=16 // (micro_batch * accumulation * world))
    for number, of_step in enumerate(itertools.islice(batches, steps), start=first):
        step.run(number, of_step, total=99, row_due=False)
    return step.engine.seen


def assert_same(one, two):
    assert len(one) == len(two)
    for (images, draws), (other_images, other_draws) in zip(one, two):
        assert torch.equal(images, other_images)
        assert torch.equal(draws, other_draws)


def spread(world: int, accumulation: int, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same in the order of places, from all ranks."""
    ranks = [micro_batches(world=world, rank=rank, accumulation=accumulation, **options) for rank in range(world)]
    return [forward for forwards in zip(*ranks) for forward in forwards]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 2), (4, 1)])
def test_ranks_and_accumulation_divide_the_same_draws(world, accumulation):
    assert_same(spread(world, accumulation), micro_batches(accumulation=4))


def test_micro_batches_of_one_image_keep_their_draws_too():
    plain = AugmentConfig(hflip=0.5)
    assert_same(spread(2, 4, micro_batch=1, augment=plain), micro_batches(micro_batch=1, accumulation=8, augment=plain))


def test_three_ranks_are_shown_what_one_is():
    assert_same(spread(3, 1, steps=1), micro_batches(accumulation=3, steps=1))


def test_data_workers_change_nothing():
    assert_same(micro_batches(workers=2, accumulation=2), micro_batches(accumulation=2))


def test_a_resumed_step_draws_what_it_would_have_drawn():
    assert_same(micro_batches(first=3, steps=3), micro_batches(steps=6)[3:])


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**64, 10**30], ids=["zero", "31 bits", "65 bits", "100 bits"])
def test_every_place_of_every_step_has_draws_of_its_own(seed):
    """Ranks that share their draws, or mixup that goes by the step alone, halve what is gained from a batch."""
    forwards = spread(2, 2, steps=2, seed=seed) + spread(2, 2, steps=2, seed=seed + 1)
    draws = {draw.numpy().tobytes() for _, draw in forwards}
    assert len(draws) == len(forwards) == 16


def test_mixup_goes_by_the_phase_the_step_and_the_place():
    """The same pictures in every micro-batch, so that only the mixing tells them apart."""
    images = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 3, 8, 8)
    labels = torch.tensor([0, 1])
    batch = Batch(images, labels, labels >= 0, labels)
    mixed = set()
    for phase, rank in itertools.product(("meta", "train"), range(2)):
        step = training_step(phase_seed(0, phase), AugmentConfig(mixup=0.8), 2, 2, rank_of(rank, 2))
        for number in range(2):
            step.run(number, [replace(batch, images=images.clone()) for _ in range(2)], total=99, row_due=False)
        mixed |= {float(seen[0, 0, 0, 0]) for seen, _ in step.engine.seen}
    assert len(mixed) == 2 * 2 * 2 * 2  # phases, ranks, steps, micro-batches of a step


ROUTED = {"num_experts": 4, "k": 2, "images_per_group": 2, "capacity_factor": 0.75, "capacity_multiple": 1}
MICRO_BATCH_MATTERS = {
    "groups of two images, nothing drawn": (False, {}, 0.0, 0.0),
    "single images": (False, {"images_per_group": 1}, 0.0, 0.0),
    "the whole micro-batch": (True, {"images_per_group": 0}, 0.0, 0.0),
    "the whole micro-batch, only balanced": (True, {"images_per_group": 0, "capacity_factor": None}, 0.0, 0.0),
    "the whole micro-batch, but neither dropped nor balanced": (
        False,
        {"images_per_group": 0, "capacity_factor": None, "importance_weight": 0.0},
        0.0,
        0.0,
    ),
    "routing noise": (True, {"noise_std": 1.0}, 0.0, 0.0),
    "dropout inside experts": (True, {"dropout": 0.2}, 0.0, 0.0),
    "dropout": (True, {}, 0.2, 0.0),
    "drop path": (True, {}, 0.0, 0.5),
}


@pytest.mark.parametrize(
    ("matters", "moe", "dropout", "drop_path"), MICRO_BATCH_MATTERS.values(), ids=MICRO_BATCH_MATTERS
)
def test_what_depends_on_the_micro_batch_at_an_equal_global_batch(matters, moe, dropout, drop_path):
    """The gradient of 8 images as 2 x 4 and as 4 x 2: the conditions of the promise in docs/checkpoints.md."""
    config = VMoEConfig(
        image_size=8,
        patch_size=4,
        width=16,
        depth=2,
        heads=2,
        mlp_dim=16,
        num_classes=3,
        moe_blocks="all",
        moe=MoEConfig(**(ROUTED | moe)),
        drop_rate=dropout,
        drop_path_rate=drop_path,
    )
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for micro_batch in (4, 2):
        model = VMoE(config).train()
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
        for place, part in enumerate(images.split(micro_batch)):
            seed_draws(0, 0, place)
            out = {}
            loss = model(part, out).logsumexp(-1).mean() + auxiliary_loss(out)
            (loss * micro_batch / 8).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    largest = float(gradients[0].abs().max())
    differ = float((gradients[0] - gradients[1]).abs().max()) > 1e-5 * largest
    assert differ == matters


def resumed(saved: int, here: int, *, global_batch: int = 16, world: int = 1, images_per_group: int = 2) -> list[str]:
    settings = SimpleNamespace(micro_batch=here, accumulation=global_batch // (here * world), global_batch=global_batch)
    module = MoE(2, 2, MoEConfig(**(ROUTED | {"images_per_group": images_per_group})))
    return [finding.message for finding in other_micro_batch({"micro_batch": saved}, settings, module)]


def test_a_resume_with_other_micro_batches_says_what_changes():
    assert resumed(4, 4) == []
    (message,) = resumed(4, 8)
    assert message.startswith("resumed with micro-batches of 8 images, saved with 4: the images of a step are the same")
    assert '"train_micro_batch_size_per_gpu" to 4 and "gradient_accumulation_steps" to 4' in message
    assert "images_per_group" not in message
    (message,) = resumed(4, 8, images_per_group=0)
    assert "with student.moe.images_per_group=0 other images are routed together" in message
    (message,) = resumed(8, 4, global_batch=24, world=6)  # 24 images are 3 micro-batches of 8: not for 6 ranks
    assert message.endswith("use ranks whose number divides 3")
