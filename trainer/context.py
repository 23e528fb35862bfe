"""What every phase shares: the recipe resolved against its teacher and data, and the beginning and end of a phase."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn

from models.files.places import expanded
from models.flops import num_tokens
from models.labels import Match
from models.modules.stages import split
from models.teacher.classes import with_classes, without_head
from models.teacher.load import Teacher, fingerprint, load_teacher
from trainer import artifacts, heads, made_of, pins
from trainer.config.ds_config import Settings, resolve, without_training
from trainer.config.load import module_depths
from trainer.config.phases import ScheduleConfig, TaughtConfig
from trainer.config.recipe import Recipe
from trainer.data.base import ImageSource
from trainer.data.boxes.base import BoxSource, record_of
from trainer.data.boxes.batches import BoxData
from trainer.data.boxes.sources import open_boxes
from trainer.data.classes import doubts
from trainer.data.fingerprint import fingerprint as images_fingerprint
from trainer.data.sampler import phase_seed
from trainer.data.shards import ShardSource
from trainer.data.sources import FolderSource, open_source
from trainer.data.workers import MOST_ELSEWHERE, spare_processors
from trainer.disk import replacing
from trainer.distributed.engine import build_engine, compile_blocks, working_type
from trainer.distributed.main_rank import on_main
from trainer.distributed.ranks import Dist, seed_everything
from trainer.evaluation.accuracy import eval_batch, evaluate
from trainer.heads import Head
from trainer.loop.fit import Data, Outcome, Task, epoch_length, fit
from trainer.request.graph import (
    artifact_name,
    artifacts_of,
    experts_in,
    in_one_job,
    learns_from_teacher,
    own_teacher,
    phase_of,
    row_of,
)

log = logging.getLogger(__name__)
T = TypeVar("T")
BEGUN = "begun"  # in Opened: unix time since when this process works for the result it makes now
# whose results name their classes: other runs read them
REUSED = ("teacher", "probe", "meta", "distill", "train", "evaluate")


@dataclass(frozen=True)
class Trained:
    """What a training came to, and what it cost."""

    outcome: Outcome
    weights: dict[str, Tensor]  # to publish: canonical names, fp32, on the CPU
    epochs: int
    flops_per_image: int


class Opened:
    """What a process opens or loads once, however many runs look at it: image sources, the teacher, dense weights."""

    def __init__(self, things: Mapping[str, Any] = MappingProxyType({})):
        self._things = dict(things)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The thing of that name, made by `make` when it is first asked for."""
        if name not in self._things:
            self._things[name] = make()
        return self._things[name]

    def taken(self, name: str, make: Callable[[], T]) -> T:
        """The same for one who changes it: it is not kept."""
        return self._things.pop(name, None) or make()


