"""Constraints that options of several parts have in common, each with the nearest valid value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from linear_moe.options.errors import ConfigError, nearest


def check_divisible(path: str, value: int, by_path: str, by: int) -> None:
    if value % by:
        most = max(n for n in range(1, by) if value % n == 0)
        fix = f"{nearest(value, step=by)}, or {by_path}={most}"
        raise ConfigError(path, value, f"must be divisible by {by_path} = {by}", fix=fix)


def check_most(path: str, value: float, bound_path: str, bound: float) -> None:
    if value > bound:
        constraint = f"must be <= {bound_path} = {bound}"
        raise ConfigError(path, value, constraint, fix=f"nearest valid: {bound}")


def check(path: str, value: int, valid: Callable[[int], bool], constraint: str) -> None:
    """Raises ConfigError unless `valid(value)`, offering the nearest smaller and larger positive valid values."""
    if value >= 1 and valid(value):
        return
    raise ConfigError(path, value, constraint, fix=nearest(value, valid))


def unused(path: str, config: Any, *names: str, needs: str) -> None:
    """Raises ConfigError for the first of these fields that is not at its default, where it would do nothing."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            fix = f"{needs}, or leave it at {field.default!r}"
            raise ConfigError(f"{path}.{field.name}", value, "does nothing here", fix=fix)
