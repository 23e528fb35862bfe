"""Every phase of a chain on the CPU of a login node, without process group or GPU: is there anything that cannot work?

python -m trainer.plan.rehearsal --recipe R --ds_config J --out RUN --ranks 'nodes x local' ... (started by `plan`)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import models  # noqa: F401  first: it mends torchvision beside a CPU torch
from models.teacher.load import load_teacher, save_teacher
from trainer.checkpoint.saver import AVERAGE_BYTES, BYTES_PER_PARAMETER
from trainer.config.ds_config import read_ds_config
from trainer.config.gpus import parse
from trainer.config.load import load_recipe
from trainer.config.recipe import Recipe
from trainer.context import Run
from trainer.data.classes import describe, doubts
from trainer.distributed.ranks import Dist
from trainer.phases import code_of
from trainer.plan import image_size
from trainer.plan.plan_page import page
from trainer.plan.planner import BUSIEST
from trainer.plan.preflight import check_training, said_of_features
from trainer.plan.traffic import Layout
from trainer.plan.work import works
from trainer.request.graph import TABLE, Phase, in_one_job, last_round, learns_from_teacher
from trainer.request.stages import chain, hub_names
from trainer.teaching.estimate import Cost
from trainer.teaching.teachers import before_the_probe, new_teacher_of, trained_preprocessing, with_seedling


def main() -> int:
    """Write {"checks", "problems", "flops"} as JSON to --report; the exit code is 0 also with problems."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("recipe", "ds_config", "out", "report"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--ranks", required=True, help="JSON: stage -> [nodes, ranks per node]")
    parser.add_argument("--gpu", help="plan memory, traffic and time on this one as well")
    options = parser.parse_args()
    ranks = json.loads(options.ranks)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        dry = DryRun(load_recipe(options.recipe), read_ds_config(options.ds_config), Path(options.out), ranks, folder)
        phases = {stage.phase for stage in chain(dry.recipe)}
        report["checks"], report["problems"] = carry_out(_told(dry.checks(phases), Path(f"{options.report}.now")))
        report["flops"] = {name: cost.flops for name, cost in dry.costs.items()}
        if options.gpu:
            report["plan"], wrong = planned(dry, options.gpu)
            report["problems"] += wrong
    Path(options.report).write_text(json.dumps(report))
    return 0


