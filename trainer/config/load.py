"""Recipes: YAML with `extends:`, dotted overrides, and the origin of each value.

Standard library and yaml only, so `--help` and a wrong flag answer before torch is imported. A recipe says WHAT is
trained (model, data, schedule); the DeepSpeed JSON says HOW it is spread (ZeRO, precision, micro-batch, accumulation).
    load_recipe("recipes/demo.yaml", ["train.epochs=3"]) -> Recipe
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer.config.recipe import Recipe

DEFAULT, COMMAND_LINE = "default", "command line"  # origins of a value beside the files it may come from


def load_recipe(path: str | Path, overrides: Sequence[str] = (), **sections: Any) -> Recipe:
    """Read a recipe, apply what it extends and then the changes, and check everything.

    Args:
        path: YAML file; `extends: other.yaml` (relative to it) names one recipe it starts from.
        overrides: "section.key=value" strings as on the command line, the value read as YAML.
        sections: the same from Python, applied last: train={"epochs": 3}, seed=1.

    Raises:
        ValueError: no such file, unknown key (the close ones are named), wrong type, or a value out of range.
    """
    values = functools.reduce(_merge, (layer for _, layer in _layers(Path(path))), {})
    for text in overrides:
        _apply_override(values, text)
    return build(Recipe, _merge(values, sections))


def origins(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Where each key of a recipe gets its value: "default", a file of the `extends` chain, or "command line".

    Raises:
        ValueError: the files cannot be read; the keys themselves are checked by load_recipe.
    """
    found = dict.fromkeys(all_keys(Recipe), DEFAULT)
    for file, values in _layers(Path(path)):
        found |= {key: file.name for key in found if _has(values, key.split("."))}
    return found | {".".join(parse_override(text)[0]): COMMAND_LINE for text in overrides}


def build(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Build a dataclass from nested dictionaries; unknown keys and wrong types are errors that name the key."""
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or 'the recipe'} must be a section of keys, got {shown(values)}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(f"unknown key {where}{key}. {_close(where, str(key), cls)}")
    return cls(**{key: _convert(value, hints[key], where + key) for key, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Plain lists, dictionaries and scalars of a dataclass, as written to config.yaml."""
    return {
        item.name: to_dict(value)
        if dataclasses.is_dataclass(value := getattr(config, item.name))
        else (list(value) if isinstance(value, tuple) else value)
        for item in dataclasses.fields(config)
    }


def first_difference(a: dict, b: dict, where: str = "") -> str | None:
    """The first key on which two plain configurations differ, with both values; None when they agree."""
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key, "(absent)"), b.get(key, "(absent)")
        if isinstance(left, dict) and isinstance(right, dict):
            if found := first_difference(left, right, f"{where}{key}."):
                return found
        elif left != right:
            return f"{where}{key}: {left} there, {right} here"
    return None


def split_evenly(depth: int, parts: int, name: str) -> tuple[int, ...]:
    """Depths of `parts` modules as equal as possible, the longer ones first: 14 over 4 = 4, 4, 3, 3."""
    if parts > depth:
        raise ValueError(f"{name} has {depth} blocks, too few for {parts} modules: lower modules or give more blocks")
    return tuple(depth // parts + (i < depth % parts) for i in range(parts))


def parse_override(text: str) -> tuple[list[str], Any]:
    """'a.b=3' -> (['a', 'b'], 3), the value read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"cannot read the override {text!r}: expected section.key=value, e.g. train.epochs=3")
    return name.strip().split("."), read_yaml(value, f"the value of the override {shown(text)}")


def read_yaml(text: str, what: str) -> Any:
    """Plain YAML: no tag of it makes an object. Raises ValueError in one line that starts with `what`."""
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date or a number python refuses
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ValueError(f"{what} is not valid YAML: {reason}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice: plain YAML would forget the first one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1 and key != "<<"]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def one_line(error: BaseException) -> str:
    """What an error says, without the line breaks of PyYAML's messages."""
    return " ".join(str(error).split())


def shown(value: Any) -> str:
    """A value in an error message, cut to a line however large it is."""
    return _SHORT.repr(value)


def close(word: str, known: Sequence[str], otherwise: str = "") -> str:
    """The end of a message about an unknown word: the close ones, or `otherwise`, by default all that are known."""
    near = difflib.get_close_matches(word, known, n=3)
    return f"Did you mean {', '.join(near)}?" if near else otherwise or f"Known: {', '.join(known)}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 1  # a few lines of YAML with aliases make lists whose plain repr would fill the memory


def _apply_override(values: dict[str, Any], text: str) -> None:
    path, value = parse_override(text)
    for i, key in enumerate(path[:-1]):
        if values.get(key) is None:  # absent, or a section with nothing in it
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ValueError(f"override {text!r}: {'.'.join(path[: i + 1])} is a value, not a section")
    values[path[-1]] = value


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """(file, its own values) of a recipe and all it extends; the later ones win."""
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"no recipe at {path}. Recipes there: {', '.join(there) or 'none'}")
    path = path.resolve()
    if path in seen:
        raise ValueError(f"recipe {path.name} extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        values = read_yaml(path.read_text(), f"recipe {path}") or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path} is not text: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must hold sections of keys, got {type(values).__name__}")
    parent = values.pop("extends", None)
    below = [] if parent is None else _layers(path.parent / str(parent), (*seen, path))
    return [*below, (path, values)]


