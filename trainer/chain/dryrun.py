"""Every phase of a chain on the CPU of a login node, without process group or GPU: is there anything that cannot work?

python -m trainer.chain.dryrun --recipe R --ds_config J --out RUN --ranks 'nodes x local' ... (started by `plan`)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import models  # noqa: F401  first: it mends torchvision beside a CPU torch
from models.teacher import load_teacher, new_teacher, save_teacher
from models.vmoe import VMoE
from trainer.chain.stages import chain, hub_names
from trainer.checkpoint import BYTES_PER_PARAMETER
from trainer.config import load_recipe
from trainer.context import Run, training_flops
from trainer.dist import Dist
from trainer.ds_config import read_ds_config
from trainer.loop import epoch_length
from trainer.objectives import Classify, Distill, MatchTeacher
from trainer.preflight import trained_preprocessing
from trainer.schema import Recipe


def main() -> int:
    """Write {"checks", "problems", "flops"} as JSON to --report; the exit code is 0 also with problems."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("recipe", "ds_config", "out", "report"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--ranks", required=True, help="JSON: stage -> [nodes, ranks per node]")
    options = parser.parse_args()
    ranks = json.loads(options.ranks)
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        dry = DryRun(load_recipe(options.recipe), read_ds_config(options.ds_config), Path(options.out), ranks, folder)
        report["checks"], report["problems"] = carry_out(dry.checks())
        report["flops"] = dry.flops
    Path(options.report).write_text(json.dumps(report))
    return 0


def carry_out(checks: Iterable[tuple[str, Callable[[], str]]]) -> tuple[list[str], list[str]]:
    """What was found and what is wrong, as "name: text"; one cause that stops several checks is said once."""
    good, problems = [], {}
    for name, check in checks:
        try:
            good.append(f"{name}: {check()}")
        except (ValueError, OSError, RuntimeError) as error:
            problems.setdefault(str(error), f"{name}: {error}")
    return good, list(problems.values())


