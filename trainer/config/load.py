"""Recipes: YAML with `extends:`, dotted overrides, and the origin of each value.

Standard library and yaml only, so `--help` and a wrong flag answer before torch is imported. A recipe says WHAT is
trained (model, data, schedule); the DeepSpeed JSON says HOW it is spread (ZeRO, precision, micro-batch, accumulation).
    load_recipe("recipes/demo.yaml", ["train.epochs=3"]) -> Recipe
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer.config.knobs import require, shown
from trainer.config.recipe import Recipe

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # NUL, line breaks and their like

LEFT_OPEN = "???"  # a value that whoever runs the recipe must give, as OmegaConf writes it
EPOCHS = "epochs"  # of one section, and beside the sections of all that train

EPOCHS_OF = ("teacher", "meta", "distill", "expert", "refine", "train")

# origins of a value beside the files it may come from
DEFAULT = "default"
COMMAND_LINE = "command line"


def load_recipe(path: str | Path, overrides: Sequence[str] = (), **sections: Any) -> Recipe:
    """Read a recipe, apply what it extends and then the changes, and check everything.

    Beside the sections a recipe may say `epochs: n`: that many in each of EPOCHS_OF that is not turned off (0), but for
    those that the same file, or the same command line, gives epochs of their own.

    Args:
        path: YAML file; `extends: other.yaml` (relative to it) names one recipe it starts from.
        overrides: "section.key=value" strings as on the command line, the value read as YAML.
        sections: the same from Python, applied last: train={"epochs": 3}, seed=1.

    Raises:
        ValueError: no such file, unknown key (the close ones are named), wrong type, or a value out of range.
    """
    merged: dict[str, Any] = {}
    for _, values in _layers(Path(path)):
        merged = _merge(merged, values)
    for text in _with_epochs_spread(overrides, merged):
        _apply_override(merged, text)
    return build(Recipe, _merge(merged, _epochs_spread(sections, merged)))


def plain_values(path: str | Path) -> dict[str, Any]:
    """What a recipe and all it extends say, in one: as a file of its own it is the same recipe under any overrides.

    Raises:
        ValueError: the files cannot be read.
    """
    return functools.reduce(_merge, [values for _, values in _layers(Path(path))], {})


def origins(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Where each key of a recipe gets its value: "default", a file of the `extends` chain, or "command line".

    Raises:
        ValueError: the files cannot be read; the keys themselves are checked by load_recipe.
    """
    origin = dict.fromkeys(all_keys(Recipe), DEFAULT)
    merged: dict[str, Any] = {}
    for file, values in _layers(Path(path)):
        merged = _merge(merged, values)
        for key in origin:
            if _has(values, key.split(".")):
                origin[key] = file.name
    for text in _with_epochs_spread(overrides, merged):
        names, _ = parse_override(text)
        origin[".".join(names)] = COMMAND_LINE
    return origin


def build(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Build a dataclass from nested dictionaries.

    Args:
        where: the section's own name with a dot behind it, for messages.

    Raises:
        ValueError: an unknown key, a wrong type, or a value out of range; the key is named.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or 'the recipe'} must be a section of keys, got {shown(values)}")
    hints = type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(f"unknown key {where}{key}. {_close_keys(where, str(key), cls)}")
    return cls(**{key: _convert(value, hints[key], where + key) for key, value in values.items()})


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """The annotations of a section of the schema, by key."""
    return typing.get_type_hints(cls)


