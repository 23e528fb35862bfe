"""Ranks as threads and a training state without DeepSpeed, for the tests of checkpoints.

finished = run_ranks(2, lambda dist: saver(dist, folder).save(...))
"""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trainer.checkpoint.files import complete, step_of
from trainer.checkpoint.saver import Saver
from trainer.config.runtime import RunConfig
from trainer.distributed.ranks import Dist
from trainer.distributed.zero_state import Piece

SHAPES = {"head.weight": (4, 3), "blocks.0.mlp.experts.1.fc1.bias": (5,), "scale": (), "steps": (2,)}
TRAINED = ("head.weight", "blocks.0.mlp.experts.1.fc1.bias", "scale")
State = dict[tuple[str, str], torch.Tensor]  # (kind, name) -> flattened values


class Meeting:
    """Where the threads exchange values, as ranks do in a gather."""

    def __init__(self, world: int):
        self.values: list[Any] = [None] * world
        self.barrier = threading.Barrier(world)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = copy.deepcopy(value)
        self.barrier.wait(20)
        values = list(self.values)
        self.barrier.wait(20)
        return values


@dataclass(frozen=True)
class ThreadDist(Dist):
    """A rank that is a thread of this process."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.gather(self.rank, value)


def run_ranks(world: int, work: Callable[[Dist], Any]) -> list[Any]:
    """What `work` returned on every rank, or the exception it raised."""
    results: list[Any] = [None] * world
    meeting = Meeting(world)

    def rank(number: int) -> None:
        try:
            results[number] = work(ThreadDist(number, world, number, world, torch.device("cpu"), meeting))
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank waits for ever"
    return results


def state_at(step: int) -> State:
    """A training state; every element of every kind is another number."""
    state, first = {}, 1000.0 * step
    for kind in ("fp32", "exp_avg", "exp_avg_sq"):
        for name in TRAINED:
            count = torch.Size(SHAPES[name]).numel()
            state[kind, name] = torch.arange(first, first + count)
            first += count
    state["state", "steps"] = torch.tensor([step, 2 * step])
    return state


class Held:
    """Stands for the DeepSpeed engine of a rank: an even share of every trained tensor, on rank 0 also the buffer."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.steps, self.values = rank, world, 0, {}
        self.fill(state_at(0))

    def share(self, kind: str, values: torch.Tensor) -> slice:
        cut = [len(values) * rank // self.world for rank in (self.rank, self.rank + 1)]
        return slice(0, len(values)) if kind == "state" else slice(*cut)

    def fill(self, state: State) -> None:
        """Hold this rank's share of a state."""
        for (kind, name), values in state.items():
            part = self.share(kind, values)
            self.values[kind, name] = part.start, values[part].clone()

    def pieces(self, beside: dict) -> list[Piece]:
        assert not beside
        kept = {key: value for key, value in self.values.items() if key[0] != "state" or self.rank == 0}
        return [Piece(kind, name, start, values) for (kind, name), (start, values) in kept.items() if len(values)]

    def restore(self, read: Callable[..., torch.Tensor], step: int) -> None:
        for (kind, name), (start, values) in self.values.items():
            values.copy_(read(kind, name, start, start + len(values)))
        self.steps = step


def without_deepspeed(monkeypatch) -> None:
    """Let trainer.zero_state take a Held for an engine."""
    monkeypatch.setattr("trainer.distributed.zero_state.pieces", Held.pieces)
    monkeypatch.setattr(
        "trainer.distributed.zero_state.restore", lambda held, read, *, step, beside: held.restore(read, step)
    )
    monkeypatch.setattr("trainer.distributed.zero_state.shapes", lambda held: getattr(held, "shapes", SHAPES))
    monkeypatch.setattr("trainer.distributed.zero_state.optimizer_steps", lambda held: held.steps)


def saver(dist: Dist, folder: Path, batch: int = 8, **run: Any) -> Saver:
    """A Saver of a phase around a Held."""
    settings = SimpleNamespace(ep_size=1, bf16=False, global_batch=batch, micro_batch=batch // dist.world,
                               accumulation=1, config={"zero_optimization": {"stage": 1}})  # fmt: skip
    engine = SimpleNamespace(deepspeed=Held(dist.rank, dist.world), settings=settings, beside_masters={})
    return Saver(engine, folder, RunConfig(**run), dist)


def save(made: Saver, step: int, **options: Any) -> None:
    """Save the state of a step."""
    made.engine.deepspeed.fill(state_at(step))
    made.engine.deepspeed.steps = step
    made.save(step, **{"state": {"seconds": step / 3}, "own": {"count": 10 * step + made.dist.rank}} | options)


def assert_holds(made: Saver, step: int) -> None:
    """The engine is in the state of a step."""
    held = made.engine.deepspeed
    assert held.steps == step
    for (kind, name), wanted in state_at(step).items():
        values = held.values[kind, name][1]
        assert torch.equal(values, wanted[held.share(kind, wanted)]) and values.dtype == wanted.dtype, (kind, name)


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return [step_of(path) for path in complete(folder / "checkpoints")]


def resumed_step(folder: Path, world: int = 1) -> int | None:
    """Where a new start goes on; checks that it is in the state of that step."""

    def work(dist):
        made = saver(dist, folder)
        if (found := made.resume()) is None:
            return None
        assert_holds(made, found.step)
        return found.step

    (step,) = set(run_ranks(world, work))
    return step


def save_steps(folder: Path, *numbers: int, world: int = 1, **run) -> None:
    def work(dist):
        made = saver(dist, folder, **run)
        made.resume()
        for number in numbers:
            save(made, number)
        made.close()

    assert run_ranks(world, work) == [None] * world
