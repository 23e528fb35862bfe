"""One request to the trainer: which phase of which recipe, spread how, written where. Checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.load import close
from trainer.config.recipe import Recipe
from trainer.request.graph import BY_EXPERT, BY_MODULE, GROWING, PHASES, artifact_name, in_one_job, taught_by_expert

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, start the same command again
EXIT_HUNG = 76  # nothing moved for run.hang_seconds
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
    module: int | None  # of a phase that goes by module; None = all of them
    out: Path
    command: str  # what was typed, kept with the results
    expert: int | None = None  # of phase expert; None = all of the module

    @classmethod
    def checked(cls, recipe: Recipe, ds_values: Mapping[str, Any], phase: str, module: int | str | None, out: Path,
                command: str, expert: int | str | None = None) -> Job:  # fmt: skip
        """A job whose phase, module and expert exist.

        Args:
            module: 0..N-1, also as text, or "all" or None for all.
            expert: 0..E-1 in the same way; phase distill with an expert is phase expert.

        Raises:
            ValueError: no such phase, module or expert, or one for a phase that takes none.
        """
        if phase not in PHASES:
            raise ValueError(f"there is no phase {phase}. {close(str(phase), list(PHASES))}")
        if phase == "all" and recipe.train.init:
            raise ValueError(
                f"train.init={recipe.train.init} takes the place of the distilled modules, so --phase all would make "
                "them for nothing: use --phase train, then --phase evaluate"
            )
        chosen = _expert(phase, expert, recipe)
        if phase == "distill" and chosen is not None:
            phase = "expert"
        if phase in (GROWING if not recipe.teacher.grown else ("teacher",)):
            raise ValueError(
                f"--phase {phase} has no meaning with teacher.grown={str(recipe.teacher.grown).lower()}: phases "
                "incubate and assemble grow a teacher where it is true, phase teacher trains one where it is false"
            )
        if phase in BY_EXPERT and not taught_by_expert(recipe):
            raise ValueError(_not_by_expert(phase, recipe))
        number = _module(phase, module, recipe.modules)
        if number is not None and in_one_job(recipe, phase):
            raise ValueError(
                f"--module {number} has no meaning with refine.order=together, which teaches all modules in one "
                "training: leave it out, or set refine.order=sequential or parallel"
            )
        return cls(recipe, ds_values, phase, number, out, command, chosen)

    @property
    def phases(self) -> list[str]:
        """The phases this job runs, in order."""
        if self.phase != "all":
            return [self.phase]
        grown = self.recipe.teacher.grown
        left_out = {"all"} | ({"teacher"} if self.recipe.teacher.source or grown else set())
        left_out |= set() if grown else set(GROWING)
        left_out |= set() if self.recipe.hub.repo else {"push"}
        left_out |= set() if self.recipe.refine.epochs else {"refine"}
        left_out |= set() if taught_by_expert(self.recipe) else set(BY_EXPERT)
        return [name for name in PHASES if name not in left_out]

    @property
    def modules(self) -> list[int]:
        """The modules a phase that goes by module works on."""
        return list(range(self.recipe.modules)) if self.module is None else [self.module]

    @property
    def experts(self) -> list[int]:
        """The experts phase expert teaches in each of its modules."""
        return list(range(self.recipe.student.moe.num_experts)) if self.expert is None else [self.expert]

    @property
    def artifacts(self) -> list[str]:
        """Names of what a single phase (not "all") makes, in order."""
        if self.phase == "expert":
            return [artifact_name("expert", i, expert=j) for i in self.modules for j in self.experts]
        if self.phase in BY_MODULE:
            return [artifact_name(self.phase, i) for i in self.modules]
        return [artifact_name(self.phase, start=self.recipe.train.start)]

    @property
    def several(self) -> bool:
        """Whether it makes several artifacts, or could: a phase that goes by module or expert, for all of them."""
        one = self.module is not None and (self.phase != "expert" or self.expert is not None)
        return self.phase == "all" or (self.phase in BY_MODULE and not one)


def _module(phase: str, module: int | str | None, count: int) -> int | None:
    if module in (None, "all"):
        return None
    if phase not in BY_MODULE:
        takers = f"{', '.join(BY_MODULE[:-1])} and {BY_MODULE[-1]}"
        raise ValueError(f"--module {module} has no meaning for --phase {phase}: only {takers} take a module")
    return _number("module", phase, module, count)


def _expert(phase: str, expert: int | str | None, recipe: Recipe) -> int | None:
    if expert in (None, "all"):
        return None
    if phase not in ("expert", "distill"):
        raise ValueError(
            f"--expert {expert} has no meaning for --phase {phase}: only expert and distill take an expert"
        )
    return _number("expert", phase, expert, recipe.student.moe.num_experts)


def _number(flag: str, phase: str, given: int | str, count: int) -> int:
    if not str(given).isascii() or not str(given).isdecimal() or int(given) >= count:
        raise ValueError(f"--phase {phase} needs --{flag} 0..{count - 1} or all, got {given}")
    return int(given)


def _not_by_expert(phase: str, recipe: Recipe) -> str:
    if recipe.distill.source:
        return f"--phase {phase} has no meaning with distill.source={recipe.distill.source}: its modules come whole"
    return (
        f"--phase {phase} needs distill.level=expert; here it is {recipe.distill.level}, which teaches modules whole: "
        "set it, or use --phase distill"
    )