def build_recorded(values: dict[str, Any]) -> Recipe:
    """The recipe of a config.yaml that a run wrote, also one of an older version.

    Args:
        values: its section recipe, as read.

    Raises:
        ValueError: see build.
    """
    teacher = values.get("teacher") if isinstance(values, dict) else None
    if isinstance(teacher, dict) and teacher.get("source") and "head" not in teacher:
        # before teacher.head there was, image_size meant nothing beside teacher.source: the checkpoint's own was used
        values = values | {"teacher": teacher | {"image_size": None}}
    return build(Recipe, values)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain lists, dictionaries and scalars of a dataclass, as written to config.yaml."""
    plain = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        plain[item.name] = value
    return plain


def first_difference(a: dict, b: dict, where: str = "") -> str | None:
    """The first key on which two plain configurations differ, with both values; None when they agree."""
    for key in sorted(set(a) | set(b)):
        left = a.get(key, "(absent)")
        right = b.get(key, "(absent)")
        if isinstance(left, dict) and isinstance(right, dict):
            difference = first_difference(left, right, f"{where}{key}.")
            if difference:
                return difference
        elif left != right:
            return f"{where}{key}: {left} there, {right} here"
    return None


def module_depths(depths: tuple[int, ...], blocks: int, modules: int, name: str) -> tuple[int, ...]:
    """Blocks per module as the recipe gives them, checked, or as equal as possible.

    Args:
        depths: of the recipe; empty = as equal as possible.
        blocks: of the whole model.
        name: teacher or student, for messages.

    Raises:
        ValueError: depths that do not make up the blocks, or fewer blocks than modules.
    """
    if depths and (min(depths) < 1 or sum(depths) != blocks):
        raise ValueError(
            f"{name}.depths {list(depths)} make {sum(depths)} blocks, but the {name} has {blocks}: give {modules} "
            f"numbers of at least 1 that add up to {blocks}, or leave it empty"
        )
    return depths or split_evenly(blocks, modules, f"the {name}")


def split_evenly(depth: int, parts: int, name: str) -> tuple[int, ...]:
    """Depths of `parts` modules as equal as possible, the longer ones first: 14 over 4 = 4, 4, 3, 3.

    Raises:
        ValueError: fewer blocks than modules.
    """
    if parts > depth:
        raise ValueError(f"{name} has {depth} blocks, too few for {parts} modules: lower modules or give more blocks")
    shortest, left_over = divmod(depth, parts)
    return (shortest + 1,) * left_over + (shortest,) * (parts - left_over)


def parse_override(text: str) -> tuple[list[str], Any]:
    """'a.b=3' -> (['a', 'b'], 3), the value read as YAML.

    Raises:
        ValueError: no name, no equals sign, or a value that is not YAML.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"cannot read the override {text!r}: expected section.key=value, e.g. train.epochs=3")
    return name.strip().split("."), read_yaml(value, f"the value of the override {shown(text)}")


def read_yaml(text: str, what: str) -> Any:
    """Plain YAML: no tag of it makes an object. Raises ValueError in one line that starts with `what`."""
    try:
        return copy.deepcopy(_parsed(text))
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date or a number python refuses
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ValueError(f"{what} is not valid YAML: {reason}") from None


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """What must not be changed. A study reads the same few files and overrides for every cell, 10 ms each time."""
    return _Loader(text).get_single_data()


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice: plain YAML would forget the first one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.value != "<<"]  # YAML's merge key
        repeated = first_repeated(keys)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def describe(hint: Any) -> str:
    """A type annotation of the schema in words: whole number, one of a, b, list of 2 numbers, text or null."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return f"{describe(_not_none(hint))} or null"
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin is tuple:
        many = {float: "numbers", int: "whole numbers", str: "texts"}[args[0]]
        return f"list of {many}" if args[-1] is Ellipsis else f"list of {len(args)} {many}"
    return {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[hint]


def all_keys(cls: type = Recipe, where: str = "") -> list[str]:
    """Dotted names of every key of a section and of the sections in it."""
    names = []
    for name, hint in type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            names += all_keys(hint, f"{where}{name}.")
        else:
            names.append(where + name)
    return names


def one_line(error: BaseException) -> str:
    """What an error says, without the line breaks of PyYAML's messages."""
    return " ".join(str(error).split())


def first_repeated(keys: Sequence[Any]) -> Any:
    """The first of `keys` that stands there more than once; None when each does once."""
    return next((key for key in keys if keys.count(key) > 1), None)


def _apply_override(values: dict[str, Any], text: str) -> None:
    path, value = parse_override(text)
    section = values
    for depth, key in enumerate(path[:-1], start=1):
        if section.get(key) is None:  # absent, or a section with nothing in it
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ValueError(f"override {text!r}: {'.'.join(path[:depth])} is a value, not a section")
    section[path[-1]] = value


def _layers(path: Path, extended_by: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """(file, its own values) of a recipe and all it extends; the later ones win."""
    if not path.is_file():
        recipes = sorted(file.name for file in path.parent.glob("*.yaml"))
        raise ValueError(f"no recipe at {path}. Recipes there: {', '.join(recipes) or 'none'}")
    path = path.resolve()
    if path in extended_by:
        circle = " -> ".join(file.name for file in extended_by)
        raise ValueError(f"recipe {path.name} extends itself through {circle}")
    try:
        values = read_yaml(path.read_text(), f"recipe {path}") or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path} is not text: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must hold sections of keys, got {type(values).__name__}")
    parent = values.pop("extends", None)
    below = _layers(path.parent / str(parent), (*extended_by, path)) if parent is not None else []
    merged = functools.reduce(_merge, [layer for _, layer in below], {})
    return [*below, (path, _epochs_spread(values, merged))]


