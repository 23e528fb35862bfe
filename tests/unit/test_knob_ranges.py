"""Every number of a recipe has a range; what lies beyond is refused by name, what lies inside can be trained with."""

import copy
import dataclasses
import math
import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.preprocessing import Preprocessing
from trainer.cli import manual
from trainer.config.data import AugmentConfig
from trainer.config.ds_config import read_ds_config, resolve
from trainer.config.knobs import Range
from trainer.config.load import build, load_recipe, parse_override, to_dict
from trainer.config.phases import ScheduleConfig, TrainConfig
from trainer.config.recipe import Recipe
from trainer.context import Run
from trainer.data.loader import make_mixup
from trainer.data.transforms import train_transform
from trainer.distributed.engine import build_cosine, build_optimizer
from trainer.distributed.ranks import Dist
from trainer.plan import preflight

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/fixtures/tiny.yaml"
DS_CONFIG = ROOT / "ds_configs/cpu_debug.json"


def numbers() -> dict[str, tuple[typing.Any, Range | None]]:
    """Dotted key -> (type, range) of every knob that is a number, or a list of numbers."""
    found = {}
    for section, cls in manual.sections().items():
        where = "" if section == manual.TOP else f"{section}."
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            hint = hints[item.name]
            parts = {hint, *typing.get_args(hint)}
            if parts & {int, float}:
                found[where + item.name] = (hint, item.metadata["range"])
    return found


NUMBERS = numbers()


def as_yaml(hint, value) -> str:
    """A value as an override writes it; for a list, its first number."""
    if typing.get_origin(hint) is not tuple:
        return repr(value)
    length = 1 if typing.get_args(hint)[-1] is Ellipsis else 2
    return str([value] * length)


def beyond(hint, limits: Range) -> list[str]:
    """Values just outside of a range and far from it, no numbers, and numbers of the wrong kind."""
    whole = int in {hint, *typing.get_args(hint)}
    low = limits.least if limits.open_least else limits.least - (1 if whole else 0.001)
    high = limits.most if limits.open_most else limits.most + (1 if whole else 0.001 * max(1, limits.most))
    values = [as_yaml(hint, value) for value in (low, high, -1e30, 1e30, 2**63, 10**30, True)]
    values += [as_yaml(hint, value).replace("'", "") for value in (".nan", ".inf", "-.inf", "1e400", "many")]
    return values


TINY_VALUES = to_dict(load_recipe(TINY))


def build_with(key: str, value) -> Recipe:
    """The tiny recipe with one value changed, without reading its file again."""
    values = copy.deepcopy(TINY_VALUES)
    *path, name = key.split(".")
    section = values
    for part in path:
        section = section[part]
    section[name] = value
    return build(Recipe, values)


def test_every_number_has_a_range_and_its_default_lies_inside():
    assert len(NUMBERS) > 100
    assert [key for key, (_, limits) in NUMBERS.items() if limits is None] == []
    for section in manual.sections():
        for key in manual.keys(section):
            if key.name in NUMBERS:
                limits = NUMBERS[key.name][1]
                defaults = key.default if isinstance(key.default, list) else [key.default]
                assert all(value is None or limits.holds(value) for value in defaults), key.name
                assert str(limits) in key.type


@pytest.mark.parametrize("key", NUMBERS)
def test_every_value_beyond_the_range_is_refused_by_name(key):
    hint, limits = NUMBERS[key]
    for text in beyond(hint, limits):
        with pytest.raises(ValueError) as error:
            build_with(key, parse_override(f"{key}={text}")[1])
        message = str(error.value)
        assert message.startswith((f"{key} is ", f"{key}[")), f"{text}: {message}"
        assert ", expected " in message and "\n" not in message and len(message) < 300


