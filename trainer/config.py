"""Recipes: YAML with `extends:`, dotted overrides, replay of a saved run.

Standard library and yaml only, so `--help` and a wrong flag answer before torch is imported. A recipe says WHAT is
trained (model, data, schedule); the DeepSpeed JSON says HOW it is spread (ZeRO, precision, micro-batch, accumulation).
    load_recipe("recipes/demo.yaml", ["train.epochs=3"]) -> Recipe
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer.schema import Recipe, require


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, apply what it extends and then the overrides, and check everything.

    Args:
        path: YAML file; `extends: other.yaml` (relative to it) names one recipe it starts from.
        overrides: "section.key=value" strings, the value read as YAML.

    Raises:
        ValueError: unknown key (the close ones are named), wrong type, or a value out of range.
    """
    values = _read_yaml(Path(path), seen=())
    for text in overrides:
        _apply_override(values, text)
    return build(Recipe, values)


def build(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Build a dataclass from nested dictionaries; unknown keys and wrong types are errors that name the key."""
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or 'the recipe'} must be a section of keys, got {values!r}")
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
    try:
        return name.strip().split("."), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read the value of the override {text!r} as YAML: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """What an error says, without the line breaks of PyYAML's messages."""
    return " ".join(str(error).split())


def _apply_override(values: dict[str, Any], text: str) -> None:
    path, value = parse_override(text)
    for i, key in enumerate(path[:-1]):
        if values.get(key) is None:  # absent, or a section with nothing in it
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ValueError(f"override {text!r}: {'.'.join(path[: i + 1])} is a value, not a section")
    values[path[-1]] = value


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"no recipe at {path}. Recipes there: {', '.join(near) or 'none'}")
    path = path.resolve()
    if path in seen:
        raise ValueError(f"recipe {path.name} extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must hold sections of keys, got {type(values).__name__}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    return _merge(_read_yaml(path.parent / str(parent), (*seen, path)), values)


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
    if origin is Literal:
        require(value in args, name, value, "one of " + ", ".join(map(str, args)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} is {value!r}, expected a list such as [1, 2]")
        if args[-1] is not Ellipsis:
            require(len(value) == len(args), name, value, f"a list of {len(args)} values")
        return tuple(_convert(v, args[0], f"{name}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{name} is {value!r}, expected a number") from None
    good = {
        float: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
        int: isinstance(value, int) and not isinstance(value, bool),
        bool: isinstance(value, bool),
        str: isinstance(value, str),
    }[hint]
    require(good, name, value, {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[hint])
    return hint(value)


def _close(where: str, key: str, cls: type) -> str:
    """Name the close keys of this section, and full names elsewhere that end in the same key."""
    here = [item.name for item in dataclasses.fields(cls)]
    near = [where + name for name in difflib.get_close_matches(key, here, n=3)]
    near += [n for n in _all_keys(Recipe) if n.split(".")[-1] == key and n not in near][:3]
    return f"Did you mean {', '.join(near)}?" if near else f"Known here: {', '.join(here)}"


def _all_keys(cls: type, where: str = "") -> list[str]:
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        names += _all_keys(hint, f"{where}{name}.") if dataclasses.is_dataclass(hint) else [where + name]
    return names