class DryRun:
    """The checks in order; later ones use what earlier ones built."""

    def __init__(self, recipe: Recipe, ds_values: dict, out: Path, ranks: dict[str, list[int]], scratch: str):
        self.recipe, self.out, self.ranks, self.scratch = recipe, out, ranks, scratch
        self.ds_values = ds_values
        self.run = self._run("meta")
        self.flops: dict[str, float] = {}  # of a whole stage, per artifact
        self.images: dict[str, float] = {}  # passed through it in training, per artifact
        self.parameters = 0

    def checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """(name, check) pairs; a check returns what it found or raises."""
        yield "data", self.data
        yield "hub", self.hub
        names = {stage.phase for stage in chain(self.recipe)}
        yield "teacher", self.new_teacher if "teacher" in names else self.given_teacher
        yield "meta", self.meta
        for i in range(self.recipe.modules):
            yield f"distill_{i}", lambda i=i: self.distill(i)
        yield "train", self.train
        yield "disk", self.disk

    def data(self) -> str:
        """Columns, labels, one readable image of each split, and a whole batch per epoch."""
        train, val = self.run.sources
        for source in (train, val):
            source.image_or_next(0)
        return f"{train.name}, {len(train):,} training and {len(val):,} validation images, {len(train.labels)} classes"

    def hub(self) -> str:
        """What compute nodes cannot download, and whether there is a token for private repositories and the push."""
        names, repo = hub_names(self.recipe), self.recipe.hub.repo
        token = "HF_TOKEN" in os.environ or (_hf_home() / "token").is_file()
        if repo and not token:
            raise ValueError(f"no token to push to {repo}: log in with `hf auth login`, or set HF_TOKEN")
        found = f"{', '.join(names)} by the download job; {'a' if token else 'no'} token for gated or private ones"
        pushed = f"{repo}, which the download job checks or makes, is pushed to" if repo else ""
        return "; ".join(filter(None, [found if names else "nothing is needed from the hub", pushed]))

    def new_teacher(self) -> str:
        """The teacher the chain trains, with random weights in a temporary folder."""
        t = self.recipe.teacher
        preprocessing = trained_preprocessing(t)
        model = new_teacher(
            image_size=t.image_size, patch_size=t.patch_size, width=t.width, depth=t.depth, heads=t.heads,
            mlp_dim=t.mlp_dim, labels=self.run.labels, preprocessing=preprocessing,
        )  # fmt: skip
        save_teacher(model, self.scratch, preprocessing)
        self.run = self.run.with_teacher(load_teacher(self.scratch))
        self._cost("teacher", "teacher", training_flops(self.run.teacher.model, self.run.tokens))
        return self.given_teacher()

    def given_teacher(self) -> str:
        """The teacher itself: family, head, preprocessing, modules."""
        model, depths = self.run.teacher.model, self.run.teacher_depths
        self.parameters = sum(p.numel() for p in model.parameters())
        size = self.run.teacher.preprocessing.image_size
        return (
            f"{self.parameters / 1e6:.1f} M parameters, {size} px, {self.run.tokens} tokens, blocks per module {depths}"
        )

    def meta(self) -> str:
        """The meta model, its batch on its ranks, and one image through it."""
        meta, stages = self.run.new_meta(), self.run.teacher_stages()
        m = self.recipe.meta
        if m.objective == "labels":
            objective = Classify(meta, self.run.tokens, 0.0)
        else:
            objective = MatchTeacher(meta, self.run.teacher.model, stages, m, self.run.tokens, 0.0)
        with torch.no_grad():
            objective.predict(self._images())
        return self._cost("meta", "meta", objective.flops_per_image)

    def distill(self, i: int) -> str:
        """Student module i beside teacher module i inside the meta model."""
        d, run = self.recipe.distill, self.run
        student, stage = run.student_modules(d.drop_path)[i], run.teacher_stages()[i]
        objective = Distill(student, stage, run.new_meta(), i, d, run.tokens, 0.0)
        with torch.no_grad():
            objective.predict(self._images())
        return self._cost("distill", f"distill_{i}", objective.flops_per_image, self.recipe.student.moe.num_experts)

    def train(self) -> str:
        """The whole student, and the baselines' cost."""
        student, experts = VMoE(self.run.student_config()), self.recipe.student.moe.num_experts
        self.parameters = max(self.parameters, sum(p.numel() for p in student.parameters()))
        objective = Classify(student, self.run.tokens, 0.0)
        with torch.no_grad():
            objective.predict(self._images())
        found = self._cost("train", "train", objective.flops_per_image, experts)
        epoch = self.flops["train"] / self.recipe.train.epochs
        before = sum(v for k, v in self.flops.items() if k == "meta" or k.startswith("distill_"))
        self.flops["train_scratch"] = self.flops["train"]
        self.flops["train_scratch_equal_cost"] = self.flops["train"] + math.ceil(before / epoch) * epoch
        for name in ("train_scratch", "train_scratch_equal_cost"):
            self.images[name] = self.flops[name] / objective.flops_per_image
        return f"student of {sum(p.numel() for p in student.parameters()) / 1e6:.3g} M parameters; {found}"

    def disk(self) -> str:
        """Room for the checkpoints of the largest model and for the results of every stage."""
        r = self.recipe
        running = r.modules if r.modules > 1 else 1
        needed = self.parameters * (BYTES_PER_PARAMETER * (r.run.keep + 1) * 2 + 4 * (running + 4))
        folder = next(p for p in (self.out, *self.out.parents) if p.is_dir())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"{needed / 1e9:.1f} GB needed below {folder}, {free / 1e9:.1f} GB free")
        return f"at most {needed / 1e9:.3g} GB needed below {folder}, {free / 1e9:,.0f} GB free"

    def _cost(self, section: str, artifact: str, flops_per_image: float, experts: int = 0) -> str:
        schedule = getattr(self.recipe, section)
        run = self._run(section)
        settings = run.settings(section, schedule, experts)
        per_epoch = epoch_length(self.run.data, settings)
        steps = schedule.epochs * per_epoch
        self.images[artifact] = float(steps * settings.global_batch)
        self.flops[artifact] = self.images[artifact] * flops_per_image
        return (f"{steps:,} steps of {settings.global_batch} images on {run.dist.world} ranks (micro-batch "
                f"{settings.micro_batch} x {settings.accumulation}, ep {settings.ep_size})")  # fmt: skip

    def _run(self, section: str) -> Run:
        nodes, local = self.ranks[section]
        dist = Dist(0, nodes * local, 0, local, torch.device("cpu"))
        return Run(self.recipe, self.ds_values, self.out, dist, "dry run")

    def _images(self) -> torch.Tensor:
        pre = self.run.teacher.preprocessing
        return torch.zeros(
            max(1, self.recipe.student.moe.images_per_group), pre.in_chans, pre.image_size, pre.image_size
        )


def _hf_home() -> Path:
    return Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))


if __name__ == "__main__":
    sys.exit(main())
