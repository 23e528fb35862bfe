"""What the trainer says about itself: help by section, from the schema, and the resolved recipe with its origins."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from trainer.config.ds_config import PASSED_ON, REFUSED, TRAINER_KEYS
from trainer.config.load import all_keys, close, describe, to_dict
from trainer.config.recipe import Recipe
from trainer.request.job import EXIT_CODES

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
    type: str
    default: Any
    help: str


def sections() -> dict[str, type]:
    """Name -> dataclass of every section of a recipe, nested ones by their full name."""
    found = {TOP: Recipe}

    def add(cls: type, where: str) -> None:
        for name, hint in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(hint):
                found[where + name] = hint
                add(hint, f"{where}{name}.")

    add(Recipe, "")
    return found


def keys(section: str) -> list[Key]:
    """The keys of a section, without those of the sections in it, with the defaults a recipe has."""
    cls = sections()[section]
    where = "" if section == TOP else section + "."
    defaults = to_dict(Recipe())
    for part in where.split(".")[:-1]:
        defaults = defaults[part]
    hints = typing.get_type_hints(cls)
    return [
        Key(where + item.name, describe(hints[item.name]), defaults[item.name], item.metadata["help"])
        for item in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(hints[item.name])
    ]


def overview() -> str:
    """What stands below the flags in --help."""
    lines = ["commands (no recipe needed):"]
    lines += [f"  {usage}\n      {what}" for usage, what in COMMANDS.values()]
    lines += ["", "overrides: section.key=value changes the recipe, ds.section.key=value the DeepSpeed JSON."]
    lines += [
        "every key with its type and default: --help SECTION, one of",
        f"  {', '.join([*sections(), DS])}, all",
    ]
    lines += ["", "exit codes:"]
    lines += [f"  {code:<4}{meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines)


def section(name: str) -> str:
    """Every key of a section, or of all; or the one key of that name.

    Raises:
        ValueError: no such section or key; the close ones are named.
    """
    known = [*sections(), DS]
    if name == "all":
        return "\n".join(section(each) for each in known).rstrip("\n")
    if name == DS:
        return _ds_section()
    if name in sections():
        return f"{name}: {sections()[name].__doc__}\n{_table(keys(name))}\n"
    found = [key for each in sections() for key in keys(each) if key.name == name]
    if not found:
        hint = close(name, [*known, "all", *all_keys()], f"Sections: {', '.join(known)}, all")
        raise ValueError(f"there is no section {name}. {hint}")
    return _table(found)


def resolved(recipe: Recipe, origins: Mapping[str, str], ds_values: Mapping[str, Any] | None,
             ds_origins: Mapping[str, str]) -> str:  # fmt: skip
    """The recipe as YAML, a valid recipe itself, each value with its origin; the DeepSpeed JSON as comments below."""
    lines = list(_yaml_lines(to_dict(recipe), origins))
    if ds_values is not None:
        lines += ["# DeepSpeed JSON"] + [f"#   {line}" for line in _yaml_lines(ds_values, ds_origins)]
    return "\n".join(lines)


def plain(value: Any) -> str:
    """A value as YAML in one line, as an override takes it."""
    text = (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("\n...\n").strip()
    )
    return json.dumps(value) if "\n" in text else text


def _yaml_lines(values: Mapping[str, Any], origins: Mapping[str, str], where: str = "") -> Iterator[str]:
    indent = "  " * where.count(".")
    for key, value in values.items():
        if isinstance(value, dict) and where + key not in origins:
            yield f"{indent}{key}:"
            yield from _yaml_lines(value, origins, f"{where}{key}.")
        else:
            yield f"{indent}{key}: {plain(value)}  # {origins[where + key]}"


def _table(found: list[Key]) -> str:
    """key=default, type and help in columns."""
    cells = [(f"{key.name}={plain(key.default)}", key.type, key.help) for key in found]
    wide = [max(len(cell[i]) for cell in cells) for i in range(2)]
    return "\n".join(f"  {name.ljust(wide[0])}  {kind.ljust(wide[1])}  {text}" for name, kind, text in cells)


def _ds_section() -> str:
    rows = [(f"ds.trainer.{key}", text) for key, text in TRAINER_KEYS.items()]
    rows += [(f"ds.{key}", "as in DeepSpeed's documentation") for key in PASSED_ON]
    rows += [(f"ds.{key}", f"refused: {why}") for key, why in REFUSED.items()]
    wide = max(len(name) for name, _ in rows)
    lines = [f"  {name.ljust(wide)}  {text}" for name, text in rows]
    head = 'ds: The DeepSpeed JSON; where it says "auto" the recipe decides.'
    return "\n".join([head, *lines]) + "\n"
