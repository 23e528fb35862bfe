"""The one entry of the trainer: parse, start distributed, call one phase, exit code.

    deepspeed --num_gpus 2 trainer/run.py --ds_config ds_configs/cpu_debug.json --recipe recipes/demo.yaml \\
        --phase all --out runs/demo [section.key=value ...]

The same under torchrun, srun and plain python. Nothing imports this file.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import NoReturn

if not __package__:  # started as a file: put the repository, not trainer/, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from trainer import interrupt
from trainer.config import build, load_recipe, one_line
from trainer.ds_config import read_ds_config
from trainer.schema import Recipe

PHASES = ("teacher", "meta", "distill", "train", "evaluate", "all")
EXIT_BAD_INPUT, EXIT_FAILED = 2, 1


def main(arguments: list[str] | None = None) -> int:
    """Run one phase and return the exit code: 0 only when the phase is complete."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parse(arguments)
        recipe, ds_values, phase, module = _read(options)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0" and os.environ.get("SLURM_PROCID", "0") == "0":
            print(f"error: {error}", file=sys.stderr)  # the same on every rank: said once
        return EXIT_BAD_INPUT
    return _run(recipe, ds_values, phase, module, Path(options.out), arguments)


def _run(recipe: Recipe, ds_values: dict, phase: str, module: int | str | None, out: Path, arguments: list[str]) -> int:
    interrupt.listen()
    _quieten()
    import models  # noqa: F401  first: it mends torchvision beside a CPU torch
    from trainer import dist as distributed
    from trainer.loop import NonFiniteLoss

    rank, code = int(os.environ.get("RANK", 0)), EXIT_FAILED
    try:
        dist = distributed.start()
        rank = dist.rank
        _set_up_logging(dist.main)
        from trainer.context import Run

        command = ["trainer/run.py", *(a for a in arguments if not a.startswith("--local_rank"))]
        run = Run(recipe, ds_values, out, dist, shlex.join(command))
        _call(run, phase, module)
        code = 0
    except interrupt.Interrupted as stop:
        if rank == 0:
            print(stop, file=sys.stderr, flush=True)
        code = interrupt.EXIT_INTERRUPTED
    except (ValueError, OSError, NonFiniteLoss, RuntimeError) as error:
        expected = isinstance(error, ValueError | OSError | NonFiniteLoss)
        if not expected:
            logging.getLogger(__name__).exception("phase %s failed", phase)
        if rank == 0 or not isinstance(error, distributed.Agreed | NonFiniteLoss):
            prefix = "" if rank == 0 else f"[rank {rank}] "
            print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        code = EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED
    if code in (0, interrupt.EXIT_INTERRUPTED):
        distributed.stop()
    return code


def _call(run, phase: str, module: int | str | None) -> None:
    """One phase, or the chain in this process group."""
    from trainer import preflight
    from trainer.phases import distill, evaluate, meta, teacher, train

    recipe = run.recipe
    modules = range(recipe.modules) if module in ("all", None) else (module,)
    steps = {
        "teacher": [lambda: teacher.run(run)],
        "meta": [lambda: meta.run(run)],
        "distill": [lambda i=i: distill.run(run, i) for i in modules],
        "train": [lambda: train.run(run, recipe.train.start)],
        "evaluate": [lambda: evaluate.run(run, recipe.train.start)],
    }
    phases = [phase] if phase != "all" else [name for name in steps if name != "teacher" or not recipe.teacher.source]
    with run.dist.together():
        preflight.check(run, phases)
    interrupt.HEARTBEAT.watch(recipe.run.hang_seconds)  # from here on: what came before may be a download of hours
    if phase != "all":
        for step in steps[phase]:
            step()
        return
    baselines = [lambda start=start: train.run(run, start) for start in recipe.train.baselines]
    chain = ([] if recipe.teacher.source else steps["teacher"]) + steps["meta"] + steps["distill"]
    for step in chain + steps["train"] + baselines + steps["evaluate"]:
        step()
    if run.dist.main:
        from trainer.report import write_report

        print(write_report(run.out), flush=True)


