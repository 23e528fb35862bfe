"""What every phase shares: the recipe resolved against its teacher and data, and the beginning and end of a phase."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from models.basis import Basis
from models.flops import forward_flops, num_tokens
from models.meta import MetaModel, check_pair
from models.modules import split
from models.stitch import StudentModule, build_student_modules
from models.teacher import Teacher, load_teacher
from models.vmoe import VMoE, VMoEConfig
from trainer import artifacts, upcycling
from trainer.bases import load as load_bases
from trainer.data.sources import ImageSource, open_source
from trainer.dist import Dist, seed_everything
from trainer.ds_config import Settings, resolve
from trainer.engine import Engine, build_engine, working_type
from trainer.loop import Data, Outcome, Task, epoch_length, eval_batch, evaluate, fit
from trainer.schema import Recipe, ScheduleConfig
from trainer.sizes import module_depths, student_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One invocation: the recipe, the DeepSpeed JSON, the output folder, and this process among the ranks."""

    recipe: Recipe
    ds_values: dict[str, Any]
    out: Path
    dist: Dist
    command: str
    planned_teacher: Teacher | None = None  # stands in while the teacher of the recipe is not trained yet

    @cached_property
    def sources(self) -> tuple[ImageSource, ImageSource]:
        """Training and validation images."""
        return open_source(self.recipe.data, "train"), open_source(self.recipe.data, "val")

    def with_teacher(self, planned: Teacher) -> Run:
        """The same run with a stand-in for the teacher it is going to train, and its data open already."""
        run = dataclasses.replace(self, planned_teacher=planned)
        vars(run)["sources"] = self.sources  # where cached_property keeps it: opening a large folder takes minutes
        return run

    @property
    def labels(self) -> list[str]:
        """Class names of the data."""
        return self.sources[0].labels

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher of the recipe, on the CPU; made by phase teacher or assemble when the recipe names none.

        Raises:
            ValueError: not found, not supported, or its head has another number of classes than the data.
        """
        if self.planned_teacher is not None:
            return self.planned_teacher
        source = self.recipe.teacher.source
        for name in artifacts.own_teacher(self.recipe):
            source = str(artifacts.require(self.out, name, self.recipe, "a recipe without teacher.source")[0])
        teacher = load_teacher(source)
        if teacher.num_classes != len(self.labels):
            raise ValueError(
                f"teacher {teacher.source} has {teacher.num_classes} classes and the data "
                f"({self.sources[0].name}) has {len(self.labels)}: use a teacher fine-tuned on this data"
            )
        return teacher

    @cached_property
    def teacher_record(self) -> dict[str, Any]:
        """What tells this teacher from others, wherever it lies: its sizes and the SHA-256 of its weights.

        Ask before anything trains: training moves the teacher to the device and to the type of the student.
        """
        return upcycling.fingerprint(self.teacher)

    @cached_property
    def dense(self) -> Teacher:
        """The dense model the student starts from (student.init)."""
        return upcycling.load_dense(self)

    @cached_property
    def data(self) -> Data:
        """Images with the teacher's preprocessing and the recipe's training transforms."""
        return self.data_for(self.teacher.preprocessing)

    def data_for(self, preprocessing: Any) -> Data:
        """The same with a given preprocessing, for the phase that makes the teacher."""
        d = self.recipe.data
        return Data(*self.sources, preprocessing, self.recipe.augment, d.workers, len(self.labels), d.skip_unreadable)

    @cached_property
    def tokens(self) -> int:
        """Length of the token sequence, the same for teacher, meta model and student."""
        return num_tokens(self.teacher.model)

    @property
    def teacher_depths(self) -> tuple[int, ...]:
        """Blocks per teacher module."""
        r = self.recipe
        return module_depths(r.teacher.depths, len(self.teacher.model.blocks), r.modules, "teacher")

    def student_config(self, drop_path: float = 0.0, recipe: Recipe | None = None) -> VMoEConfig:
        """The student that fits this teacher and data, of another recipe if given.

        Raises:
            ValueError: sizes that are open or do not fit.
        """
        images, tokens = self.teacher.preprocessing, self.teacher.model.num_prefix_tokens
        return student_config(
            recipe or self.recipe, len(self.labels), drop_path,
            image_size=images.image_size, in_chans=images.in_chans, prefix_tokens=tokens,
        )  # fmt: skip

    def new_student(self, drop_path: float = 0.0) -> VMoE:
        """The student before any training: initialised from the recipe's seed, or started from student.init."""
        config, r = self.student_config(drop_path), self.recipe
        if not r.student.init:
            return VMoE(config)
        return upcycling.started(self, config, module_depths(r.student.depths, config.depth, r.modules, "student"))

    def student_modules(self, drop_path: float = 0.0) -> list[StudentModule]:
        """The student's modules before any training, with their stitch layers."""
        student = self.new_student(drop_path)
        check_pair(self.teacher.model, student)
        depths = module_depths(self.recipe.student.depths, len(student.blocks), self.recipe.modules, "student")
        kind, width = self.recipe.distill.stitches, self.teacher.model.embed_dim
        bases = self.bases if kind != "linear" else None
        return build_student_modules(student, depths, width, self.recipe.seed, kind, bases)

    @property
    def bases(self) -> list[Basis] | None:
        """The shared basis of each inner border, from phase meta; None while the meta model is not trained yet."""
        if not (self.out / "meta" / "result.json").is_file():
            return None
        return load_bases(self.out / "meta", self.recipe.modules - 1, self.teacher.model.embed_dim)

    def teacher_stages(self) -> list[nn.Module]:
        """The teacher's modules, frozen."""
        return split(self.teacher.model, self.teacher_depths)

    def new_meta(self) -> MetaModel:
        """The meta model before training."""
        m = self.recipe.meta
        return MetaModel.from_teacher(
            self.teacher.model, self.recipe.modules, m.blocks_per_module, m.init,
            teacher_depths=self.teacher_depths, seed=self.recipe.seed,
        )  # fmt: skip

    def trained_meta(self, needed_by: str) -> tuple[MetaModel, dict[str, Any]]:
        """The meta model of phase meta and its result."""
        folder, result = artifacts.require(self.out, "meta", self.recipe, needed_by)
        meta = self.new_meta().cpu().float()  # phases before may have left the teacher elsewhere, in another type
        meta.load_state_dict(artifacts.load_weights(folder, meta.state_dict()))
        if self.recipe.teacher.grown and self.planned_teacher is None:  # its hybrids are younger than the meta model
            _, grown = artifacts.require(self.out, "assemble", self.recipe, needed_by)
            result["metrics"] |= {k: v for k, v in grown["metrics"].items() if k.startswith("hybrid_accuracy/")}
        return meta, result

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
        name = artifacts.artifact_name(phase, module, start, expert)
        found = self.out / name, False
        recipe = self.recipe
        asked = None if artifacts.in_one_job(recipe, phase) else module  # what --config asks for when it repeats this
        about = {"phase": phase, "module": asked, "command": self.command, "ds_config": self.ds_values}
        about |= {} if expert is None else {"expert": expert}
        if phase in ("train", "evaluate"):  # --config repeats this start, also where --phase all trains baselines
            recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, start=start))
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
    """Write safetensors beside, then rename."""
    beside = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, beside)
    beside.replace(path)


def training_flops(module: nn.Module, tokens: int) -> int:
    """Forward and backward FLOPs of one image through a model trained whole."""
    return 3 * forward_flops(module, tokens)