def _has(values: Any, keys: list[str]) -> bool:
    return not keys or (isinstance(values, dict) and keys[0] in values and _has(values[keys[0]], keys[1:]))


def _merge(base: dict, top: dict) -> dict:
    merged = dict(base)
    for key, value in top.items():
        if isinstance(merged.get(key), dict) and isinstance(value, dict | None):  # None: a section with nothing in it
            value = _merge(merged[key], value or {})
        merged[key] = value
    return merged


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Check a YAML value against a type annotation: scalars, X | None, tuples, Literal, nested dataclasses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value if value is not None else {}, name + ".")
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, next(a for a in args if a is not type(None)), name)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} is {shown(value)}, expected a list such as [1, 2]")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ValueError(f"{name} is {shown(value)}, expected a list of {len(args)} values")
        return tuple(_convert(v, args[0], f"{name}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML 1.1 reads 1e-3 as a string
            value = float(value)
    good = {
        float: isinstance(value, float) and math.isfinite(value),
        int: isinstance(value, int) and not isinstance(value, bool),
        bool: isinstance(value, bool),
        str: isinstance(value, str),
    }.get(hint, isinstance(value, str) and value in args)
    if not good:
        raise ValueError(f"{name} is {shown(value)}, expected {describe(hint)}")
    return value


def describe(hint: Any) -> str:
    """A type annotation of the schema in words: whole number, one of a, b, list of 2 numbers, text or null."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return f"{describe(next(a for a in args if a is not type(None)))} or null"
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin is tuple:
        many = {float: "numbers", int: "whole numbers", str: "texts"}[args[0]]
        return f"list of {many}" if args[-1] is Ellipsis else f"list of {len(args)} {many}"
    return {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[hint]


def all_keys(cls: type = Recipe, where: str = "") -> list[str]:
    """Dotted names of every key of a section and of the sections in it."""
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        names += all_keys(hint, f"{where}{name}.") if dataclasses.is_dataclass(hint) else [where + name]
    return names


def _close(where: str, key: str, cls: type) -> str:
    """Name the close keys of this section, and full names elsewhere with the same last part."""
    here = [item.name for item in dataclasses.fields(cls)]
    near = [where + name for name in difflib.get_close_matches(key, here, n=3)]
    elsewhere = [name.rpartition(".")[0] for name in all_keys()] + all_keys()  # sections and keys
    near += list(dict.fromkeys(n for n in elsewhere if n.split(".")[-1] == key and n not in near))[:3]
    return f"Did you mean {', '.join(near)}?" if near else f"Known here: {', '.join(here)}"


def module_depths(given: tuple[int, ...], blocks: int, modules: int, name: str) -> tuple[int, ...]:
    """Blocks per module as the recipe gives them, checked, or as equal as possible."""
    if given and (min(given) < 1 or sum(given) != blocks):
        raise ValueError(
            f"{name}.depths {list(given)} make {sum(given)} blocks, but the {name} has {blocks}: give {modules} "
            f"numbers of at least 1 that add up to {blocks}, or leave it empty"
        )
    return given or split_evenly(blocks, modules, f"the {name}")
