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
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

import models  # noqa: F401  first: it mends torchvision beside a CPU torch
from models.flops import num_tokens
from models.modules.meta import MetaModel
from models.preprocessing import Preprocessing
from models.teacher.load import load_teacher, save_teacher
from trainer.checkpoint.saver import AVERAGE_BYTES, BYTES_PER_PARAMETER
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.config.recipe import Recipe
from trainer.context import Run, training_flops
from trainer.distributed.ranks import Dist
from trainer.loop.fit import epoch_length
from trainer.objectives import Borders, Classify, Distill, Incubate, LearnFromTeacher, Together, meta_objective
from trainer.request.graph import in_one_job, preparation, taught_by_expert, trained_again
from trainer.request.stages import chain, hub_names, with_teacher
from trainer.teaching import clusters, experts, reuse
from trainer.teaching.families import family_of
from trainer.teaching.meta import new_meta
from trainer.teaching.students import new_student, student_modules
from trainer.teaching.teachers import new_teacher_of, trained_preprocessing, with_seedling

PREPARING = {"teacher", "meta", "incubate", "assemble", "cluster", "expert", "distill", "refine"}


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
        phases = {stage.phase for stage in chain(dry.recipe)}
        report["checks"], report["problems"] = carry_out(dry.checks(phases))
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
        self.parameters, self.apart = 0, 0  # of the largest model, and of all experts that are taught alone

    def checks(self, phases: Collection[str]) -> Iterator[tuple[str, Callable[[], str]]]:
        """(name, check) pairs for these phases; a check returns what it found or raises."""
        yield "data", self.data
        yield "hub", self.hub
        t, modules = self.recipe.train, range(self.recipe.modules)
        if set(phases) & PREPARING or any(with_teacher(self.recipe, start) for start in (t.start, *t.baselines)):
            yield "teacher", self.given_teacher if self.recipe.teacher.source else self.new_teacher
        if "meta" in phases:
            yield "meta", self.meta
        if "incubate" in phases:
            for i in modules:
                yield f"incubate_{i}", lambda i=i: self.incubate(i)
            yield "assemble", self.assemble
        for i in modules if "expert" in phases else ():
            yield f"cluster_{i}", lambda i=i: self.cluster(i)
            yield f"expert_{i}", lambda i=i: self.experts(i)
        for i in modules if "distill" in phases else ():
            yield f"distill_{i}", lambda i=i: self.distill(i)
        if "refine" in phases and in_one_job(self.recipe, "refine"):
            yield "refine", self.refine_together
        elif "refine" in phases:
            for i in modules:
                yield f"refine_{i}", lambda i=i: self.refine(i)
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
        """The teacher the chain trains or grows, with random weights."""
        t = self.recipe.teacher
        if t.grown:
            self.run = with_seedling(self.run)
            return self.given_teacher()
        preprocessing = trained_preprocessing(t)
        save_teacher(new_teacher_of(t, self.run.labels), self.scratch, preprocessing)
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
        meta, stages, m = new_meta(self.run), self.run.teacher_stages(), self.recipe.meta
        with torch.no_grad():
            meta(self._images())
        if m.blocks_per_module == 0:
            self.images["meta"] = self.flops["meta"] = 0.0
            return "the teacher itself, which is not trained again"
        objective = meta_objective(meta, stages, m, self.run.tokens, 0.0, self.recipe.seed)
        return self._cost("meta", "meta", objective.flops_per_image)

    def incubate(self, i: int) -> str:
        """Teacher module i of a teacher that is grown, inside the meta model."""
        objective = Incubate(self.run.teacher_stages()[i], new_meta(self.run), i, self.run.tokens)
        with torch.no_grad():
            objective.predict(self._images())
        return self._cost("incubate", f"incubate_{i}", objective.flops_per_image)

    def assemble(self) -> str:
        """The grown teacher, fine-tuned whole."""
        return self._cost("assemble", "assemble", training_flops(self.run.teacher.model, self.run.tokens))

    def cluster(self, i: int) -> str:
        """The images passed through the meta model to cluster them."""
        artifact = f"cluster_{i}"
        self.images[artifact], self.flops[artifact] = clusters.cost(self.run, new_meta(self.run), i)
        return f"{self.images[artifact]:,.0f} images"

    def experts(self, i: int) -> str:
        """The experts of module i, each a dense module that learns from an equal share of the images."""
        run, e, count = self.run, self.recipe.expert, self.recipe.student.moe.num_experts
        if i == 0:
            experts.check(run)
        dense, width = experts.dense_modules(run)[i], run.teacher.model.embed_dim
        by_image = np.zeros(0, int) if clusters.goes_by_image(run, i) else None
        rule = clusters.Clusters(torch.zeros(width), torch.zeros(count, width), by_image, by_image, [])
        flops = experts.objective(run, rule, new_meta(run), i, 0, dense).flops_per_image
        self.apart += count * sum(p.numel() for p in dense.parameters())
        batch, images = run.settings("expert", e).global_batch, len(run.sources[0])
        share = images if by_image is None else max(images // count, batch)
        found = [self._cost("expert", f"expert_{i}_{j}", flops, images=share) for j in range(count)]
        return f"{count} experts, each about {found[0]}"

    def distill(self, i: int) -> str:
        """Student module i beside teacher module i inside the meta model."""
        d, run = self.recipe.distill, self.run
        student, stage = student_modules(run, d.drop_path)[i], run.teacher_stages()[i]
        objective = Distill(student, stage, new_meta(run), i, d, run.tokens, 0.0)
        with torch.no_grad():
            objective.predict(self._images())
        found = self._cost("distill", f"distill_{i}", objective.flops_per_image, self.recipe.student.moe.num_experts)
        if not d.epochs:
            found = "left as it starts: distill.epochs is 0"
        if taught_by_expert(self.recipe):
            self.flops[f"distill_{i}"] += experts.assembly_flops(run, objective.meta, student, i)
        return found

    def refine(self, i: int) -> str:
        """Student module i behind the student modules before it."""
        run, artifact = self.run, f"refine_{i}"
        if not trained_again(self.recipe, i):
            self.images[artifact] = self.flops[artifact] = 0.0
            return "fed images either way, so it is taken as it is"
        *before, student = student_modules(run)[: i + 1]
        objective = Distill(
            student, run.teacher_stages()[i], new_meta(run), i, self.recipe.distill, run.tokens, 0.0, before
        )
        return self._cost("refine", artifact, objective.flops_per_image, self.recipe.student.moe.num_experts)

    def refine_together(self) -> str:
        """All student modules in one training."""
        run, r = self.run, self.recipe
        objective = Together(student_modules(run), run.teacher_stages(), new_meta(run), r.distill, run.tokens,
                             r.meta.blocks_per_module == 0)  # fmt: skip
        with torch.no_grad():
            objective.predict(self._images())
        experts = r.student.moe.num_experts
        for i, flops in enumerate(objective.flops_by_module):
            found = self._cost("refine", f"refine_{i}", flops, experts)
        return f"{found} for all modules at once"

    def train(self) -> str:
        """The whole student, and the baselines' cost."""
        t, experts = self.recipe.train, self.recipe.student.moe.num_experts
        given = t.init if t.start == "distilled" else ""
        if given:
            reuse.check(self.run, ["train"])
        student = family_of(self.recipe).load(given) if given else new_student(self.run)
        self.parameters = max(self.parameters, sum(p.numel() for p in student.parameters()))
        objective = self._end_to_end(student)
        with torch.no_grad():
            objective.predict(self._images(student.preprocessing))
        found = self._cost("train", "train", objective.flops_per_image, experts)
        epoch, before = self.flops["train"] / t.epochs, preparation(self.recipe)
        self.flops["train_scratch"] = self.flops["train_upcycled"] = self.flops["train"]
        if set(before) <= self.flops.keys():
            longer = math.ceil(sum(self.flops[name] for name in before) / epoch)
            self.flops["train_scratch_equal_cost"] = self.flops["train"] + longer * epoch
        for name in [name for name in self.flops if name.startswith("train_")]:
            self.images[name] = self.flops[name] / objective.flops_per_image
        return f"student of {sum(p.numel() for p in student.parameters()) / 1e6:.3g} M parameters; {found}"

    def _end_to_end(self, student: torch.nn.Module) -> Classify:
        t, tokens = self.recipe.train, num_tokens(student)
        fading = t.border_weight or t.routing_weight
        if not t.kd_weight and not fading:
            return Classify(student, tokens)
        borders = Borders((), ()) if fading else None  # to know how long the teacher is run
        return LearnFromTeacher(student, MetaModel(self.run.teacher_stages()), t, tokens, borders=borders)

    def disk(self) -> str:
        """Room for the checkpoints of the largest model and for the results of every stage."""
        r = self.recipe
        rounds = 2 + (r.refine.epochs > 0) + 2 * r.teacher.grown  # modules, whole student, ...
        checkpoint = (BYTES_PER_PARAMETER + (AVERAGE_BYTES if r.train.ema else 0)) * (r.run.keep + 1)
        needed = self.parameters * (checkpoint * rounds + 4 * (r.modules + 4)) + self.apart * (checkpoint + 4)
        folder = next(p for p in (self.out, *self.out.parents) if p.is_dir())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"{needed / 1e9:.1f} GB needed below {folder}, {free / 1e9:.1f} GB free")
        return f"at most {needed / 1e9:.3g} GB needed below {folder}, {free / 1e9:,.0f} GB free"

    def _cost(
        self, section: str, artifact: str, flops_per_image: float, experts: int = 0, images: int | None = None
    ) -> str:
        schedule = getattr(self.recipe, section)
        run = self._run(section)
        settings = run.settings(section, schedule, experts)
        data = self.run.data_for(None)
        per_epoch = epoch_length(data, settings) if images is None else images // settings.global_batch
        steps = schedule.epochs * per_epoch
        self.images[artifact] = float(steps * settings.global_batch)
        self.flops[artifact] = self.images[artifact] * flops_per_image
        return (f"{steps:,} steps of {settings.global_batch} images on {run.dist.world} ranks (micro-batch "
                f"{settings.micro_batch} x {settings.accumulation}, ep {settings.ep_size})")  # fmt: skip

    def _teacher_flops(self) -> int:
        return training_flops(self.run.teacher.model, self.run.tokens)

    def _run(self, section: str) -> Run:
        nodes, local = self.ranks[section]
        dist = Dist(0, nodes * local, 0, local, torch.device("cpu"))
        return Run(self.recipe, self.ds_values, self.out, dist, "dry run")

    def _images(self, pre: Preprocessing | None = None) -> torch.Tensor:
        pre = pre or self.run.teacher.preprocessing
        return torch.zeros(
            max(1, self.recipe.student.moe.images_per_group), pre.in_chans, pre.image_size, pre.image_size
        )


def _hf_home() -> Path:
    return Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))


if __name__ == "__main__":
    sys.exit(main())
