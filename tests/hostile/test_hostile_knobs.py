"""Every knob at the limits of its range and beyond, through the dry run of --phase all: one clear line, nothing begun.

Beyond a limit the recipe is refused before torch is imported (tests/unit/test_knob_ranges.py has every such value);
here a share of them goes the way a user goes, and what lies inside is rehearsed with all phases.
"""

import contextlib
import io
import os
import resource

import pytest

from tests.hostile.driver import MEMORY, STEPS
from tests.launch import TINY
from tests.unit.test_knob_ranges import NUMBERS, as_yaml, beyond

# the long form has all of them
QUICK_KEYS = ("train.betas", "meta.min_lr", "augment.scale", "student.moe.capacity_factor")


def dry_run(arguments: list[str]) -> int:
    """Every override in turn through the dry run of --phase all; what is no clear answer is printed, and counted."""
    from trainer.run import main

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # models at the limits of their sizes are built here
    out, *overrides = arguments
    unclear = 0
    for override in overrides:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main([*TINY, "--phase", "all", "--out", out, "--dry-run", override])
        lines = said.getvalue().splitlines()
        problems = [line for line in lines if line.startswith("error: ") or line.startswith("  PROBLEM")]
        clear = not problems if code == 0 else any(step in line.lower() for line in problems for step in STEPS)
        refused = code == 2 and any(override.partition("=")[0] in line for line in problems)
        if code not in (0, 2) or not clear or "Traceback" in said.getvalue() or os.path.exists(out):
            unclear += 1
            print(f"UNCLEAR {override}: exit code {code}: {problems or lines[-3:]}")
        else:
            print(f"{'refused' if refused else 'answered'} {override}: {code}")
    return unclear


def at_the_limits(key: str) -> list[str]:
    """The limits themselves where they are inside, else the nearest number that is."""
    hint, limits = NUMBERS[key]
    low = limits.least + 1e-6 if limits.open_least else limits.least
    high = limits.most - 1e-6 if limits.open_most else limits.most
    return [as_yaml(hint, low), as_yaml(hint, high)]


@pytest.mark.parametrize(
    "key", [key if key in QUICK_KEYS else pytest.param(key, marks=pytest.mark.slow) for key in NUMBERS]
)
def test_a_knob_at_its_limits_and_beyond(hostile, tmp_path, key):
    outside = beyond(*NUMBERS[key])
    overrides = [f"{key}={value}" for value in (*at_the_limits(key), *outside)]
    line = [str(tmp_path / "out"), *overrides]
    finished = hostile.warm.call("tests.hostile.test_hostile_knobs:dry_run", line, timeout=240)
    assert finished.code == 0, finished.output
    for value in outside:
        assert f"refused {key}={value}: 2" in finished.output, finished.output


BEGUN = {
    "odd micro-batch with mixup": (["teacher.global_batch=9"], ["mixup pairs images", "teacher.global_batch"]),
    "odd micro-batch with cutmix": (
        ["meta.global_batch=5", "augment.mixup=0", "augment.cutmix=1"],
        ["mixup pairs images", "meta.global_batch"],
    ),
    "unknown part of RandAugment": (["augment.rand_augment=rand-m9-zz1"], ["augment.rand_augment", "rand-m9-zz1"]),
    "beta of 1": (["train.betas=[0.9,1.0]"], ["train.betas[1]", "0 to below 1"]),
    "beta above 1": (["meta.betas=[1.5,0.9]"], ["meta.betas[0]", "1.5"]),
    "negative end of the cosine": (["train.min_lr=-0.1"], ["train.min_lr", "-0.1"]),
    "eps of 0": (["distill.eps=0"], ["distill.eps", "0"]),
    "momentum of 1": (["train.momentum=1"], ["train.momentum", "1.0"]),
    "negative warm-up rate": (["train.warmup_lr=-1"], ["train.warmup_lr", "-1.0"]),
    "negative weight of a loss": (["student.moe.importance_weight=-1"], ["student.moe.importance_weight", "-1.0"]),
    "negative seed": (["seed=-1"], ["seed", "-1"]),
    "seed of 64 bits": (["seed=18446744073709551616"], ["seed", "0 to 2,147,483,647"]),
    "crop the wrong way round": (["augment.scale=[1.0,0.5]"], ["augment.scale", "smaller number first"]),
    "ratio of 0": (["augment.ratio=[0,0]"], ["augment.ratio[0]", "0.01 to 100"]),
    "rate of 1e30": (["train.lr=1e30"], ["train.lr", "1e+30"]),
    "line break in a path": (['data.path="a\\nb"'], ["data.path", "one line"]),
}


@pytest.mark.parametrize("name", BEGUN)
def test_what_stopped_a_run_late_is_refused_at_its_start(hostile, tmp_path, name):
    arguments, expected = BEGUN[name]
    hostile.refuse(f"values: {name}", tmp_path, ["--phase", "all", *arguments], *expected)
    assert not (tmp_path / "out" / "teacher").exists()
