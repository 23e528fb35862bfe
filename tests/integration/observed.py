"""What a real optimiser step asks of torch.distributed, seen below it: every c10d operator, its bytes and its ranks.

The function runs on the ranks, in forks of one warm python:  warm.call("tests.integration.observed:train", folder, ...)
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

STEP = 2  # the step that is looked at: the first one also builds groups and buffers
# operator -> (kind of call, which argument has the bytes)
KINDS = {
    "allreduce_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "alltoall_base_": ("all_to_all", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
}


class Collectives(TorchDispatchMode):
    """Adds up what passes: (kind, ranks) -> calls and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            kind, place = KINDS[func._schema.name.removeprefix("c10d::")]
            groups = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
            total = self.seen[kind, torch.distributed.ProcessGroup.unbox(groups[0]).size()]
            total[0] += 1
            total[1] += _bytes(args[place])
        return func(*args, **(kwargs or {}))


def train(folder: str, *arguments: str) -> int:
    """trainer.run.main(arguments); FOLDER/<result>_<rank>.json tells of one step of each training."""
    from trainer.loop.step import TrainStep
    from trainer.run import main

    steps: dict[str, int] = defaultdict(int)
    run = TrainStep.run

    def observed(self: TrainStep, *positional: Any, **named: Any) -> bool:
        name = self.task.phase
        steps[name] += 1
        if steps[name] != STEP:
            return run(self, *positional, **named)
        with Collectives() as collectives:
            made = run(self, *positional, **named)
        seen = [[*key, *total] for key, total in sorted(collectives.seen.items())]
        (Path(folder) / f"{name}_{os.environ['RANK']}.json").write_text(json.dumps(seen))
        return made

    TrainStep.run = observed
    return main(list(arguments))


def _bytes(tensors: Any) -> int:
    """Of a tensor, or of all in nested lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))
