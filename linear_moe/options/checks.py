"""Checks that several parts of the configuration share; their errors offer the nearest valid value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from linear_moe.options.errors import ConfigError, nearest


def check_divisible(path: str, value: int, by_path: str, by: int) -> None:
    """Raises ConfigError unless the option at `path` is divisible by the option at `by_path`."""
    if value % by:
        most = max(n for n in range(1, by) if value % n == 0)
        fix = f"{nearest(value, step=by)}, or {by_path}={most}"
        raise ConfigError(path, value, f"must be divisible by {by_path} = {by}", fix=fix)


def check_most(path: str, value: float, bound_path: str, bound: float) -> None:
    """Raises ConfigError if the option at `path` is larger than `bound`, the value of the option at `bound_path`."""
    if value > bound:
        constraint = f"must be <= {bound_path} = {bound}"
        raise ConfigError(path, value, constraint, fix=f"nearest valid: {bound}")


def check(path: str, value: int, valid: Callable[[int], bool], constraint: str) -> None:
    """Raises ConfigError unless `valid(value)`, offering the nearest smaller and larger positive valid values."""
    if value >= 1 and valid(value):
        return
    raise ConfigError(path, value, constraint, fix=nearest(value, valid))


def unused(path: str, config: Any, *names: str, needs: str) -> None:
    """Raises ConfigError for the first of the fields `names` of `config` that is not at its default.

    Call it where these fields have no effect; `needs` says which option would give them an effect.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            fix = f"{needs}, or leave it at {field.default!r}"
            raise ConfigError(f"{path}.{field.name}", value, "does nothing here", fix=fix)
