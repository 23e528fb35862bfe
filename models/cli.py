"""m2mkd: what a published student is, what it says of pictures, and the model as a program for other software.

    m2mkd predict images/ cat.jpg --model owner/name --top 3
    m2mkd info owner/name --json
    m2mkd export owner/name --out model.onnx

torch is imported when something is computed, so that --help is there at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from .version import VERSION

OK = 0
FAILED = 1  # the disk or the network
BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 when the disk or the network failed, 2 for bad input."""
    asked_for = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        return asked_for.run(asked_for)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="m2mkd", description="Use a V-MoE or a NAC from the Hugging Face hub or from a folder."
    )
    top.add_argument("--version", action="version", version=f"m2mkd {VERSION}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    model_help = "hub id (owner/name or owner/name@revision), or the folder of a saved model"

    predict = commands.add_parser("predict", help="the likeliest classes of pictures")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, or folders of them")
    predict.add_argument("--model", required=True, metavar="ID", help=model_help)
    predict.add_argument("--top", type=int, default=5, metavar="N", help="classes per picture (default 5)")
    predict.add_argument("--batch", type=int, default=32, metavar="N", help="pictures per forward (default 32)")
    predict.add_argument("--k", type=int, metavar="N", help="experts per token of a V-MoE (default: as it was trained)")
    predict.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    predict.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    predict.add_argument("--json", action="store_true", help="one JSON object on standard output")
    predict.set_defaults(run=_predict)

    info = commands.add_parser("info", help="what a model is: sizes, cost, images, classes")
    info.add_argument("model", metavar="ID", help=model_help)
    info.add_argument("--json", action="store_true", help="one JSON object on standard output")
    info.set_defaults(run=_info)

    export = commands.add_parser("export", help="write a model by torch.export (.pt2) or as ONNX (.onnx)")
    export.add_argument("model", metavar="ID", help=model_help)
    export.add_argument("--out", required=True, metavar="FILE", help="ends in .pt2 or .onnx")
    export.add_argument("--batch", type=int, metavar="N", help="images of every call (default: any number)")
    export.set_defaults(run=_export)
    return top


def _predict(asked_for: argparse.Namespace) -> int:
    from .predict import find_pictures, predict

    pictures = find_pictures(asked_for.images)  # before a model is fetched

    import torch

    from .students import VMoE, load

    model = load(asked_for.model, k=asked_for.k)
    try:
        device = torch.device(asked_for.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if asked_for.bf16 else torch.float32
        model = model.to(device, dtype)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {asked_for.device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    done = predict(model, pictures, top=asked_for.top, batch=asked_for.batch)
    speed = {
        "images": len(done.predictions),
        "images_per_second": round(done.images_per_second, 1),
        "images_per_second_with_reading": round(len(done.predictions) / done.seconds, 1),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": asked_for.batch,
    }
    if isinstance(model, VMoE):
        speed["experts_per_token"] = model.config.moe.k
    if asked_for.json:
        rows = []
        for prediction in done.predictions:
            classes = [vars(score) for score in prediction.classes]
            rows.append({"path": str(prediction.path), "classes": classes})
        print(json.dumps({"model": model.source, **speed, "predictions": rows}))
        return OK
    for prediction in done.predictions:
        classes = "  ".join(f"{score.label} {score.probability:.1%}" for score in prediction.classes)
        print(f"{prediction.path}  {classes}")
    experts = f", {speed['experts_per_token']} experts per token" if "experts_per_token" in speed else ""
    print(
        f"{speed['images']} images, {speed['images_per_second']:,} images/s "
        f"({speed['images_per_second_with_reading']:,} with reading them), {speed['device']}, {speed['dtype']}, batch "
        f"{speed['batch']}{experts}",
        file=sys.stderr,
    )
    return OK


def _info(asked_for: argparse.Namespace) -> int:
    from .students import about

    facts = about(asked_for.model)
    if asked_for.json:
        print(json.dumps(facts))
        return OK
    width = max(map(len, facts))
    for name, value in facts.items():
        if value is not None:
            print(f"{name.replace('_', ' ').ljust(width)}  {_readable(value)}")
    return OK


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_readable, value)) or "none"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)


def _export(asked_for: argparse.Namespace) -> int:
    from .export import FORMATS, export
    from .students import load

    if not asked_for.out.endswith(FORMATS):
        raise ValueError(f"--out {asked_for.out} ends in none of {', '.join(FORMATS)}: choose one.")
    print(export(load(asked_for.model), asked_for.out, batch=asked_for.batch))
    return OK


if __name__ == "__main__":
    sys.exit(main())
