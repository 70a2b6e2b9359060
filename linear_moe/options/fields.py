"""`opt` declares an option, a dataclass field with its documentation and constraint."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variants:
    """The dataclasses that one option may hold, which their field `type` tells apart: the configs of mixers.

    Attributes:
        noun: what one of them is called in messages.
        types: the values that `type` may have.
        make: the dataclass of a type, with its defaults.
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
    """A dataclass field with a default (a callable is the default's factory), documentation and constraint."""
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "variants": variants}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
