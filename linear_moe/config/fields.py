"""`opt`: declares a config field with its documentation and constraint. Imports nothing of ours."""

from __future__ import annotations

from dataclasses import field
from typing import Any


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