def _told(checks: Iterable[tuple[str, Callable[[], str]]], path: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """The checks, each named in a file before it is carried out: it may take minutes."""
    for name, check in checks:
        path.write_text(name)
        yield name, check


def planned(dry: DryRun, gpu: str) -> tuple[str, list[str]]:
    """What every phase needs and takes on the GPUs of its nodes, and what of it cannot be; for people."""
    layouts = {name: Layout(nodes, local) for name, (nodes, local) in dry.ranks.items()}
    try:
        return page(dry.recipe, works(dry.run), dry.run.ds_values, layouts, parse(gpu), BUSIEST)
    except (ValueError, OSError) as error:  # the teacher or the data, which the checks name too
        return "", [f"plan on {gpu}: {error}"]


def carry_out(checks: Iterable[tuple[str, Callable[[], str]]]) -> tuple[list[str], list[str]]:
    """What was found and what is wrong, as "name: text"; one cause that stops several checks is said once."""
    good, problems = [], {}
    for name, check in checks:
        try:
            good.append(f"{name}: {check()}")
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                error = MemoryError(
                    f"not enough memory on this machine for a model of these sizes ({error}): lower the sizes of the "
                    "recipe, or check them where there is more"
                )
            problems.setdefault(str(error), f"{name}: {error}")
    return good, list(problems.values())


class DryRun:
    """The checks in order; later ones use what earlier ones built.

    Attributes:
        costs: images passed through a result in training and FLOPs, by its name.
        parameters: of the largest model.
        apart: parameters of all experts that are taught alone.
        files: bytes of what is kept beside weights.
    """

    def __init__(self, recipe: Recipe, ds_values: dict, out: Path, ranks: dict[str, list[int]], scratch: str):
        self.recipe, self.out, self.ranks, self.scratch = recipe, out, ranks, scratch
        self.run = Run(recipe, ds_values, out, self._dist("meta"), "dry run")
        self.costs: dict[str, Cost] = {}
        self.parameters = 0
        self.apart = 0
        self.files = 0

    def checks(self, phases: Collection[str]) -> Iterator[tuple[str, Callable[[], str]]]:
        """(name, check) pairs for these phases; a check returns what it found or raises."""
        yield "data", self.data
        yield "hub", self.hub
        train = self.recipe.train
        trained_before = {row.name for row in TABLE if row.section and row.name != "train"}
        starts = (train.start, *train.baselines)
        if trained_before & set(phases) or any(learns_from_teacher(self.recipe, start) for start in starts):
            yield "teacher", self.teacher
        for row in TABLE:
            # the teacher was there first; training is what everything else is for
            rehearsed = row.section and row.name != "teacher" and (row.name in phases or row.name == "train")
            if rehearsed and row.repeated and not in_one_job(self.recipe, row.name):
                for module in range(self.recipe.modules):
                    yield f"{row.name}_{module}", partial(self.rehearse, row, module)
            elif rehearsed:
                yield row.name, partial(self.rehearse, row)
        yield "disk", self.disk

    def data(self) -> str:
        """Columns, labels, one readable image of each split, and a whole batch per epoch."""
        train, val = self.run.sources
        for source in (train, val):
            source.image_or_next(0)
        images = f"{len(train):,} training and {len(val):,} validation images"
        parts = [f"{train.name}, {images}, without labels"]
        if train.labels:
            parts = [f"{train.name}, {images}, {len(train.labels)} classes", describe(train, val)]
        for name, source in (("training", train), ("validation", val)):
            if source.remarks:
                parts.append(f"{name}: {source.remarks}")
        said = [] if self.run.classifies else said_of_features(self.run)
        return "; ".join([*parts, *doubts(train, val), *said])

    def hub(self) -> str:
        """What compute nodes cannot download, and whether there is a token for private repositories and the push."""
        names, repo = hub_names(self.recipe), self.recipe.hub.repo
        token = "HF_TOKEN" in os.environ or (_hf_home() / "token").is_file()
        if repo and not token:
            raise ValueError(f"no token to push to {repo}: log in with `hf auth login`, or set HF_TOKEN")
        downloads = "nothing is needed from the hub"
        if names:
            has = "a" if token else "no"
            downloads = f"{', '.join(names)} by the download job; {has} token for gated or private ones"
        if not repo:
            return downloads
        return f"{downloads}; {repo}, which the download job checks or makes, is pushed to"

    def teacher(self) -> str:
        """The teacher: family, head, preprocessing, modules; one that the chain makes itself with random weights."""
        t = self.recipe.teacher
        if t.grown:
            self.run = with_seedling(self.run)
        elif not t.source:
            save_teacher(new_teacher_of(t, self.run.labels), self.scratch, trained_preprocessing(t))
            self.run = self.run.with_teacher(load_teacher(self.scratch))
            teacher = next(row for row in TABLE if row.name == "teacher")
            self.rehearse(teacher)
        else:
            self.run = before_the_probe(self.run)
        self.parameters = sum(p.numel() for p in self.run.teacher.model.parameters())
        size = self.run.teacher.preprocessing.image_size
        teacher = self.run.teacher
        wrapped = " saved from a wrapped model" if teacher.wrapped else ""
        note = f"; {teacher.classes_note}" if teacher.classes_note else ""
        return (
            f"{self.parameters / 1e6:.1f} M parameters{wrapped}, {size} px, {self.run.tokens} tokens, "
            f"blocks per module {self.run.teacher_depths}{note}; "
            + "; ".join([image_size.cost(self.run), *image_size.doubts(self.run)])
        )

    def rehearse(self, row: Phase, module: int | None = None) -> str:
        """Everything of a phase but its training, on the ranks of its jobs."""
        run = replace(self.run, dist=self._dist(row.name))
        if row.trains(run.recipe):
            check_training(run, row)
        rehearsed = code_of(row.name).rehearse(run, module, self.costs)
        self.costs |= rehearsed.costs
        self.parameters = max(self.parameters, rehearsed.parameters)
        self.apart += rehearsed.apart
        self.files += rehearsed.files
        if rehearsed.problem:
            raise ValueError(rehearsed.problem)
        return rehearsed.text

    def disk(self) -> str:
        """Room for the checkpoints of the largest model and for the results of every stage."""
        if not self.parameters:
            raise ValueError("how much is needed is not known, since no model could be built (see above)")
        r = self.recipe
        second_round = last_round(r) != "distill"
        # modules, whole student, ...
        rounds = 2 + second_round + 2 * r.teacher.grown + (r.teacher.finetune_epochs > 0)
        bytes_per_parameter = BYTES_PER_PARAMETER + (AVERAGE_BYTES if r.train.ema else 0)
        checkpoints = bytes_per_parameter * (r.run.keep + 1)
        needed = self.parameters * (checkpoints * rounds + 4 * (r.modules + 4)) + self.apart * (checkpoints + 4)
        needed += self.files
        folder = next(p for p in (self.out, *self.out.parents) if p.is_dir())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"{needed / 1e9:.1f} GB needed below {folder}, {free / 1e9:.1f} GB free")
        return f"at most {needed / 1e9:.3g} GB needed below {folder}, {free / 1e9:,.0f} GB free"

    def _dist(self, stage: str) -> Dist:
        """Rank 0 of the ranks of a stage."""
        nodes, local = self.ranks[stage]
        return Dist(0, nodes * local, 0, local, torch.device("cpu"))


def _hf_home() -> Path:
    return Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))


if __name__ == "__main__":
    sys.exit(main())
