"""A ZeRO-1/2 engine's training state by global names: saved at one number of ranks and experts, restored at another.

The only file that reads DeepSpeed's inner layout. ZeRO lays the parameters of a group end to end, cuts that over the
ranks of the group, and each rank keeps fp32 masters and moments of its own cut ("flat" below). `_hp_mapping` of a
parameter says which of its elements this rank holds and where they lie. Dense parameters are cut over the world,
experts over the ranks that hold the same experts.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from models.moe.parallel import plain_names

MASTER = "fp32"  # kind of a trained parameter
AVERAGE = "ema"  # kind of its average (train.ema)
UNTRAINED = "state"  # kind of a buffer or frozen parameter, in its own dtype; moments go by the optimiser's word

Read = Callable[[str, str, int, int], Tensor]  # (kind, name, start, stop) -> (stop - start,)
Flats = Mapping[str, Sequence[Tensor]]  # kind -> what is kept beside the masters, laid out as `masters` gives them


@dataclass(frozen=True)
class Piece:
    """Elements start, start + 1, ... of one flattened tensor of the training state."""

    kind: str
    name: str  # as on a plain torch model, with global expert numbers
    start: int
    values: Tensor  # 1-D, on its device; a view: the next optimiser step changes it


def masters(engine: Any) -> list[Tensor]:
    """The fp32 weights that this rank keeps, laid end to end: one tensor per group of the optimiser, of its memory."""
    return [group["params"][0].detach() for group in engine.optimizer.optimizer.param_groups]


def work_with_masters(engine: Any) -> None:
    """Let the model work with the masters as they are now (collective)."""
    engine.optimizer.update_lp_params()


def pieces(engine: Any, beside: Flats | None = None) -> list[Piece]:
    """This rank's part of the training state.

    Over all ranks: every element of every trained parameter and of each of its moments once (no moments before the
    first optimiser step), and every buffer and frozen parameter once.

    Args:
        engine: a deepspeed.DeepSpeedEngine with ZeRO 1 or 2, between two optimiser steps.
        beside: more kinds to save.

    Raises:
        RuntimeError: this version of DeepSpeed keeps its state in another way.
    """
    saved = []
    for share in _shares(engine):
        share.check()
        for kind, flat in share.flats(engine.optimizer.optimizer, beside or {}).items():
            saved.append(Piece(kind, share.name, share.start, share.of(flat)))
    for untrained in _untrained(engine.module):
        if untrained.ours:
            saved.append(Piece(UNTRAINED, untrained.name, 0, untrained.values.reshape(-1)))
    return saved


def shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Plain name -> shape of everything that is dense and of the experts of this rank."""
    state = engine.module.state_dict()
    return {name: tuple(state[key].shape) for key, name in _own_names(engine.module).items()}


def optimizer_steps(engine: Any) -> int:
    """Optimiser steps that changed the weights; Adam's counter."""
    return engine.global_steps - engine.skipped_steps


@torch.no_grad()
def restore(engine: Any, read: Read, *, step: int, beside: Flats | None = None) -> None:
    """Fill masters, moments, counters and working weights from a state that `pieces` gave at any topology (collective).

    At the topology it was saved at, training continues bit for bit.

    Args:
        engine: a deepspeed.DeepSpeedEngine with ZeRO 1 or 2, new or between two optimiser steps.
        read: gives the elements start to stop (exclusive) of a flattened tensor. Asked for moments only when step > 0.
            When it fails on one rank alone the others wait for that rank.
        step: what optimizer_steps was.
        beside: more kinds to fill.

    Raises:
        RuntimeError: this version of DeepSpeed keeps its state in another way.
    """
    shares = list(_shares(engine))
    optimizer = engine.optimizer.optimizer
    optimizer.state.clear()
    if step:
        _make_moments(optimizer, step)
    for share in shares:
        for kind, flat in share.flats(optimizer, beside or {}).items():
            share.of(flat).copy_(read(kind, share.name, share.start, share.start + share.count))
    for untrained in _untrained(engine.module):
        values = read(UNTRAINED, untrained.name, 0, untrained.values.numel())
        untrained.values.copy_(values.view_as(untrained.values))
    work_with_masters(engine)
    for share in shares:
        share.check()
    engine.optimizer._hp_optimizer_states_linked = False  # DeepSpeed finds the new moments at its next step
    engine.global_steps = step
    engine.skipped_steps = 0
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()