@dataclass(frozen=True)
class Run:
    """One invocation: the recipe, the DeepSpeed JSON, the output folder, and this process among the ranks.

    Attributes:
        planned_teacher: stands in while the teacher of the recipe is not trained yet.
        opened: shared with the runs made from this one.
    """

    recipe: Recipe
    ds_values: dict[str, Any]
    out: Path
    dist: Dist
    command: str
    planned_teacher: Teacher | None = None
    opened: Opened = field(default_factory=Opened)

    def with_teacher(self, planned: Teacher) -> Run:
        """The same run with a stand-in for the teacher it is going to train, and its data open already."""
        if not self.classifies:
            planned = without_head(planned)
        return replace(self, planned_teacher=planned, opened=Opened({"sources": self.sources}))

    def with_student(self, **changes: Any) -> Run:
        """The same run with changes to its student; what is open does not depend on them."""
        return replace(self, recipe=replace(self.recipe, student=replace(self.recipe.student, **changes)))

    @property
    def sources(self) -> tuple[ImageSource, ImageSource]:
        """Training and validation images."""
        return self.opened.once("sources", self._open_sources)

    def _open_sources(self) -> tuple[ImageSource, ImageSource]:
        path = self.recipe.data.path
        data = replace(self.recipe.data, path=self.pinned(path))
        needs_labels = self.recipe.needs_labels()
        train, val = (open_source(data, split, labels_needed=bool(needs_labels)) for split in ("train", "val"))
        return self._take(train, val)

    def open_together(self) -> None:
        """Open the images on rank 0 first, and walk through folders there alone (collective).

        Listing a million names, or reading the headers of tar files, is work for a shared file system, which every rank
        would ask for in the same moment: the others are told what rank 0 has found. Where their data.path is another
        one (a variable in it may name a disk of the node), they walk themselves. Other kinds of data lie in the caches
        when the others open them.
        """
        if self.dist.world == 1:
            return
        on_main(self.dist, lambda: self.sources)  # may be a download of hours
        place = expanded(self.recipe.data.path)
        walked = None
        if self.dist.main and all(isinstance(source, (FolderSource, ShardSource)) for source in self.sources):
            walked = place, self.sources
        walked = self.dist.share(walked)
        with self.dist.together():
            if walked is not None and not self.dist.main and walked[0] == place and os.path.isdir(place):
                self.opened.once("sources", lambda: self._take(*walked[1]))
            _ = self.sources

    def _take(self, train: ImageSource, val: ImageSource) -> tuple[ImageSource, ImageSource]:
        """The images of this run, once they are open."""
        self.resolved(self.recipe.data.path, train.origin.partition(", configuration ")[0])
        for doubt in doubts(train, val):
            log.warning(doubt)
        return train, val

    @property
    def boxes(self) -> tuple[BoxSource, BoxSource]:
        """Training and validation images of a detector."""
        return self.opened.once("boxes", lambda: open_boxes(self.recipe.detect, self.recipe.data.max_pixels))

    @property
    def boxes_record(self) -> dict[str, Any]:
        """What tells these images from others, wherever they lie, by split."""
        train, val = self.boxes
        return self.opened.once("boxes record", lambda: {"train": record_of(train), "val": record_of(val)})

    @property
    def labels(self) -> list[str]:
        """Class names of the data."""
        return self.sources[0].labels

    @property
    def classes(self) -> list[str]:
        """Class names that teacher and student tell; none where they give features."""
        return self.labels if self.classifies else []

    @property
    def teacher(self) -> Teacher:
        """The teacher of the recipe, on the CPU; made by phase teacher or assemble when the recipe names none.

        Raises:
            ValueError: not found, not supported, its head has other classes than the data, or its probe is missing.
        """
        return self.planned_teacher or self.opened.once("teacher", self.load_teacher)

    def load_teacher(self) -> Teacher:
        """The same once more, apart from what training moves and rounds."""
        teacher = self.take_checkpoint()
        head = self.head_of(teacher)
        if head.kind == "none":
            return without_head(teacher)
        if head.kind == "own":
            return with_classes(teacher, self.labels, head.match)
        needed_by = f"the head of the teacher ({head.why})"
        folder, result = artifacts.require(self.out, "probe", self.recipe, needed_by)
        return heads.with_fitted_probe(teacher, self.labels, folder, whole=result["epochs"] > 0)

    @property
    def checkpoint(self) -> Teacher:
        """The teacher as its checkpoint has it, with whatever head; not to be changed."""
        return self.opened.once("checkpoint", self._load_checkpoint)

    def take_checkpoint(self) -> Teacher:
        """The same to be changed."""
        return self.opened.taken("checkpoint", self._load_checkpoint)

    def _load_checkpoint(self) -> Teacher:
        source = self.recipe.teacher.source
        for name in own_teacher(self.recipe):
            source = str(artifacts.require(self.out, name, self.recipe, "a recipe without teacher.source")[0])
        given_size = self.recipe.teacher.image_size if self.recipe.teacher.source else None
        teacher = load_teacher(self.pinned(source), image_size=given_size)
        self.resolved(source, teacher.source)
        return teacher

    def head_of(self, checkpoint: Teacher) -> Head:
        """Who tells the classes of a teacher, as teacher.head and the data say; see heads.head_of."""
        head = heads.head_of(checkpoint, self.recipe.teacher, self.sources[0])
        if head.match is not None:
            self._say_once(head.match)
        return head

    @property
    def classifies(self) -> bool:
        """Whether teacher and student tell classes; else they give features, and nothing is taught by labels.

        Asked before the teacher is loaded too: it follows from teacher.head, and with auto from the images.
        """
        return self.recipe.teacher.head != "none" and bool(self.labels)

    def fitted(self, dense: Teacher, policy: str, what: str) -> Teacher:
        """Another dense model than the teacher, its head with the data's classes in the data's order.

        Args:
            policy: how they are found, as teacher.classes says it.
            what: the dense model is, in messages.

        Raises:
            ValueError: it has other classes than the data; what is only on either side is named.
        """
        match = heads.match(dense, policy, self.sources[0], f"{what} {dense.source}")
        self._say_once(match)
        return with_classes(dense, self.labels, match)

    def _say_once(self, match: Match) -> None:
        """Also where a teacher is loaded more than once."""
        self.opened.once(f"said: {match.note}", lambda: self.say(match))

    @staticmethod
    def say(match: Match) -> None:
        """Log how classes were found, where they are not simply the same."""
        if match.note:
            log.log(logging.INFO if match.sure else logging.WARNING, match.note)

    def pinned(self, source: str) -> str:
        """A teacher or model as this run loads it: a hub id with the commit that it resolved to first."""
        return self.opened.once("resolved", dict).get(source) or pins.pinned(self.out, source)

    def resolved(self, source: str, to: str) -> None:
        """Remember what a source resolved to; the next phase that begins records it."""
        self.opened.once("resolved", dict)[source] = to

    @property
    def teacher_record(self) -> dict[str, Any]:
        """What tells this teacher from others, wherever it lies: its sizes and the SHA-256 of its weights.

        Ask before anything trains: training moves the teacher to the device and to the type of the student.
        """
        return self.opened.once("teacher record", lambda: fingerprint(self.teacher))

    @property
    def data_record(self) -> dict[str, Any]:
        """What tells these images from others, wherever they lie, by split."""
        train, val = self.sources
        return self.opened.once(
            "data record", lambda: {"train": images_fingerprint(train), "val": images_fingerprint(val)}
        )

    @property
    def data(self) -> Data:
        """Images with the teacher's preprocessing and the recipe's training transforms."""
        return self.data_for(self.teacher.preprocessing)

    def data_for(self, preprocessing: Any) -> Data:
        """The same with a given preprocessing, for the phase that makes the teacher."""
        d = self.recipe.data
        classes = max(1, len(self.labels))  # images without labels are of one, for what mixes targets
        measured = d.workers is None
        return Data(
            *self.sources, preprocessing, self.recipe.augment, self.workers, classes, d.skip_unreadable, measured
        )

    @property
    def workers(self) -> int:
        """Processes that load images, of training where it does not measure how many."""
        if self.recipe.data.workers is None:
            return min(MOST_ELSEWHERE, spare_processors(self.dist.local_world))
        return self.recipe.data.workers

    @property
    def tokens(self) -> int:
        """Length of the token sequence, the same for teacher, meta model and student."""
        return num_tokens(self.teacher.model)

    @property
    def teacher_depths(self) -> tuple[int, ...]:
        """Blocks per teacher module."""
        r = self.recipe
        return module_depths(r.teacher.depths, len(self.teacher.model.blocks), r.modules, "teacher")

    def teacher_stages(self) -> list[nn.Module]:
        """The teacher's modules, frozen."""
        return split(self.teacher.model, self.teacher_depths)

    def settings(self, section: str) -> Settings:
        """The DeepSpeed JSON resolved for what a section of the recipe trains, in this world.

        Raises:
            ValueError: batches that do not fit each other, the ranks or the student's groups of images.
        """
        recipe = self.recipe
        experts = experts_in(recipe, section)
        settings = resolve(
            self.ds_values,
            getattr(recipe, section),
            world=self.dist.world,
            local_world=self.dist.local_world,
            num_experts=experts,
            phase=section,
        )
        group = recipe.student.moe.images_per_group
        if section == "detect":  # whose images are routed alone
            group = 1
        if experts and group and settings.micro_batch % group:
            raise ValueError(
                f"student.moe.images_per_group is {group}, which does not divide the micro-batch of "
                f"{settings.micro_batch} images: change it, {section}.global_batch or the DeepSpeed JSON"
            )
        return settings

    def settings_without_training(self) -> Settings:
        """The same for phase evaluate, which trains nothing: no batch has to divide among its ranks."""
        return without_training(self.ds_values, self.recipe.train, self.dist.world)

    def open(
        self, phase: str, module: int | None = None, start: str = "distilled", expert: int | None = None
    ) -> tuple[Path, bool]:
        """The artifact's folder, created on rank 0, and whether it is complete already (collective)."""
        recipe = self.recipe
        name = artifact_name(phase, module, start, expert)
        asked_for = None if in_one_job(recipe, phase) else module
        # what --config repeats
        about = {"phase": phase, "module": asked_for, "command": self.command, "ds_config": self.ds_values}
        if expert is not None:
            about["expert"] = expert
        if row_of(phase).by_start:  # this start, also where --phase all trains baselines
            recipe = replace(recipe, train=replace(recipe.train, start=start))
        folder, complete = self.out / name, False
        with self.dist.together():
            if self.dist.main:
                folder, complete = artifacts.open_folder(self.out, name, recipe, about)
                if phase == "push":
                    pass  # it hands on what is there
                elif complete and phase != "evaluate":  # which measures anew
                    made_of.compare(made_of.read(folder), self._read_by(phase, recipe), folder, recipe.run.accept)
                else:
                    self._compare(folder, phase, recipe)
        complete = bool(self.dist.gather(complete)[0])
        if complete and self.dist.main:
            log.info("%s is complete: nothing to do", folder)
        return folder, complete

    def _compare(self, folder: Path, phase: str, recipe: Recipe) -> None:
        """Compare what this phase is made of with its inputs and its own beginning, and record it (rank 0)."""
        start = recipe.train.start
        now = self._read_by(phase, recipe) | self._worked_by(phase, recipe)
        for source, resolved in self.opened.once("resolved", dict).items():
            pins.pin(self.out, source, resolved)
        accept, accepted = recipe.run.accept, []
        of_inputs = {kind: value for kind, value in now.items() if kind != "ds_config"}  # each phase has its own
        for needed in row_of(phase).needs(recipe, start):
            for name in artifacts_of(recipe, needed, start):
                if name != folder.name and (self.out / name / "result.json").is_file():
                    accepted += made_of.compare(made_of.read(self.out / name), of_inputs, self.out / name, accept)
        begun = any((folder / part).is_dir() for part in ("checkpoints", "features"))
        if begun and not (folder / "result.json").is_file():
            before = made_of.read(folder)
            accepted = [*before.get("accepted", ()), *accepted]
            accepted += made_of.compare(before, now, folder, accept)
        made_of.write(folder, now | {"accepted": list(dict.fromkeys(accepted))})
        artifacts.keep_config_true(folder, self.ds_values)

    def _read_by(self, phase: str, recipe: Recipe) -> dict[str, Any]:
        """The data and the teacher of a phase, as far as it reads them."""
        row = row_of(phase)
        if row.own_images:
            return {"boxes": self.boxes_record, "backbone": self.opened.once("backbone record", dict)}
        now = {"data": self.data_record}
        if phase == "probe" and not (self.out / phase / "result.json").is_file():  # which records the teacher it made
            return now | {"checkpoint": fingerprint(self.checkpoint)}
        before_the_teacher = phase in ("teacher", "incubate", "assemble") or (phase == "meta" and recipe.teacher.grown)
        asks_teacher = learns_from_teacher(recipe, recipe.train.start) if row.by_start else not before_the_teacher
        is_there = all((self.out / name / "result.json").is_file() for name in own_teacher(recipe))
        if asks_teacher and is_there and phase != "evaluate":
            own = own_teacher(recipe)
            now["teacher"] = self.teacher_record | ({"source": own[0]} if own else {})  # wherever OUT lies
        return now

    def _worked_by(self, phase: str, recipe: Recipe) -> dict[str, Any]:
        """The code, the packages and the numbers of the DeepSpeed JSON that a phase works with."""
        row = row_of(phase)
        now = {
            "code": {"sha256": made_of.code_digest(), "commit": artifacts.git_commit()},
            "versions": artifacts.versions(),
        }
        taken = getattr(getattr(recipe, phase, None), "source", "") and phase in ("meta", "distill")
        if row.section and not taken:
            now["ds_config"] = made_of.ds_numbers(self.ds_values, getattr(recipe, row.section).clip)
        return now

    def train(
        self,
        objective: Any,
        data: Data | BoxData,
        schedule: ScheduleConfig,
        settings: Settings,
        folder: Path,
        description: str,
        *,
        layer_decay: float = 1.0,
        ema: float = 0.0,
        evaluate_start: bool = False,
        evaluate: Callable[..., dict[str, float]] = evaluate,
    ) -> Trained:
        """Train what an objective trains, from the seed or from the newest checkpoint of `folder`, to the last epoch.

        Args:
            description: as in progress lines, e.g. "distill 2/4".
            layer_decay, ema: see build_engine; with ema the weights to publish are the average.
            evaluate_start: evaluate before the first step too (Outcome.start).
            evaluate: how the objective is measured (trainer/evaluation/).
        """
        run = self.recipe.run
        flops_per_image = objective.flops_per_image  # counted on the plain module: the engine takes experts out of it
        seed_everything(self.recipe.seed, self.dist.rank, run.deterministic)
        seed = phase_seed(self.recipe.seed, phase_of(folder.name))
        kept_epochs = schedule.kept_epochs if isinstance(schedule, TaughtConfig) else 0
        task = Task(folder.name, description, schedule.epochs, seed, run, evaluate_start, kept_epochs, evaluate)
        if run.compile:
            for module in (objective.module, *objective.frozen):
                compile_blocks(module)
        engine = build_engine(
            objective.module,
            schedule,
            settings,
            steps_per_epoch=epoch_length(data, settings),
            dist=self.dist,
            layer_decay=layer_decay,
            ema=ema,
        )
        outcome = fit(engine, objective, data, task, folder, self.dist)
        with engine.published():  # clones: in an fp32 run on the CPU the state is views of the weights
            weights = {name: value.clone() for name, value in engine.fp32_state().items()}
        engine.close()
        return Trained(outcome, weights, schedule.epochs, flops_per_image)

    def _data_of(self, phase: str) -> dict[str, Any]:
        """Where the images of a phase come from, and the share that was held out to validate on."""
        if row_of(phase).own_images:
            return {"data": self.boxes[0].origin, "held_out": 0.0}
        train, val = self.sources
        return {"data": train.origin, "held_out": val.held_out}

    def left_as_it_is(self, objective: Any, settings: Settings) -> Trained:
        """The same of what is not trained: its weights as they are, measured in its place."""
        weights = {name: tensor.clone() for name, tensor in objective.module.state_dict().items()}
        return Trained(self.measure(objective, settings), weights, epochs=0, flops_per_image=0)

    def measure(self, objective: Any, settings: Settings) -> Outcome:
        """What is reached without training: `objective.predict` evaluated, in an outcome of no steps.

        Moves the objective's modules to the device and to the type they would train in.
        """
        started = time.perf_counter()
        dtype = working_type(settings)
        for module in (objective.module, *objective.frozen):
            module.to(self.dist.device, dtype)
        evaluation = evaluate(objective, self.data, dtype, self.eval_batch(settings), self.dist)
        return Outcome(evaluation, time.perf_counter() - started, steps=0, images_seen=0)

    def eval_batch(self, settings: Settings) -> int:
        """Images per rank and forward in evaluation."""
        return eval_batch(self.recipe.run, settings)

    def finish(
        self,
        folder: Path,
        phase: str,
        module: int | None,
        trained: Trained,
        settings: Settings,
        *,
        metrics: Mapping[str, float],
        weights: Mapping[str, Tensor] | None = None,
        extra_flops: float = 0,
        made_with: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Write the weights and, last, result.json on rank 0, and let the others wait for it.

        Args:
            weights: for model.safetensors; None = whatever the phase has written itself.
            extra_flops: beside those per image, e.g. of clustering.
            made_with: what the artifact came from beside the recipe (teacher, meta, init), by name.
        """
        outcome = trained.outcome
        # since this process began to work for this result; what it has not trained it has started, built and saved
        begun = self.opened.taken(BEGUN, lambda: math.nan)
        startup = time.time() - begun - (outcome.seconds - outcome.earlier)
        if self.dist.main:
            if weights is not None:
                save_weights(folder / "model.safetensors", weights)
            result = {
                "phase": phase,
                "module": module,
                "metrics": {name: float(value) for name, value in metrics.items()},
                "seconds": outcome.seconds,
                "startup_seconds": None if math.isnan(startup) else max(0.0, startup),
                "images_seen": outcome.images_seen,
                "steps": outcome.steps,
                "epochs": trained.epochs,
                "flops": float(outcome.images_seen * trained.flops_per_image + extra_flops),
                "world_size": self.dist.world,
                "ep_size": settings.ep_size,
                "global_batch": settings.global_batch,
                "dtype": str(working_type(settings)).removeprefix("torch."),  # of the weights in every forward
                "device": str(self.dist.device.type),
                "command": self.command,
                **self._data_of(phase),
                "evaluation": "noisy" if self.recipe.student.nac.noisy_evaluation else "deterministic",
                "health": outcome.health,
                **made_with,
            }
            if phase in REUSED:
                result["classes"] = self.labels if phase == "teacher" else self.classes
            artifacts.write_result(folder, result)
        self.dist.barrier()
        self.opened.once(BEGUN, time.time)  # for the next result of this process


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write safetensors, whole or not at all."""
    with replacing(path) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, unfinished)
