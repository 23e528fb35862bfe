"""What the trainer says about itself: help by section, from the schema, and the resolved recipe with its origins."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from trainer.config.ds_config import PASSED_ON, REFUSED, TRAINER_KEYS
from trainer.config.knobs import close
from trainer.config.load import all_keys, describe, to_dict, type_hints
from trainer.config.recipe import Recipe
from trainer.request.job import EXIT_CODES
from trainer.tracking.console import table

COMMANDS = {
    "inspect": ("trainer/run.py inspect PATH", "what a checkpoint or result holds, and whether it is whole"),
    "export": ("trainer/run.py export CHECKPOINT --out DIR", "the weights of a training checkpoint as a usual model"),
    "import": ("trainer/run.py import SOURCE --layout L --out DIR [heads=N] [k=N]", "a checkpoint of other code"),
}
TOP = "recipe"  # name of the keys that stand in no section
DS = "ds"


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    name: str  # with its sections
    type: str  # in words, with the range of a number
    default: Any
    help: str


def sections() -> dict[str, type]:
    """Name -> dataclass of every section of a recipe, nested ones by their full name."""
    return {TOP: Recipe} | _sections_in(Recipe)


def _sections_in(cls: type, where: str = "") -> dict[str, type]:
    inner = {}
    for name, hint in type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            inner[where + name] = hint
            inner |= _sections_in(hint, f"{where}{name}.")
    return inner


def keys(section: str) -> list[Key]:
    """The keys of a section, without those of the sections in it, with the defaults a recipe has."""
    cls = sections()[section]
    where = "" if section == TOP else section + "."
    # of a whole recipe: the section alone may have others (student.variant)
    defaults = to_dict(Recipe())
    if section != TOP:
        for part in section.split("."):
            defaults = defaults[part]
    hints = type_hints(cls)
    section_keys = []
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if not dataclasses.is_dataclass(hint):
            limits = item.metadata["range"]
            kind = f"{describe(hint)}, {limits}" if limits else describe(hint)
            key = Key(where + item.name, kind, defaults[item.name], item.metadata["help"])
            section_keys.append(key)
    return section_keys


def overview() -> str:
    """What stands below the flags in --help."""
    commands = "".join(f"  {usage}\n      {what}\n" for usage, what in COMMANDS.values())
    exit_codes = "\n".join(f"  {code:<4}{meaning}" for code, meaning in EXIT_CODES.items())
    return f"""commands (no recipe needed):
{commands}
overrides: section.key=value changes the recipe, ds.section.key=value the DeepSpeed JSON; epochs=n those of every phase.
every key with its type and default: --help SECTION, one of
  {", ".join([*sections(), DS])}, all

exit codes:
{exit_codes}"""


def section(name: str) -> str:
    """Every key of a section, or of all; or the one key of that name.

    Raises:
        ValueError: no such section or key; the close ones are named.
    """
    known = sections()
    names = [*known, DS]
    if name == "all":
        return "\n".join(section(each) for each in names).rstrip("\n")
    if name == DS:
        return _ds_section()
    if name in known:
        return f"{name}: {known[name].__doc__}\n{_table(keys(name))}\n"
    if name not in all_keys():
        hint = close(name, [*names, "all", *all_keys()], f"Sections: {', '.join(names)}, all")
        raise ValueError(f"there is no section {name}. {hint}")
    owner = name.rpartition(".")[0] or TOP
    return _table([key for key in keys(owner) if key.name == name])


def resolved(
    recipe: Recipe,
    origins: Mapping[str, str],
    ds_values: Mapping[str, Any] | None = None,
    ds_origins: Mapping[str, str] | None = None,
) -> str:
    """The recipe as YAML, a valid recipe itself, each value with its origin; the DeepSpeed JSON as comments below.

    Args:
        origins, ds_origins: dotted key -> where its value is from; of the JSON only where there is one.
    """
    lines = list(_yaml_lines(to_dict(recipe), origins))
    if ds_values is not None:
        assert ds_origins is not None
        lines.append("# DeepSpeed JSON")
        lines += [f"#   {line}" for line in _yaml_lines(ds_values, ds_origins)]
    return "\n".join(lines)


def plain(value: Any) -> str:
    """A value as YAML in one line, as an override takes it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    text = text.removesuffix("\n...\n").strip()  # the end of a document that is a scalar
    return json.dumps(value) if "\n" in text else text


def _yaml_lines(values: Mapping[str, Any], origins: Mapping[str, str], where: str = "") -> Iterator[str]:
    indent = "  " * where.count(".")
    for key, value in values.items():
        if isinstance(value, dict) and where + key not in origins:
            yield f"{indent}{key}:"
            yield from _yaml_lines(value, origins, f"{where}{key}.")
        else:
            yield f"{indent}{key}: {plain(value)}  # {origins[where + key]}"


def _table(section_keys: list[Key]) -> str:
    """key=default, type and help in columns."""
    return _columns([(f"{key.name}={plain(key.default)}", key.type, key.help) for key in section_keys])


def _ds_section() -> str:
    rows = [(f"ds.trainer.{key}", text) for key, text in TRAINER_KEYS.items()]
    rows += [(f"ds.{key}", "as in DeepSpeed's documentation") for key in PASSED_ON]
    rows += [(f"ds.{key}", f"refused: {why}") for key, why in REFUSED.items()]
    return f'ds: The DeepSpeed JSON; where it says "auto" the recipe decides.\n{_columns(rows)}\n'


def _columns(rows: list[tuple[str, ...]]) -> str:
    first, *others = rows
    return textwrap.indent(table(first, others), "  ")
