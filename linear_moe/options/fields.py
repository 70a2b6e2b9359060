"""`opt` declares an option with its documentation and constraint; `OneOf` options of which there are several kinds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import field
from typing import Any, ClassVar, Self


def opt(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A config field: its default (a callable: the default's factory), documentation and constraint."""
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


class OneOf:
    """Base of dataclasses that stand for one another and are told apart by their field `type`.

    Attributes:
        noun: what one of them is called in messages.
    """

    noun: ClassVar[str]
    type: str

    @classmethod
    def kinds(cls) -> Collection[str]:
        """The names that `type` may have."""
        raise NotImplementedError

    @classmethod
    def of_kind(cls, kind: str) -> Self:
        """The dataclass of `kind`, one of `kinds()`, with its defaults."""
        raise NotImplementedError
