"""One request to the trainer: which phase of which recipe, spread how, written where. Checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.knobs import close
from trainer.config.recipe import Recipe
from trainer.config.tasks import parse_tasks
from trainer.request import graph
from trainer.request.graph import ALL

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
    def checked(
        cls,
        recipe: Recipe,
        ds_values: Mapping[str, Any],
        phase: str,
        module: int | str | None,
        out: Path,
        command: str,
        expert: int | str | None = None,
    ) -> Job:
        """A job whose phase, module and expert exist and have a meaning in this recipe.

        Args:
            module: 0..N-1, also as text, or "all" or None for all.
            expert: 0..E-1 in the same way; phase distill with an expert is phase expert.

        Raises:
            ValueError: no such phase, module, expert or evaluation, or one for a phase that takes none.
        """
        known = graph.phase_help()
        if phase not in known:
            raise ValueError(f"there is no phase {phase}. {close(str(phase), list(known))}")
        if phase == ALL and recipe.train.init:
            raise ValueError(
                f"train.init={recipe.train.init} takes the place of the distilled modules, so --phase all would make "
                "them for nothing: use --phase train, then --phase evaluate"
            )
        parse_tasks(recipe.evaluate.tasks)
        expert_number = _expert(phase, expert, recipe)
        if phase == "distill" and expert_number is not None:
            phase = "expert"
        if phase != ALL and (why := graph.row_of(phase).refused(recipe)):
            raise ValueError(why)
        module_number = _module(phase, module, recipe.modules)
        if module_number is not None and graph.in_one_job(recipe, phase):
            raise ValueError(
                f"--module {module_number} has no meaning with {phase}.order={getattr(recipe, phase).order}, which "
                f"makes all modules at once: leave it out, or set {phase}.order=sequential or parallel"
            )
        return cls(recipe, ds_values, phase, module_number, out, command, expert_number)

    @property
    def phases(self) -> list[str]:
        """The phases this job runs, in order."""
        if self.phase == ALL:
            return [row.name for row in graph.taking_part(self.recipe)]
        return [self.phase]

    @property
    def modules(self) -> list[int]:
        """The modules a phase that goes by module works on."""
        if self.module is None:
            return list(range(self.recipe.modules))
        return [self.module]

    @property
    def experts(self) -> list[int]:
        """The experts phase expert teaches in each of its modules."""
        if self.expert is None:
            return list(range(self.recipe.student.moe.num_experts))
        return [self.expert]

    @property
    def artifacts(self) -> list[str]:
        """Names of what a single phase (not "all") makes, in order."""
        repeated = graph.row_of(self.phase).repeated
        if repeated == "expert":
            return [
                graph.artifact_name(self.phase, module, expert=expert)
                for module in self.modules
                for expert in self.experts
            ]
        if repeated == "module":
            return [graph.artifact_name(self.phase, module) for module in self.modules]
        return [graph.artifact_name(self.phase, start=self.recipe.train.start)]

    @property
    def several(self) -> bool:
        """Whether it makes several artifacts, or could: a phase that goes by module or expert, for all of them."""
        if self.phase == ALL:
            return True
        repeated = graph.row_of(self.phase).repeated
        if repeated == "expert":
            return self.module is None or self.expert is None
        return repeated == "module" and self.module is None


def _module(phase: str, module: int | str | None, count: int) -> int | None:
    if module in (None, "all"):
        return None
    takers = graph.by_module()
    if phase not in takers:
        listed = f"{', '.join(takers[:-1])} and {takers[-1]}"
        raise ValueError(f"--module {module} has no meaning for --phase {phase}: only {listed} take a module")
    return _number("module", phase, module, count)


def _expert(phase: str, expert: int | str | None, recipe: Recipe) -> int | None:
    if expert in (None, "all"):
        return None
    if phase not in ("expert", "distill"):
        raise ValueError(
            f"--expert {expert} has no meaning for --phase {phase}: only expert and distill take an expert"
        )
    return _number("expert", phase, expert, recipe.student.moe.num_experts)


def _number(flag: str, phase: str, text: int | str, count: int) -> int:
    is_number = str(text).isascii() and str(text).isdecimal()
    if not is_number or int(text) >= count:
        raise ValueError(f"--phase {phase} needs --{flag} 0..{count - 1} or all, got {text}")
    return int(text)
