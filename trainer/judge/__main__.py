"""Judge models:  python -m trainer.judge MODEL [MODEL ...] --tasks TASK [TASK ...] [--data DATA]

    python -m trainer.judge runs/demo runs/demo/teacher --tasks accuracy corruptions fewshot:ways=5,shots=5 knn

One table on standard output; with --out also judged.json and report.html. The same numbers on any number of ranks:
torchrun --nproc_per_node 2 -m trainer.judge ...
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.data import DataConfig
from trainer.config.evaluate import PRESETS, SETTINGS
from trainer.config.knobs import SEEDS, Range, require
from trainer.config.load import one_line
from trainer.config.redaction import redact, refuse_secrets
from trainer.config.tasks import TaskSpec, parse_task, parse_tasks
from trainer.distributed.launchers import ranks_from_environment
from trainer.report.judged import JUDGED, judged_page, judged_text
from trainer.request.job import EXIT_BAD_INPUT, EXIT_FAILED
from trainer.tracking.console import quieten, set_up_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge, and return the exit code: 0, 1 when disk or network failed, 2 for bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    try:
        refuse_secrets(words, "the command line")
        rank = ranks_from_environment()["rank"]
        data = _data(options.data)
        specs = parse_tasks(options.tasks)
        for name, value, limits in (
            ("--batch", options.batch, Range(1, 1_000_000)),
            ("--workers", options.workers, Range(0, 1024)),
            ("--seed", options.seed, Range(0, SEEDS)),
            ("--resamples", options.resamples, Range(100, 1_000_000)),
        ):
            require(limits.holds(value), name, value, str(limits))
    except ValueError as error:
        return _failed(error)
    quieten()
    set_up_logging(rank == 0)
    try:
        _judge(options, specs, data)
    except (ValueError, OSError) as error:
        if rank == 0:
            return _failed(error)
        return EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.judge",
        description="One table of models by evaluations, with 95%% intervals (docs/evaluations.md).",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="folder of a run, of its student or teacher or of a saved model; hub id; name of a timm model",
    )
    known = f"{', '.join(SETTINGS)}, or a known set: {', '.join(PRESETS)}"
    parser.add_argument(
        "--tasks", nargs="+", default=["accuracy"], metavar="TASK", help=f"NAME[:key=value,...]; {known}"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="DATA",
        help="images where a task names none: folder, hub id, digits, fractals or textures, then data.key=value",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for {JUDGED} and report.html")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument(
        "--batch", type=int, default=32, metavar="N", help="images a rank loads at a time; changes no number"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes per rank that load images")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of corruptions, episodes and intervals")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the images, for the intervals")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--no-cache", action="store_true", help="keep no features for later commands")
    return parser


def _data(words: Sequence[str]) -> DataConfig:
    """Section data, read like the settings of an evaluation."""
    settings = []
    for word in words:
        is_key = word.startswith("data.") and "=" in word
        settings.append(word if is_key else f"data={word}")
    spec = parse_task("knn:" + ",".join(settings))
    return spec.data(DataConfig())


def _judge(options: argparse.Namespace, specs: Sequence[TaskSpec], data: DataConfig) -> None:
    import torch

    import models  # noqa: F401  first: it mends torchvision beside a CPU torch
    from trainer.disk import write_json, write_text
    from trainer.distributed import ranks
    from trainer.judge.outputs import Bench, cache_folder
    from trainer.judge.subjects import load_subjects
    from trainer.judge.table import judge

    dist = ranks.start_light()
    try:
        with dist.together():
            subjects = load_subjects(options.models)
        bench = Bench(
            dist,
            data,
            dtype=torch.bfloat16 if options.bf16 else torch.float32,
            batch=options.batch,
            workers=options.workers,
            seed=options.seed,
            resamples=options.resamples,
            cache=None if options.no_cache else cache_folder(),
        )
        judged = judge(subjects, specs, bench)
        if not dist.main:
            return
        print(json.dumps(judged) if options.json else judged_text(judged), flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            write_json(options.out / JUDGED, judged)
            write_text(options.out / "report.html", judged_page(judged))
    finally:
        ranks.stop()


def _failed(error: Exception) -> int:
    print(f"error: {redact(one_line(error))}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
