"""What every phase shares: the recipe resolved against its teacher and data, and the beginning and end of a phase."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn

from models.flops import forward_flops, num_tokens
from models.modules.stages import split
from models.teacher.load import Teacher, fingerprint, load_teacher
from trainer import artifacts
from trainer.config.ds_config import Settings, resolve
from trainer.config.load import module_depths
from trainer.config.phases import ScheduleConfig
from trainer.config.recipe import Recipe
from trainer.data.base import ImageSource
from trainer.data.sources import open_source
from trainer.disk import replacing
from trainer.distributed.engine import Engine, build_engine, working_type
from trainer.distributed.ranks import Dist, seed_everything
from trainer.evaluation.accuracy import eval_batch, evaluate
from trainer.loop.fit import Data, Outcome, Task, epoch_length, fit
from trainer.request.graph import artifact_name, in_one_job, own_teacher

log = logging.getLogger(__name__)
T = TypeVar("T")


class Opened:
    """What a process opens or loads once, however many runs look at it: image sources, the teacher, dense weights."""

    def __init__(self, things: Mapping[str, Any] = MappingProxyType({})):
        self._things = dict(things)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The thing of that name, made by `make` when it is first asked for."""
        if name not in self._things:
            self._things[name] = make()
        return self._things[name]


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
        return replace(self, planned_teacher=planned, opened=Opened({"sources": self.sources}))

    def with_student(self, **changes: Any) -> Run:
        """The same run with changes to its student; what is open does not depend on them."""
        return replace(self, recipe=replace(self.recipe, student=replace(self.recipe.student, **changes)))

    @property
    def sources(self) -> tuple[ImageSource, ImageSource]:
        """Training and validation images."""
        data = self.recipe.data
        return self.opened.once("sources", lambda: (open_source(data, "train"), open_source(data, "val")))

    @property
    def labels(self) -> list[str]:
        """Class names of the data."""
        return self.sources[0].labels

    @property
    def teacher(self) -> Teacher:
        """The teacher of the recipe, on the CPU; made by phase teacher or assemble when the recipe names none.

        Raises:
            ValueError: not found, not supported, or its head has another number of classes than the data.
        """
        return self.planned_teacher or self.opened.once("teacher", self._load_teacher)

    def _load_teacher(self) -> Teacher:
        source = self.recipe.teacher.source
        for name in own_teacher(self.recipe):
            source = str(artifacts.require(self.out, name, self.recipe, "a recipe without teacher.source")[0])
        teacher = load_teacher(source)
        if teacher.num_classes != len(self.labels):
            raise ValueError(
                f"teacher {teacher.source} has {teacher.num_classes} classes and the data "
                f"({self.sources[0].name}) has {len(self.labels)}: use a teacher fine-tuned on this data"
            )
        return teacher

    @property
    def teacher_record(self) -> dict[str, Any]:
        """What tells this teacher from others, wherever it lies: its sizes and the SHA-256 of its weights.

        Ask before anything trains: training moves the teacher to the device and to the type of the student.
        """
        return self.opened.once("teacher record", lambda: fingerprint(self.teacher))

    @property
    def data(self) -> Data:
        """Images with the teacher's preprocessing and the recipe's training transforms."""
        return self.data_for(self.teacher.preprocessing)

    def data_for(self, preprocessing: Any) -> Data:
        """The same with a given preprocessing, for the phase that makes the teacher."""
        d = self.recipe.data
        return Data(*self.sources, preprocessing, self.recipe.augment, d.workers, len(self.labels), d.skip_unreadable)

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

    def settings(self, section: str, schedule: ScheduleConfig, num_experts: int = 0) -> Settings:
        """The DeepSpeed JSON resolved for a section of the recipe and this world."""
        d, group = self.dist, self.recipe.student.moe.images_per_group
        settings = resolve(
            self.ds_values, schedule, world=d.world, local_world=d.local_world, num_experts=num_experts,
            phase=section,
        )  # fmt: skip
        if num_experts and group and settings.micro_batch % group:
            raise ValueError(
                f"student.moe.images_per_group is {group}, which does not divide the micro-batch of "
                f"{settings.micro_batch} images: change it, {section}.global_batch or the DeepSpeed JSON"
            )
        return settings

    def open(
        self, phase: str, module: int | None = None, start: str = "distilled", expert: int | None = None
    ) -> tuple[Path, bool]:
        """The artifact's folder, created on rank 0, and whether it is complete already (collective)."""
        name = artifact_name(phase, module, start, expert)
        found = self.out / name, False
        recipe = self.recipe
        asked = None if in_one_job(recipe, phase) else module  # what --config asks for when it repeats this
        about = {"phase": phase, "module": asked, "command": self.command, "ds_config": self.ds_values}
        about |= {} if expert is None else {"expert": expert}
        if phase in ("train", "evaluate"):  # --config repeats this start, also where --phase all trains baselines
            recipe = replace(recipe, train=replace(recipe.train, start=start))
        with self.dist.together():
            if self.dist.main:
                found = artifacts.open_folder(self.out, name, recipe, about)
        done = bool(self.dist.gather(found[1])[0])
        if done and self.dist.main:
            log.info("%s is complete: nothing to do", found[0])
        return found[0], done

    def train(self, objective: Any, data: Data, schedule: ScheduleConfig, settings: Settings, folder: Path,
              description: str, *, layer_decay: float = 1.0, ema: float = 0.0, evaluate_start: bool = False,
              ) -> tuple[Outcome, dict[str, Tensor], Engine]:  # fmt: skip
        """Seed, wrap, train, and return the outcome, the weights to publish (canonical, fp32, CPU) and the engine.

        Args:
            layer_decay, ema: see build_engine; with ema the weights to publish are the average.
            evaluate_start: evaluate before the first step too (Outcome.start).
        """
        r = self.recipe
        seed_everything(r.seed, self.dist.rank, r.run.deterministic)
        task = Task(folder.name, description, schedule.epochs, r.seed, r.run, evaluate_start)
        per_epoch = epoch_length(data, settings)
        engine = build_engine(
            objective.module, schedule, settings, steps_per_epoch=per_epoch, dist=self.dist,
            layer_decay=layer_decay, ema=ema,
        )  # fmt: skip
        outcome = fit(engine, objective, data, task, folder, self.dist)
        with engine.published():  # clones: in an fp32 run on the CPU the state is views of the weights
            state = {name: value.clone() for name, value in engine.fp32_state().items()}
        return outcome, state, engine

    def measure(self, objective: Any, settings: Settings) -> Outcome:
        """What is reached without training: `objective.predict` evaluated, in an outcome of no steps.

        Moves the objective's modules to the device and to the type they would train in.
        """
        started, dtype = time.perf_counter(), working_type(settings)
        for module in (objective.module, *objective.frozen):
            module.to(self.dist.device, dtype)
        found = evaluate(objective, self.data, dtype, self.eval_batch(settings), self.dist)
        return Outcome(found, time.perf_counter() - started, steps=0, images_seen=0)

    def eval_batch(self, settings: Settings) -> int:
        """Images per rank and forward in evaluation."""
        return eval_batch(self.recipe.run, settings)

    def finish(self, folder: Path, phase: str, module: int | None, outcome: Outcome, settings: Settings, *,
               epochs: int, flops_per_image: int, metrics: dict[str, float], extra_flops: int = 0,
               made_with: dict[str, Any] | None = None) -> None:  # fmt: skip
        """Write result.json on rank 0 and let the others wait for it.

        Args:
            extra_flops: beside those per image, e.g. of clustering.
            made_with: what the artifact came from beside the recipe (teacher, meta, init), by name.
        """
        if self.dist.main:
            result = {
                "phase": phase,
                "module": module,
                "metrics": {name: float(value) for name, value in metrics.items()},
                "seconds": outcome.seconds,
                "images_seen": outcome.images_seen,
                "steps": outcome.steps,
                "epochs": epochs,
                "flops": float(outcome.images_seen * flops_per_image + extra_flops),
                "world_size": self.dist.world,
                "ep_size": settings.ep_size,
                "global_batch": settings.global_batch,
                "device": str(self.dist.device.type),
                "command": self.command,
                "data": self.sources[0].origin,
                "health": outcome.health,
                **(made_with or {}),
            }
            artifacts.write_result(folder, result)
        self.dist.barrier()


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write safetensors, whole or not at all."""
    with replacing(path) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, unfinished)


def training_flops(module: nn.Module, tokens: int) -> int:
    """Forward and backward FLOPs of one image through a model trained whole."""
    return 3 * forward_flops(module, tokens)
