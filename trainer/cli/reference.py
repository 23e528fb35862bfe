"""docs/reference.md from the schema, the flags and the docstrings: python -m trainer.cli.reference

tests/unit/test_manual.py fails when the file is not what this module writes.
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path
from typing import Any

import trainer
from trainer.cli import flags, manual
from trainer.config.ds_config import PASSED_ON, REFUSED, TRAINER_KEYS
from trainer.request.graph import phase_help
from trainer.request.job import EXIT_CODES

FILE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"
HEAD = """# Reference

Written by `python -m trainer.cli.reference` from the code; change the code, not this file.
The same on the command line: `trainer/run.py --help`, `--help SECTION`, `--help all`.
"""


def text() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_command_line(), *_recipe(), *_deepspeed(), *_python()])


def _command_line() -> list[str]:
    lines = ["## Command line", "", "| flag | meaning |", "|---|---|"]
    for action in flags.parser()._actions:
        if action.help != argparse.SUPPRESS:
            lines.append(_row(f"`{', '.join(action.option_strings)}`", action.help))
    lines += ["", "| phase | what it does |", "|---|---|"]
    lines += [_row(f"`--phase {name}`", what) for name, what in phase_help().items()]
    lines += ["", "| command | what it does |", "|---|---|"]
    lines += [_row(f"`{usage}`", what) for usage, what in manual.COMMANDS.values()]
    lines += ["", "| exit code | meaning |", "|---|---|"]
    lines += [_row(str(code), meaning) for code, meaning in EXIT_CODES.items()]
    return [*lines, ""]


def _recipe() -> list[str]:
    lines = ["## Recipe", ""]
    for name, cls in manual.sections().items():
        lines += [f"### {name}", "", inspect.cleandoc(cls.__doc__), ""]
        lines += ["| key | default | type | meaning |", "|---|---|---|---|"]
        for key in manual.keys(name):
            lines.append(_row(f"`{key.name}`", f"`{manual.plain(key.default)}`", key.type, key.help))
        lines.append("")
    return lines


def _deepspeed() -> list[str]:
    lines = ["## DeepSpeed JSON", "", 'Where a value is `"auto"` the recipe\'s phase fills it in. Our own section:', ""]
    lines += ["| key | meaning |", "|---|---|"]
    lines += [_row(f"`trainer.{key}`", what) for key, what in TRAINER_KEYS.items()]
    passed_on = ", ".join(f"`{key}`" for key in PASSED_ON)
    lines += ["", f"Passed on to DeepSpeed: {passed_on}.", "", "Refused:", ""]
    lines += [f"- `{key}`: {why}" for key, why in REFUSED.items()]
    return [*lines, ""]


def _python() -> list[str]:
    from models.nac import NAC
    from models.teacher.load import load_teacher
    from models.vmoe import model
    from models.vmoe.importers import import_checkpoint

    lines = ["## Python", "", inspect.getdoc(inspect.getmodule(trainer.run_phase)), ""]
    for name in trainer.__all__:
        lines += _documented(f"trainer.{name}", getattr(trainer, name))
    lines += ["Models need no trainer and no DeepSpeed:", ""]
    lines += _documented("models.vmoe.VMoE.from_pretrained", model.VMoE.from_pretrained)
    lines += _documented("models.vmoe.VMoE.save_pretrained", model.VMoE.save_pretrained)
    lines += _documented("models.vmoe.load_expert_parallel", model.load_expert_parallel)
    lines += _documented("models.nac.NAC.forward", NAC.forward)
    lines += _documented("models.nac.NAC.pruned", NAC.pruned)
    lines += _documented("models.teacher.load_teacher", load_teacher)
    lines += _documented("models.vmoe.importers.import_checkpoint", import_checkpoint)
    return lines


def _documented(name: str, item: Any) -> list[str]:
    """Signature and docstring of a function, or the docstring of a class."""
    arguments = "" if inspect.isclass(item) else str(inspect.signature(item))
    arguments = re.sub(r"""(: |-> )(['"])(.*?)\2""", r"\1\3", arguments)  # annotations that are kept as text
    arguments = re.sub(r"\b(\w+\.)+(?=[A-Z])", "", arguments)  # classes without their modules
    return [f"### {name}", "", "```text", name.split(".")[-1] + arguments, "", inspect.getdoc(item), "```", ""]


def _row(*cells: str) -> str:
    """One row of a Markdown table."""
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


if __name__ == "__main__":
    FILE.write_text(text())
    print(FILE)
