"""Sections run and hub: what the loop writes and how often, and where results are pushed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.knobs import knob, require

MADE_OF = ("teacher", "data", "ds_config", "code")  # what is compared (trainer/made_of.py)
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True)
class RunConfig:
    """What the loop writes, and how often."""

    log_every: int = knob(20, "optimiser steps between metrics rows and progress lines")
    eval_every: int = knob(1, "epochs between evaluations; the last epoch is always evaluated")
    save_every: int = knob(1000, "optimiser steps between checkpoints; every epoch's end is one too, see save_epochs")
    save_epochs: int = knob(1, "epochs between checkpoints at an epoch's end")
    keep: int = knob(2, "newest checkpoints kept per phase")
    keep_best: bool = knob(False, "keep the checkpoint of the best evaluation as well")
    keep_every: int = knob(0, "keep every checkpoint whose step is a multiple of this as well; 0 = none")
    eval_batch: int = knob(0, "images per rank in evaluation; 0 = the micro-batch")
    deterministic: bool = knob(False, "deterministic GPU kernels, slower in MoE dispatch; the CPU always has them")
    trackers: tuple[str, ...] = knob(
        ("auto",),
        "where metrics go beside metrics.jsonl: tensorboard, wandb, mlflow, trackio; auto = TensorBoard if there",
    )
    hang_seconds: float = knob(1800.0, "seconds without a finished step after which a rank ends itself; 0 = never")
    on_nonfinite: Literal["stop", "skip", "rollback"] = knob(
        "stop",
        "a loss or gradient that is no number: stop, leave that step out, or go back to the last checkpoint",
    )
    max_nonfinite: int = knob(10, "such steps in a phase (likewise rollbacks after a spike) before it stops after all")
    spike_factor: float = knob(
        10.0, "a row's loss this many robust standard deviations above the rows before is a spike; 0 = no check"
    )
    on_spike: Literal["warn", "rollback"] = knob("warn", "warn of a spike, or go back to the last checkpoint")
    dead_after: int = knob(5, "rows of metrics without tokens after which an expert is reported as dead; 0 = never")
    accept: tuple[str, ...] = knob(
        (),
        "go on although this differs from what made the inputs or began the result: teacher, data, ds_config, code",
    )

    def __post_init__(self):
        for name in ("log_every", "eval_every", "save_every", "save_epochs", "keep"):
            value = getattr(self, name)
            require(value >= 1, f"run.{name}", value, "1 or more")
        require(self.keep_every >= 0, "run.keep_every", self.keep_every, "0 (none) or a number of steps")
        require(self.hang_seconds >= 0, "run.hang_seconds", self.hang_seconds, "0 (never) or seconds")
        require(self.max_nonfinite >= 0, "run.max_nonfinite", self.max_nonfinite, "0 or more")
        require(self.spike_factor >= 0, "run.spike_factor", self.spike_factor, "0 (no check) or a positive factor")
        require(self.dead_after >= 0, "run.dead_after", self.dead_after, "0 (never) or a number of rows")
        require(self.eval_batch >= 0, "run.eval_batch", self.eval_batch, "0 (the micro-batch) or more")
        for name in self.trackers:
            require(name in ("auto", *TRACKERS), "run.trackers", name, "auto, " + ", ".join(TRACKERS))
        for name in self.accept:
            require(name in MADE_OF, "run.accept", name, ", ".join(MADE_OF))


@dataclass(frozen=True)
class HubConfig:
    """Where results are pushed on the hub. The token comes from HF_TOKEN or `hf auth login`, never from here."""

    repo: str = knob("", "owner/name to push to; empty = nothing is pushed")
    revision: str = knob("main", "branch to push to; made when it does not exist")
    private: bool = knob(True, "whether a repo that has to be created is private")
    stages: Literal["last", "all"] = knob(
        "last", "push the trained student only, or also meta model and distilled modules"
    )
    license: str = knob("", "licence of the student, as the hub spells it (apache-2.0, mit, ...); empty = not stated")