class _Parser(argparse.ArgumentParser):
    """Its errors are ValueErrors, so that a wrong flag is reported like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="trainer/run.py",
        description="m2mKD: teach a modular student module by module, then train it end to end.",
        epilog="section.key=value overrides the recipe, ds.section.key=value the DeepSpeed JSON.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help="recipes/*.yaml: what is trained")
    parser.add_argument("--ds_config", help="ds_configs/*.json: how it is spread over ranks")
    parser.add_argument("--phase", choices=PHASES, help="one phase, or all of them in this process group")
    parser.add_argument("--module", help="phase distill: module 0..N-1, or all (default)")
    parser.add_argument("--out", help="folder of the run; phases find each other's results there")
    parser.add_argument("--config", help="repeat a phase from its saved OUT/PHASE/config.yaml")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options, unknown = parser.parse_known_intermixed_args(arguments)  # overrides may stand between the flags
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=2)
        parser.error(f"unknown flag {unknown[0]}." + (f" Did you mean {' or '.join(near)}?" if near else " See --help"))
    if not options.out:
        parser.error("--out is missing: give the folder of the run, e.g. --out runs/demo")
    if not options.config and not (options.recipe and options.ds_config and options.phase):
        parser.error("--recipe, --ds_config and --phase are needed (or --config OUT/PHASE/config.yaml to repeat one)")
    return options


def _read(options: argparse.Namespace) -> tuple[Recipe, dict, str, int | str | None]:
    """Everything that can be checked without torch."""
    ds_overrides = [text for text in options.overrides if text.startswith("ds.")]
    overrides = [text for text in options.overrides if not text.startswith("ds.")]
    if options.config:
        if overrides or ds_overrides or options.recipe or options.ds_config:
            raise ValueError("--config repeats a saved phase as it was: leave out --recipe, --ds_config and overrides")
        recipe, ds_values, saved = _saved(Path(options.config))
        phase, module = options.phase or saved["phase"], options.module or saved.get("module")
    else:
        recipe, phase, module = load_recipe(options.recipe, overrides), options.phase, options.module
        ds_values = read_ds_config(options.ds_config, ds_overrides)
    return recipe, ds_values, phase, _module(phase, module, recipe.modules)


def _saved(path: Path) -> tuple[Recipe, dict, dict]:
    if not path.is_file():
        raise ValueError(f"no saved configuration at {path}: expected OUT/PHASE/config.yaml of an earlier run")
    try:
        saved = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(saved, dict) or not {"phase", "recipe", "ds_config"} <= saved.keys():
        raise ValueError(f"{path} is not a saved configuration: expected phase, recipe and ds_config, as a run writes")
    return build(Recipe, saved["recipe"]), saved["ds_config"], saved


def _module(phase: str, module: int | str | None, count: int) -> int | str | None:
    if phase != "distill":
        if module not in (None, "all"):
            raise ValueError(f"--module {module} has no meaning for --phase {phase}: only distill takes a module")
        return None
    if module in (None, "all"):
        return "all"
    if not str(module).isdecimal() or int(module) >= count:
        raise ValueError(f"--phase distill needs --module 0..{count - 1} or all, got {module}")
    return int(module)


def _quieten() -> None:
    """Keep what is not about this run out of its log: one deprecation of DeepSpeed's, and bars drawn into files."""
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _set_up_logging(main: bool) -> None:
    logging.basicConfig(level=logging.INFO if main else logging.ERROR, format="%(levelname)s %(message)s", force=True)
    for name in ("DeepSpeed", "deepspeed", "httpx", "httpx2", "huggingface_hub", "transformers", "timm"):
        logging.getLogger(name).setLevel(logging.WARNING if main else logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
