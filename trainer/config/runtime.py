"""Sections run and hub: what the loop writes and how often, and where results are pushed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.knobs import MANY, WEIGHT, Range, check_ranges, knob, require

MADE_OF = ("teacher", "data", "ds_config", "code")  # what is compared (trainer/made_of.py)
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True)
class RunConfig:
    """What the loop writes, and how often."""

    log_every: int = knob(20, "optimiser steps between metrics rows and progress lines", Range(1, MANY))
    eval_every: int = knob(1, "epochs between evaluations; the last epoch is always evaluated", Range(1, MANY))
    save_every: int = knob(
        1000, "optimiser steps between checkpoints; every epoch's end is one too, see save_epochs", Range(1, MANY)
    )
    save_epochs: int = knob(1, "epochs between checkpoints at an epoch's end", Range(1, MANY))
    keep: int = knob(2, "newest checkpoints kept per phase", Range(1, MANY))
    keep_best: bool = knob(False, "keep the checkpoint of the best evaluation as well")
    keep_every: int = knob(
        0, "keep every checkpoint whose step is a multiple of this as well; 0 = none", Range(0, MANY)
    )
    eval_batch: int = knob(
        0,
        "images per rank and forward in evaluation, without a say in its result; 0 = the micro-batch",
        Range(0, 1_000_000),
    )
    inference: bool = knob(
        True,
        "phase evaluate also measures, for the model card, images per second and accuracy in each form of the student "
        "(a V-MoE with 1, 2 and 4 experts per token; a NAC with all, 50, 25 and 10% of its mediators) beside the "
        "teacher and, of a V-MoE, a dense ViT of equal FLOPs",
    )
    deterministic: bool = knob(False, "deterministic GPU kernels, slower in MoE dispatch; the CPU always has them")
    trackers: tuple[str, ...] = knob(
        ("auto",),
        "where metrics go beside metrics.jsonl: tensorboard, wandb, mlflow, trackio; auto = TensorBoard if there",
    )
    hang_seconds: float = knob(
        1800.0, "seconds without a finished step after which a rank ends itself; 0 = never", Range(0, 10_000_000)
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = knob(
        "stop",
        "a loss or gradient that is no number: stop, leave that step out, or go back to the last checkpoint",
    )
    max_nonfinite: int = knob(
        10, "such steps in a phase (likewise rollbacks after a spike) before it stops after all", Range(0, MANY)
    )
    spike_factor: float = knob(
        10.0, "a row's loss this many robust standard deviations above the rows before is a spike; 0 = no check", WEIGHT
    )
    on_spike: Literal["warn", "rollback"] = knob("warn", "warn of a spike, or go back to the last checkpoint")
    dead_after: int = knob(
        5, "rows of metrics without tokens after which an expert is reported as dead; 0 = never", Range(0, MANY)
    )
    compile: bool = knob(
        False, "torch.compile attention and dense MLPs of every block: minutes at the start, needs a C++ compiler"
    )
    profile: int = knob(
        0, "optimiser steps of rank 0 to look into: OUT/PHASE/profile has a table and a trace; 0 = none", Range(0, 1000)
    )
    accept: tuple[str, ...] = knob(
        (),
        "go on although this differs from what made the inputs or began the result: teacher, data, ds_config, code",
    )

    def __post_init__(self):
        check_ranges(self, "run.")
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
    stages: Literal["last", "all", "detector"] = knob(
        "last",
        "push the trained student only; all = also meta model and distilled modules; detector = what detect made",
    )
    code: bool = knob(
        False,
        "also push one file with the model's code, for transformers without this package (trust_remote_code=True)",
    )
    code_url: str = knob(
        "",
        "address of the code for the model card: a git repository, or a wheel of m2mkd; empty = the git remote origin",
    )
    license: str = knob("", "licence of the student, as the hub spells it (apache-2.0, mit, ...); empty = not stated")

    def __post_init__(self):
        if self.code_url:
            known = "an address such as https://github.com/OWNER/NAME or https://HOST/m2mkd-0.2.0-py3-none-any.whl"
            require("://" in self.code_url, "hub.code_url", self.code_url, known)