def _epochs_spread(values: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    """Values whose `epochs` of all phases stand in the sections that train.

    Args:
        below: what the values are put on.

    Raises:
        ValueError: no number of epochs.
    """
    if EPOCHS not in values:
        return values
    epochs = values[EPOCHS]
    is_number = isinstance(epochs, int) and not isinstance(epochs, bool) and epochs >= 1
    require(is_number, EPOCHS, epochs, "a whole number from 1, the epochs of every phase that trains")
    spread = {}
    for name in EPOCHS_OF:
        section = values.get(name)
        has_own = isinstance(section, dict) and EPOCHS in section
        before = below.get(name)
        if isinstance(before, dict) and EPOCHS in before:
            is_on = before[EPOCHS] != 0
        else:
            is_on = name != "refine"  # which is off by default
        if is_on and not has_own:
            spread[name] = {EPOCHS: epochs}
    return _merge({key: value for key, value in values.items() if key != EPOCHS}, spread)


def _with_epochs_spread(overrides: Sequence[str], below: dict[str, Any]) -> list[str]:
    """Overrides with those of the sections that train in place of `epochs=n`."""
    words, epochs, sections = [], {}, {}
    for text in overrides:
        names, value = parse_override(text)
        if names == [EPOCHS]:
            epochs = {EPOCHS: value}
            continue
        words.append(text)
        if len(names) == 2 and names[1] == EPOCHS:
            sections[names[0]] = {EPOCHS: value}
    for name, section in _epochs_spread(sections | epochs, below).items():
        if name not in sections:
            words.append(f"{name}.{EPOCHS}={section[EPOCHS]}")
    return words


def _has(values: Any, keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _merge(base: dict, top: dict) -> dict:
    merged = dict(base)
    for key, value in top.items():
        if isinstance(merged.get(key), dict) and isinstance(value, dict | None):  # None: a section with nothing in it
            value = _merge(merged[key], value or {})
        merged[key] = value
    return merged


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Check a YAML value against a type annotation: scalars, X | None, tuples, Literal, nested dataclasses."""
    if value == LEFT_OPEN:
        raise ValueError(f"{name} is left open by the recipe: set it, as in {name}=...")
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, {} if value is None else value, name + ".")
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, _not_none(hint), name)
    if origin is tuple:
        return _convert_list(value, typing.get_args(hint), name)
    is_bool = isinstance(value, bool)  # which is a kind of int in Python
    if hint is float and isinstance(value, str | int) and not is_bool:
        with contextlib.suppress(ValueError, OverflowError):  # YAML 1.1 reads 1e-3 as a string
            value = float(value)
    fits = {
        float: isinstance(value, float) and math.isfinite(value),
        int: isinstance(value, int) and not is_bool,
        bool: is_bool,
        str: isinstance(value, str),
    }
    choices = typing.get_args(hint)  # of a Literal
    if hint is str and value is None:  # `teacher.source=$UNSET` in a shell: nobody may have meant to empty it
        raise ValueError(
            f"{name} is null, expected text; to leave it empty on purpose write '{name}=\"\"', quotes included"
        )
    if not fits.get(hint, isinstance(value, str) and value in choices):
        raise ValueError(f"{name} is {shown(value)}, expected {describe(hint)}")
    if isinstance(value, str) and _CONTROL.search(value):
        # a line break or NUL would stop the run where the text becomes a path, a name on the hub or a line of a log
        raise ValueError(f"{name} is {shown(value)}, expected text in one line, without control characters")
    return value


def _convert_list(value: Any, item_hints: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """Of as many items as there are hints, or of any number where the last hint is an ellipsis."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {shown(value)}, expected a list such as [1, 2]")
    if item_hints[-1] is not Ellipsis and len(value) != len(item_hints):
        raise ValueError(f"{name} is {shown(value)}, expected a list of {len(item_hints)} values")
    return tuple(_convert(item, item_hints[0], f"{name}[{i}]") for i, item in enumerate(value))


def _not_none(hint: Any) -> Any:
    """X of X | None."""
    return next(part for part in typing.get_args(hint) if part is not type(None))


def _close_keys(where: str, key: str, cls: type) -> str:
    """Name the close keys of this section, and full names elsewhere with the same last part."""
    keys_here = [item.name for item in dataclasses.fields(cls)]
    near = [where + name for name in difflib.get_close_matches(key, keys_here, n=3)]
    keys = all_keys()
    sections = [name.rpartition(".")[0] for name in keys]
    same_name = [name for name in sections + keys if name.split(".")[-1] == key and name not in near]
    near += list(dict.fromkeys(same_name))[:3]
    return f"Did you mean {', '.join(near)}?" if near else f"Known here: {', '.join(keys_here)}"
