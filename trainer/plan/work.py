"""What a phase trains, in the numbers a plan needs: parameters, layers that keep something, experts, FLOPs, steps.

Models are built on the meta device, so that the largest one costs neither memory nor time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from models.flops import flops, forward_flops
from models.memory import decided_bytes, kept_bytes, widest_bytes
from models.moe.layer import LAYERS, MoE
from trainer.config.phases import ScheduleConfig
from trainer.context import Run
from trainer.distributed.engine import parameter_groups
from trainer.objectives.base import Objective
from trainer.objectives.cost import Pass, trained
from trainer.phases import code_of
from trainer.request.graph import TABLE, Phase, artifact_name, in_one_job, taking_part
from trainer.teaching.estimate import told_numbers

# elements that DeepSpeed cuts groups of experts at (split_params_into_different_moe_groups_for_optimizer)
LARGEST_EXPERT_GROUP = 178_956_971


@dataclass(frozen=True)
class Parameter:
    """A trained parameter; `expert` is its number among the experts of its layer, None where it is of no expert."""

    numel: int
    expert: int | None


@dataclass(frozen=True)
class States:
    """Bytes of what the images of a micro-batch pass through.

    Attributes:
        kept: of a forward for the backward pass, by what learns.
        kept_recomputing: the same with activation checkpointing: the blocks' inputs and where their tokens go, and all
            of the largest block.
        relayed: by what is frozen and hands the gradient on.
        widest: the largest state inside a block.
        both_ways, forward_only: of all parts that a gradient passes, and of those it does not.
        of_blocks: that learn.
    """

    kept: int
    kept_recomputing: int
    relayed: int
    widest: int
    both_ways: int
    forward_only: float
    of_blocks: int


@dataclass(frozen=True, eq=False)
class Work:
    """One training: of a phase, or of one of its modules."""

    name: str  # of its result: distill_0
    phase: str
    section: str  # of the recipe
    schedule: ScheduleConfig
    objective: Objective
    epochs: int
    images: int  # an epoch's
    image_numbers: int  # pixels of an image, all channels; of the largest where they differ
    layer_decay: float = 1.0
    ema: bool = False
    told: int = 0  # numbers of an image that the teacher's side tells, where it is kept on disk
    jobs: int = 1  # trainings of these sizes: the experts of a module, each taught alone
    by_itself: bool = False  # of images of its own: planned apart from the other phases
    assumed: str = ""  # of its images, where they were not opened

    @property
    def tokens(self) -> int:
        """Length of the token sequence."""
        return self.objective.tokens

    @functools.cached_property
    def moe_layers(self) -> list[MoE]:
        """Of what is trained: those that experts are spread for."""
        return [module for module in self.objective.module.modules() if isinstance(module, MoE)]

    @functools.cached_property
    def frozen_numbers(self) -> int:
        """Parameters and buffers that lie beside what is trained, each once."""
        trained = {id(tensor) for tensor in _tensors([self.objective.module])}
        return sum(tensor.numel() for tensor in _tensors(self.objective.frozen) if id(tensor) not in trained)

    @functools.cached_property
    def trained_parts(self) -> list[Pass]:
        """What images pass through and learns; a part stands there as often as it is run."""
        learning = [each for each in self.objective.passes() if each.learns]
        return learning or trained(self.objective.module)  # module replacing counts its cost another way

    @functools.cached_property
    def relaying_parts(self) -> list[Pass]:
        """What is frozen and hands the gradient on."""
        return [each for each in self.objective.passes() if each.relays and not each.learns]

    @functools.cached_property
    def parameters(self) -> int:
        """Trained parameters, all experts counted."""
        return sum(p.numel() for p in self.objective.module.parameters() if p.requires_grad)

    @functools.cached_property
    def groups(self) -> list[list[Parameter]]:
        """The optimiser's parameter groups, before experts are taken out of them."""
        experts = {}
        for layer in self.moe_layers:
            for number, expert in enumerate(layer.experts):
                experts |= dict.fromkeys(map(id, expert.parameters()), number)
        groups = parameter_groups(self.objective.module, self.schedule.weight_decay, self.layer_decay)
        return [[Parameter(p.numel(), experts.get(id(p))) for p in group["params"]] for group in groups]

    @functools.cached_property
    def recomputed_flops(self) -> int:
        """FLOPs of an image that activation checkpointing computes again: a forward of the blocks that learn."""
        in_blocks = sum(forward_flops(block, self.tokens) for block in self.blocks)
        windowed = [each.part for each in self.trained_parts if hasattr(each.part, "count_windows")]
        return in_blocks + sum(part.count_windows(self.tokens).forward for part in windowed)

    @functools.cached_property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the trained parts, which activation checkpointing recomputes."""
        return [block for each in self.trained_parts for block in blocks_of(each.part)]

    def block_numbers(self, tokens: int) -> int:
        """Numbers that all blocks are given for one image: what is kept where they are computed again."""
        return sum(tokens * block.norm1.normalized_shape[-1] for block in self.blocks)

    def states(
        self, images: int, number: int, ep_size: int, busiest: float, form: str, largest: bool = False
    ) -> States:
        """Of a micro-batch of so many images in numbers of so many bytes; computed once.

        Args:
            largest: all of them are as large as the largest, where they differ; else as the mean.
        """
        key = (images, number, ep_size, busiest, form, largest)
        if key not in self._states:
            self._states[key] = self._counted(*key)
        return self._states[key]

    def _counted(self, images: int, number: int, ep_size: int, busiest: float, form: str, largest: bool) -> States:
        tokens = self.tokens
        if largest and self.objective.most_tokens:
            tokens = self.objective.most_tokens

        def kept_of(part: nn.Module, length: int, learns: bool = True) -> int:
            return kept_bytes(part, images, length, number, learns=learns, ep_size=ep_size, busiest=busiest, form=form)

        def kept(each: Pass, learns: bool = True) -> int:
            length = each.tokens + tokens - self.tokens if each.tokens else tokens
            return kept_of(each.part, length, learns)

        def widest(block: nn.Module) -> int:
            return widest_bytes(block, images, tokens, number, ep_size=ep_size, busiest=busiest, form=form)

        everything = sum(map(kept, self.trained_parts))
        blocks = [kept_of(block, tokens) for block in self.blocks]
        inputs = self.block_numbers(tokens) * images * number
        inputs += sum(decided_bytes(layer, images, tokens) for layer in self.moe_layers)
        passes = self.objective.passes()
        forward_only = [each for each in passes if not each.learns and not each.relays]
        return States(
            kept=everything,
            kept_recomputing=everything - sum(blocks) + inputs + max(blocks, default=0),
            relayed=sum(kept(each, learns=False) for each in self.relaying_parts),
            widest=max(map(widest, self.blocks), default=0),
            both_ways=everything + sum(map(kept, self.relaying_parts)),
            forward_only=sum(each.share * kept(each) for each in forward_only),
            of_blocks=sum(blocks),
        )

    def flats(self, ep_size: int) -> list[tuple[int, bool]]:
        """(elements, of experts) of each flat parameter group of a rank; computed once."""
        if ep_size not in self._flats:
            local = self.moe_layers[0].config.num_experts // ep_size if self.moe_layers else 0
            self._flats[ep_size] = flat_groups(self.groups, local)
        return self._flats[ep_size]

    @functools.cached_property
    def expert_flops(self) -> list[int]:
        """FLOPs of an image, backward included, in the experts of each MoE layer."""
        found = []
        for layer in self.moe_layers:
            router = 3 * 2 * self.tokens * layer.dim * layer.config.num_experts
            found.append(flops(layer, self.tokens).trained - router)
        return found

    @functools.cached_property
    def _states(self) -> dict[tuple[int, int, int, float, str, bool], States]:
        return {}

    @functools.cached_property
    def _flats(self) -> dict[int, list[tuple[int, bool]]]:
        return {}

    def steps(self, global_batch: int) -> int:
        """Optimiser steps from start to end."""
        return self.epochs * (self.images // global_batch)


def expert_numbers(layer: MoE) -> int:
    """Weights of one expert."""
    return len(LAYERS[layer.act]) * layer.dim * layer.hidden


def flat_groups(groups: Sequence[Sequence[Parameter]], local_experts: int) -> list[tuple[int, bool]]:
    """(elements, of experts) of each flat parameter group that ZeRO makes on a rank.

    Args:
        local_experts: of each layer on this rank.
    """
    flats = []
    of_experts = []
    for group in groups:
        dense = sum(p.numel for p in group if p.expert is None)
        if dense:
            flats.append((dense, False))
        held = [p.numel for p in group if p.expert is not None and p.expert < local_experts]
        of_experts += [(elements, True) for elements in _cut(held)]
    return flats + of_experts


def blocks_of(part: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks inside a part."""
    if hasattr(part, "norm1") and hasattr(part, "attn"):
        yield part
        return
    for child in part.children():
        yield from blocks_of(child)