def test_a_range_in_words_and_at_its_limits():
    assert str(Range(0, 1)) == "0 to 1"
    assert str(Range(0, 1, open_most=True)) == "0 to below 1"
    assert str(Range(0, 1000, open_least=True)) == "above 0 and at most 1,000"
    assert str(Range(0, 1, open_least=True, open_most=True)) == "above 0 and below 1"
    assert Range(0, 1).holds(0) and Range(0, 1).holds(1.0)
    assert not Range(0, 1, open_most=True).holds(1.0)
    assert not Range(0, 1, open_least=True).holds(0.0)
    assert not Range(0, 1).holds(math.nan)


WRONG_KINDS = {
    "a line break in a path": ("data.path", "a\nb"),
    "NUL in a path": ("data.path", "a\0b"),
    "an escape sequence in a name": ("hub.repo", "a/\x1b[31mb"),
    "a line break behind a source": ("teacher.source", "google/vit\n"),
    "a line separator in a column": ("data.image_key", "image\u2028label"),
    "a tab in a split": ("data.val_split", "val\t"),
    "a number for a switch": ("run.deterministic", 1),
    "text for a switch": ("hub.private", "maybe"),
    "null for a switch": ("teacher.grown", None),
    "a fraction of a block": ("student.depth", 2.5),
    "one beta": ("train.betas", [0.9]),
    "three betas": ("train.betas", [0.9, 0.95, 0.99]),
    "no betas": ("train.betas", []),
    "no scale": ("augment.scale", []),
    "a scale that is a number": ("augment.scale", 0.5),
    "a scale the wrong way round": ("augment.scale", [1, 0.5]),
    "a scale of more than the image": ("augment.scale", [2, 1]),
    "a scale of nothing": ("augment.scale", [0, 0]),
    "a ratio of nothing": ("augment.ratio", [0, 0]),
    "a ratio the wrong way round": ("augment.ratio", [1.3, 0.7]),
    "a section in place of a number": ("train.lr", {"a": 1}),
    "lists in a list": ("teacher.depths", [[2], [2]]),
    "a module without blocks": ("teacher.depths", [4, 0]),
    "warm-up longer than training": ("train.warmup_epochs", 2.5),
    "heads that do not divide the teacher": ("teacher.heads", 3),
    "heads that do not divide the student": ("student.heads", 3),
    "patches that do not divide the image": ("teacher.patch_size", 7),
    "a strength without its number": ("augment.rand_augment", "rand-m-n2"),
    "a spread that is a word": ("augment.rand_augment", "rand-m9-mstdx"),
    "the strength in front": ("augment.rand_augment", "m9-rand"),
    "an unknown set of transforms": ("augment.rand_augment", "rand-m9-txx"),
    "a mix without its number": ("augment.rand_augment", "augmix-m"),
    "more choices than experts": ("student.moe.k", 5),
}


@pytest.mark.parametrize("case", WRONG_KINDS)
def test_values_of_a_wrong_kind_are_refused_by_name(case):
    key, value = WRONG_KINDS[case]
    with pytest.raises(ValueError) as error:
        build_with(key, value)
    message = str(error.value)
    assert message.startswith(key) and ", expected " in message, message
    assert message.isprintable() and len(message) < 300


def settings_of(schedule: ScheduleConfig):
    values = {"train_batch_size": 16, "zero_optimization": {"stage": 1}}
    return resolve(read_ds_config(values), schedule, world=1, local_world=1, num_experts=0, phase="train")


