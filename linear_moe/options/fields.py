"""Declaration of options: `opt` makes a dataclass field with documentation and a constraint."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variants:
    """Dataclasses of which an option holds one, for example the configs of mixers; their field `type` says which.

    Attributes:
        noun: name of the option's value in messages, for example "mixer".
        types: values that `type` may have.
        make: `make(type)` returns the dataclass of a type with its defaults.
    """

    noun: str
    types: Collection[str]
    make: Callable[[str], Any]


def opt(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[Any, ...] | None = None,
    variants: Variants | None = None,
) -> Any:
    """Declares a dataclass field with documentation and constraints; a callable `default` is a default factory."""
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "variants": variants}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