def works(run: Run, asked: Sequence[str] = ()) -> list[Work]:
    """Every training of a recipe, in order.

    Args:
        run: whose teacher may stand on the meta device.
        asked: phases; () = all that take part.
    """
    found = []
    for row in TABLE:
        takes_part = row in taking_part(run.recipe) and (not asked or row.name in asked)
        if takes_part and row.section and row.trains(run.recipe) and hasattr(code_of(row.name), "taught"):
            found += _works_of(run, row)
    return found


def _works_of(run: Run, row: Phase) -> list[Work]:
    schedule = getattr(run.recipe, row.section)
    epochs = run.recipe.teacher.finetune_epochs if row.name == "probe" else schedule.epochs
    modules: list[int | None] = [None]
    if row.repeated and not in_one_job(run.recipe, row.name):
        modules = list(range(run.recipe.modules))
    seen = run.teacher.preprocessing
    found = []
    for module in modules:
        with torch.device("meta"):
            objective = code_of(row.name).taught(run, module)
        if objective is None or not epochs:
            continue
        work = Work(
            artifact_name(row.name, module),
            row.name,
            row.section,
            schedule,
            objective,
            epochs,
            len(run.boxes[0]) if row.own_images else len(run.sources[0]),
            objective.most_numbers or seen.in_chans * seen.image_size**2,
            layer_decay=getattr(schedule, "layer_decay", 1.0),
            ema=bool(getattr(schedule, "ema", 0.0)),
            told=told_numbers(run, objective) if getattr(schedule, "kept_epochs", 0) else 0,
            by_itself=row.own_images,
            assumed=getattr(run.boxes[0], "assumed", "") if row.own_images else "",
        )
        if row.repeated == "expert":
            count = run.recipe.student.moe.num_experts
            work = replace(work, jobs=count, images=max(work.images // count, schedule.global_batch or 1))
        found.append(work)
    return found


def _cut(held: Sequence[int]) -> list[int]:
    """Elements of the groups that DeepSpeed makes of one group's experts."""
    cut, current = [], 0
    for numel in held:
        if current + numel > LARGEST_EXPERT_GROUP:
            cut.append(current)
            current = 0
        current += numel
    return [*cut, current] if held else []


def _tensors(modules: Sequence[nn.Module]) -> Iterator[Any]:
    """Parameters and buffers of some modules, each once."""
    seen = set()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