SCHEDULES = {
    "strongest": {"lr": 1000.0, "min_lr": 1000.0, "warmup_lr": 1000.0, "weight_decay": 1000.0},
    "weakest": {"lr": 1e-300, "min_lr": 0.0, "warmup_lr": 0.0, "weight_decay": 0.0, "betas": (0.0, 0.0)},
    "end above the beginning": {"lr": 1e-6, "min_lr": 1e-3},
    "warm-up all the way": {"epochs": 3, "warmup_epochs": 3.0},
    "one epoch": {"epochs": 1},
    "a thousand million epochs": {"epochs": 10**9},
    "betas next to 1": {"betas": (0.9999999, 0.9999999)},
    "smallest eps": {"eps": 1e-30},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0},
    "sgd next to 1": {"optimizer": "sgd", "momentum": 0.999999},
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedules_at_the_limits_give_learning_rates_and_a_step(case):
    schedule = TrainConfig(**SCHEDULES[case])
    settings = settings_of(schedule)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.0}], schedule, settings)
    cosine = build_cosine(optimizer, schedule, settings, steps_per_epoch=5)
    highest = max(schedule.lr * 16 / 512, 0.0)
    for step in (0, 5 * schedule.epochs // 2, 5 * schedule.epochs - 1):
        cosine.step_update(step)
        assert 0 <= optimizer.param_groups[0]["lr"] <= highest * (1 + 1e-6)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert torch.isfinite(weight).all()


AUGMENTS = {
    "everything at once": {"hflip": 1.0, "random_erasing": 1.0, "color_jitter": 10.0, "mixup": 1000.0},
    "smallest crops": {"scale": (1e-9, 1e-9), "ratio": (0.01, 0.01)},
    "widest crops": {"scale": (1e-9, 1.0), "ratio": (0.01, 100.0)},
    "nothing": {"hflip": 0.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)},
    "weakest mixing": {"mixup": 1e-6, "cutmix": 1e-6},
    "strongest mixing": {"mixup": 1000.0, "cutmix": 1000.0, "switch_prob": 1.0, "label_smoothing": 1.0},
    "cutmix alone": {"cutmix": 1.0, "switch_prob": 0.0},
}


@pytest.mark.parametrize("case", AUGMENTS)
def test_transforms_at_the_limits_give_finite_images(case):
    augment = AugmentConfig(**AUGMENTS[case])
    transform = train_transform(Preprocessing(16, (0.5,) * 3, (0.5,) * 3), augment)
    rng = np.random.default_rng(0)
    for width, height in ((40, 30), (1, 1), (1, 300), (300, 1)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        images = torch.stack([transform(image) for _ in range(8)])
        assert images.shape == (8, 3, 16, 16) and images.isfinite().all()
    mix = make_mixup(augment, 10)
    if mix is not None:
        mixed, targets = mix(images, torch.arange(8), 5)
        assert mixed.isfinite().all()
        torch.testing.assert_close(targets.sum(1), torch.ones(8))


def start(out, *overrides, world=1):
    recipe = load_recipe(TINY, overrides)
    dist = Dist(0, world, 0, world, torch.device("cpu"))
    return Run(recipe, read_ds_config(DS_CONFIG), out, dist, "a command")


def test_an_odd_micro_batch_with_mixup_is_found_at_the_start(tmp_path):
    run = start(tmp_path, "train.global_batch=12", "student.moe.images_per_group=1", world=4)
    with pytest.raises(ValueError, match=r"the micro-batch must be even, got 3 in phase train: change train\.global"):
        preflight.check(run, ["teacher", "meta", "distill", "train"])
    preflight.check(run, ["teacher"])  # whose micro-batch is 4
    plain = replace(run, recipe=replace(run.recipe, augment=AugmentConfig()))
    preflight.check(plain, ["teacher", "meta", "distill", "train"])


RAND_AUGMENTS = ["rand-m9-zz1", "rand m9", "rand-m9.5", "augmix-z3", "nonsense", "rand-m9-w7"]


@pytest.mark.parametrize("text", RAND_AUGMENTS)
def test_a_rand_augment_string_timm_does_not_understand_is_found_at_the_start(tmp_path, text):
    run = start(tmp_path, f"augment.rand_augment={text}")
    with pytest.raises(ValueError, match=r"^augment\.rand_augment=.*expected something like rand-m9"):
        preflight.check(run, ["teacher"])


def test_the_start_leaves_the_random_draws_as_they_were(tmp_path):
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    preflight.try_transforms(start(tmp_path).data_for(preflight.STAND_IN))
    assert torch.equal(torch.rand(1), wanted)
