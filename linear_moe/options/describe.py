"""Lists the options of a tree of dataclasses: for people, for programs and for documentation."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from linear_moe.options.errors import ConfigError
from linear_moe.options.fields import Variants

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
ANY = "NAME"
"""The part of a path that stands for a name which the user chooses: `model.symbols.NAME.ffn`."""


@dataclass(frozen=True)
class Option:
    """An option of a tree, as its field declares it.

    Attributes:
        path: dotted path from the root, `training.steps`.
        type: the type of its values, as YAML says them: `int | null`.
        default: the default, of JSON's types; the default kind for options of several kinds.
        choices: the values that it may have; None: all that type and bounds admit.
        bounds: what a number must keep, `>= 1`.
        doc: what the option means.
        variants: the kinds of options that it may hold, such as mixers; None for an option that is a value.
    """

    path: str
    type: str
    default: Any
    choices: tuple[Any, ...] | None
    bounds: tuple[str, ...]
    doc: str
    variants: Variants | None = None

    @property
    def constraint(self) -> str:
        """The bounds or the choices in words; "" where there are none."""
        return ", ".join(self.bounds) if self.choices is None else ", ".join(map(as_yaml, self.choices))

    def to_json(self) -> dict[str, Any]:
        """The option as `linear-moe options --json` prints it."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return row | {"variants": None if self.variants is None else sorted(self.variants.types)}


@dataclass(frozen=True)
class Section:
    """A dataclass of the tree with its own options; those of sections inside have sections of their own.

    Attributes:
        path: dotted path from the root, which is "".
        doc: what the section is for.
        options: the options, in the order of their fields.
    """

    path: str
    doc: str
    options: tuple[Option, ...]


def as_yaml(value: Any) -> str:
    """A value as it may be written in YAML and on the command line."""
    return value if isinstance(value, str) and value else json.dumps(value)


def describe(tree: Any, path: str = "", doc: str = "") -> Iterator[Section]:
    """Yields the section of a dataclass, then those inside it; the values that it has are the defaults."""
    options: list[Option] = []
    inside: list[tuple[Any, str, str]] = []
    for field in dataclasses.fields(tree):
        value, where, entry = getattr(tree, field.name), _join(path, field.name), _entry(tree, field.name)
        if dataclasses.is_dataclass(value) and field.metadata["variants"] is None:
            inside.append((value, where, field.metadata["doc"]))
            continue
        options.append(_option(tree, field, where))
        if entry is not None:
            inside.append((entry(), _join(where, ANY), ""))
    yield Section(path, " ".join(filter(None, [_sentence(doc), _own_doc(type(tree))])), tuple(options))
    for part in inside:
        yield from describe(*part)


def select(tree: Any, path: str, kind: str | None = None) -> list[Section]:
    """The sections at and below a dotted path, or one section with the single option that the path names.

    Args:
        tree: the root.
        path: "" is all of the tree. A path may go on inside options of several kinds, and then means one of the kinds.
        kind: which of the kinds; None: the default one.

    Raises:
        ConfigError: the tree has no such path, or the options at the path are not of several kinds, or not of this one.
    """
    node, where, doc = tree, "", ""
    names = iter(path.split(".") if path else ())
    for name in names:
        fields = {field.name: field for field in dataclasses.fields(node)}
        if name not in fields:
            section = where or "the config"
            raise ConfigError(_join(where, name), ..., f"unknown key of {section}", candidates=fields, near_to=name)
        above, field, value = where, fields[name], getattr(node, name)
        entry, variants = _entry(node, name), field.metadata["variants"]
        where, doc = _join(where, name), field.metadata["doc"]
        if variants is not None and (kind is not None or value is not None):
            value, kind = _of_kind(where, variants, kind or value.type), None
        if entry is not None and (chosen := next(names, None)) is not None:
            value, where, doc = entry(), _join(where, chosen), ""
        if not dataclasses.is_dataclass(value):
            if (below := next(names, None)) is not None:
                raise ConfigError(_join(where, below), ..., f"{where} is a single option")
            _no_kind(kind)
            return [Section(above, "", (_option(node, field, where),))]
        node = value
    _no_kind(kind)
    return list(describe(node, where, doc))


def _of_kind(path: str, variants: Variants, kind: str) -> Any:
    if kind not in variants.types:
        raise ConfigError(f"{path}.type", kind, f"unknown {variants.noun}", candidates=variants.types, list_all=True)
    return variants.make(kind)


def _no_kind(kind: str | None) -> None:
    if kind is not None:
        fix = "name options of which there are several kinds, for example model.mixer"
        raise ConfigError("--type", kind, "does nothing here", fix=fix)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _entry(node: Any, name: str) -> Any:
    """The dataclass that a field's map holds by name; None for a field that is no map of dataclasses."""
    hint = typing.get_type_hints(type(node))[name]
    entry = get_args(hint)[1] if get_origin(hint) is dict else None
    return entry if dataclasses.is_dataclass(entry) else None


def _option(node: Any, field: dataclasses.Field[Any], path: str) -> Option:
    meta, default, kind = field.metadata, getattr(node, field.name), str(field.type).replace("None", "null")
    if _entry(node, field.name) is not None:
        kind = "map of sections"
    if meta["variants"] is not None:
        default, kind = default and default.type, meta["variants"].noun + " | null" * ("null" in kind)
    bounds = tuple(f"{sign} {meta[name]}" for name, sign in SIGNS.items() if meta[name] is not None)
    return Option(path, kind, default, meta["choices"], bounds, meta["doc"], meta["variants"])


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _own_doc(cls: type) -> str:
    """The docstring of a dataclass on one line, up to its list of attributes; "" where Python made the docstring."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("\n\nAttributes:")[0]
    return "" if text.startswith(f"{cls.__name__}(") else " ".join(text.split())
