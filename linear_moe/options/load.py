"""Loading of YAML files and `a.b=c` overrides into one typed tree of dataclasses, with every value checked.

Values come from layers, of which later ones win: the defaults of `schema.py`, the files that a file lists under
`include` (in order, relative to that file), the file itself, and the command line's overrides. Some options hold one of
several dataclasses, told apart by `type` (`Variants`, for example mixers). A layer that changes such a `type` starts
with the defaults of the new type; values that earlier layers set for the old type are dropped, even where both types
have the option.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml

from linear_moe.options.errors import ConfigError
from linear_moe.options.fields import Variants

T = TypeVar("T")

INCLUDE = "include"
# YAML 1.1 reads 1e-4 as a string, because its floats need a dot; such strings are accepted as numbers.
NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?")
BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}
"""Bounds of an option by name: the sign in messages, and whether a value keeps the bound."""
TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key which is given twice; SafeLoader itself would drop the first value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                problem = f"key {key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else key_node)
        return super().construct_mapping(node, deep)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Makes a dataclass of the schema (Config, ModelConfig, ...) from a nested dict, checked like a YAML file."""
    tree = cls()
    update(tree, values)
    return tree


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Parses overrides: `["a.b=1", "a.c=[2]"]` -> `{"a": {"b": 1, "c": [2]}}`; values are YAML."""
    tree: dict[str, Any] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError("override", text, "must look like a.b=c", fix="for example training.steps=100")
        node = tree
        for key in keys[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        node[keys[-1]] = _parse_yaml(value, f"override {text!r}")
    return tree


def read_layers(path: Path, above: tuple[Path, ...]) -> list[Mapping[str, Any]]:
    """Reads the layers of the files that `path` includes, then its own; `above` are the files that include `path`.

    Raises ConfigError for a file that cannot be read, is not a mapping, or includes itself.
    """
    if path.resolve() in above:
        raise ConfigError(str(above[-1]), ..., f"includes {path}, which includes it", fix="break the circle")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError("config file", str(path), "does not exist", candidates=siblings) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError("config file", str(path), f"cannot be read: {reason}") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(str(path), ..., "must hold a mapping of keys", fix="for example training: {steps: 100}")
    included = values.pop(INCLUDE, [])
    included = [included] if isinstance(included, str) else included
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise ConfigError(f"{path}: {INCLUDE}", included, "must be a file name or a list of them")
    layers = [layer for name in included for layer in read_layers(path.parent / name, (*above, path.resolve()))]
    return [*layers, values]


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(source, ..., f"not valid YAML: {where}{problem}") from None


def update(node: Any, values: Mapping[str, Any], path: str = "", variant: str = "") -> None:
    """Sets the fields of dataclass `node` from `values`, recursively; raises ConfigError with the dotted path.

    If `node` is one of several `Variants`, `variant` is its type, which the message names.
    """
    hints = typing.get_type_hints(type(node))
    fields = {f.name: f for f in dataclasses.fields(node)}
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            section = (path or "the config") + (f" (type {variant})" if variant else "")
            raise ConfigError(where, ..., f"unknown key of {section}", candidates=fields, near_to=str(key))
        variants, current = fields[key].metadata.get("variants"), getattr(node, key)
        if variants is None:
            converted = _convert(value, hints[key], current, where)
        else:
            converted = _convert_variant(value, variants, current, where, optional=type(None) in get_args(hints[key]))
        setattr(node, key, converted)
        _check_constraint(converted, fields[key].metadata, where)


def _convert(value: Any, hint: Any, current: Any, path: str) -> Any:
    """Converts `value` to the type `hint`; of a dataclass or dict, `current` is updated and its other entries stay."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is typing.Union:
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        (hint,) = [option for option in options if option is not type(None)]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        tree = current if isinstance(current, hint) else hint()
        update(tree, _mapping(value, path), path)
        return tree
    if get_origin(hint) is dict:
        entries = dict(current)
        for key, entry in _mapping(value, path).items():
            entries[key] = _convert(entry, get_args(hint)[1], entries.get(key), f"{path}.{key}")
        return entries
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(path, value, "must be a list")
        return [_convert(entry, get_args(hint)[0], None, f"{path}.{i}") for i, entry in enumerate(value)]
    return _convert_scalar(value, hint, path)


def _convert_variant(value: Any, variants: Variants, current: Any, path: str, optional: bool) -> Any:
    if value is None and optional:
        return None
    values = _mapping(value, path, f"write {path}.type={value}" if isinstance(value, str) else "")
    name = values.get("type", current.type if current else None)
    if name is None:
        raise ConfigError(f"{path}.type", ..., f"must name a {variants.noun}", candidates=variants.types)
    if name not in variants.types:
        message = f"unknown {variants.noun}"
        raise ConfigError(f"{path}.type", name, message, candidates=variants.types, list_all=True)
    chosen = current if current and current.type == name else variants.make(name)
    update(chosen, values, path, variant=name)
    return chosen


def _mapping(value: Any, path: str, fix: str = "") -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(path, value, "must be a mapping of keys to values", fix=fix)
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{path}.{key}", ..., "keys must be strings", fix="quote it")
    return value


def _convert_scalar(value: Any, kind: type, path: str) -> Any:
    if kind is float and not isinstance(value, bool):
        if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    elif type(value) is kind:  # not isinstance: true is not the integer 1
        return value
    raise ConfigError(path, value, f"must be {TYPE_NAMES.get(kind, kind.__name__)}", fix=_type_fix(value, kind))


def _type_fix(value: Any, kind: type) -> str:
    if value is None:
        return "it cannot be null"
    if kind is str and isinstance(value, bool | int | float):
        return f"quote it: '{value}'"
    if kind is int and not isinstance(value, bool) and NUMBER.fullmatch(str(value)):
        return f"nearest valid: {round(float(value))}"
    return ""


def _check_constraint(value: Any, metadata: Mapping[str, Any], path: str) -> None:
    choices = metadata.get("choices")
    if choices and value not in choices:
        names = [str(c) if c is not None else "null" for c in choices]
        raise ConfigError(path, value, "not one of the choices", candidates=names)
    if value is None:
        return
    for name, (sign, holds) in BOUNDS.items():
        bound = metadata.get(name)
        if bound is not None and not holds(value, bound):
            nearest = f"nearest valid: {bound}" if name in ("ge", "le") else ""
            raise ConfigError(path, value, f"must be {sign} {bound}", fix=nearest)
