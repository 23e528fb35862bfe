"""One request to the trainer: which phase of which recipe, spread how, written where. Checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import close
from trainer.interrupt import EXIT_HUNG, EXIT_INTERRUPTED
from trainer.schema import Recipe

PHASES = {
    "teacher": "train a small ViT as the teacher; only for recipes without teacher.source",
    "meta": "train the meta model, N shallow stages of the teacher's width",
    "distill": "teach student module --module i (or all of them) inside the frozen meta model",
    "train": "put the modules together and train the student end to end; train.start=scratch leaves out the teaching",
    "evaluate": "load the trained student as a user would and measure it on every validation image",
    "push": "push the student (or every stage, see hub.stages) to hub.repo with a model card",
    "all": "all of these one after another, baselines and report included; push only when hub.repo is set",
}
EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
EXIT_CODES = {
    0: "done: the phase is complete, or was complete already",
    EXIT_FAILED: "failed: the message says at what; the last checkpoint is complete",
    EXIT_BAD_INPUT: "bad input: flags, recipe, DeepSpeed JSON, data, teacher or an earlier phase's result",
    EXIT_INTERRUPTED: "interrupted by a warning signal (SIGUSR1, SIGTERM) and saved: the same command continues",
    EXIT_HUNG: "nothing moved for run.hang_seconds: the stacks are in the log, the last checkpoint is complete",
}


@dataclass(frozen=True)
class Job:
    """A checked request."""

    recipe: Recipe
    ds_values: Mapping[str, Any]  # the DeepSpeed JSON as read, "auto" included
    phase: str
    module: int | None  # of phase distill; None = all of them
    out: Path
    command: str  # what was typed, kept with the results

    @classmethod
    def checked(cls, recipe: Recipe, ds_values: Mapping[str, Any], phase: str, module: int | str | None, out: Path,
                command: str) -> Job:  # fmt: skip
        """A job whose phase and module exist.

        Args:
            module: 0..N-1, also as text, or "all" or None for all.

        Raises:
            ValueError: no such phase or module, or a module for a phase that takes none.
        """
        if phase not in PHASES:
            raise ValueError(f"there is no phase {phase}. {close(str(phase), list(PHASES))}")
        if phase == "all" and recipe.train.init:
            raise ValueError(
                f"train.init={recipe.train.init} takes the place of the distilled modules, so --phase all would make "
                "them for nothing: use --phase train, then --phase evaluate"
            )
        return cls(recipe, ds_values, phase, _module(phase, module, recipe.modules), out, command)

    @property
    def phases(self) -> list[str]:
        """The phases this job runs, in order."""
        if self.phase != "all":
            return [self.phase]
        left_out = {"all"} | ({"teacher"} if self.recipe.teacher.source else set())
        left_out |= set() if self.recipe.hub.repo else {"push"}
        return [name for name in PHASES if name not in left_out]

    @property
    def modules(self) -> list[int]:
        """The modules phase distill trains."""
        return list(range(self.recipe.modules)) if self.module is None else [self.module]


def _module(phase: str, module: int | str | None, count: int) -> int | None:
    if module in (None, "all"):
        return None
    if phase != "distill":
        raise ValueError(f"--module {module} has no meaning for --phase {phase}: only distill takes a module")
    if not str(module).isascii() or not str(module).isdecimal() or int(module) >= count:
        raise ValueError(f"--phase distill needs --module 0..{count - 1} or all, got {module}")
    return int(module)