@dataclass(frozen=True)
class _Share:
    """The elements of one trained parameter that this rank keeps masters of."""

    name: str
    working: nn.Parameter
    start: int  # in the flattened parameter
    count: int
    place: int  # in the flat master
    group: int  # of the optimiser
    flat: Tensor

    def of(self, flat: Tensor) -> Tensor:
        """These elements of the flat master or of one of its moments; (count,)."""
        return flat[self.place : self.place + self.count]

    def flats(self, optimizer: torch.optim.Optimizer, beside: Flats) -> dict[str, Tensor]:
        """Kind -> the flat tensor that holds these elements of it."""
        more = {kind: flats[self.group] for kind, flats in beside.items()}
        return {MASTER: self.flat.detach()} | _moments(optimizer, self.flat) | more

    def check(self) -> None:
        """A layout misread would give experts each other's weights: the model must work with these very masters."""
        # master, rounded to the working type = the weights of the model, bit for bit
        working = self.working.detach().flatten()[self.start : self.start + self.count]
        master = self.of(self.flat.detach()).to(working)
        if not torch.allclose(working, master, rtol=0, atol=0, equal_nan=True):
            raise _foreign(
                f"the master of {self.name} is not where DeepSpeed says it is. Known cause: "
                "zero_optimization.round_robin_gradients; delete it"
            )


def _shares(engine: Any) -> Iterator[_Share]:
    names = _own_names(engine.module)
    try:
        groups = engine.optimizer.optimizer.param_groups
        for key, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it is kept by other ranks
                continue
            in_parameter = mapping.lp_fragment_address
            in_master = mapping.hp_fragment_address
            group = mapping.param_group_index
            (flat,) = groups[group]["params"]
            yield _Share(
                name=names[key],
                working=parameter,
                start=in_parameter.start,
                count=in_parameter.numel,
                place=in_master.start,
                group=group,
                flat=flat,
            )
    except (AttributeError, ValueError) as error:
        raise _foreign(error) from error


def _foreign(what: object) -> RuntimeError:
    import deepspeed

    return RuntimeError(
        f"cannot find the training state in this engine of DeepSpeed {deepspeed.__version__}: {what}. "
        "Other versions than the one in requirements.txt may keep it elsewhere."
    )


def _moments(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """Kind -> flat moment, in a fixed order."""
    state = optimizer.state.get(flat, {})
    return {kind: value for kind, value in sorted(state.items()) if torch.is_tensor(value) and value.dim()}


def _make_moments(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give every flat master the state it has after `step` steps, all moments zero.

    A copy of the optimiser steps once on a single zero, so it says itself which moments and counters it keeps.
    """
    for group in optimizer.param_groups:
        (flat,) = group["params"]
        probe = nn.Parameter(flat.detach().new_zeros(1))
        probe.grad = torch.zeros_like(probe)
        twin = copy.copy(optimizer)
        twin.state = defaultdict(dict)
        twin.param_groups = [{**group, "params": [probe]}]
        twin.step()
        for kind, value in twin.state[probe].items():
            is_counter = torch.is_tensor(value) and not value.dim()
            optimizer.state[flat][kind] = value.fill_(step) if is_counter else torch.zeros_like(flat)


@dataclass(frozen=True)
class _Untrained:
    """A buffer or a frozen parameter."""

    name: str
    values: Tensor  # its own memory
    ours: bool  # whether this rank saves it


def _untrained(module: nn.Module) -> Iterator[_Untrained]:
    trained = {key for key, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    names = plain_names(module)
    for key, values in module.state_dict().items():
        if key not in trained:
            names_of_experts, ours, group = names[key]
            # every rank has the dense ones; of experts, each group of ranks that share them out has one set
            if len(names_of_experts) > 1:
                holders = torch_dist.get_process_group_ranks(group)
            else:
                holders = [torch_dist.get_rank()]
            yield _Untrained(names_of_experts[ours], values, ours=0 in holders)


def _own_names(module: nn.Module) -> dict[str, str]:
    """State-dict key -> plain name, in which this rank's experts have their global numbers."""
    return {key: names[ours] for key, (names, ours, _) in plain_names(module).items()}
