"""Checks that mixers' `validate` share: each names the field, the constraint and the nearest values that satisfy it."""

from __future__ import annotations

import math
from collections.abc import Callable

from linear_moe.config.errors import ConfigError, nearest


def check(path: str, value: int, valid: Callable[[int], bool], constraint: str) -> None:
    """Raises ConfigError unless `valid(value)`, offering the nearest smaller and larger positive valid values."""
    if value >= 1 and valid(value):
        return
    raise ConfigError(path, value, constraint, fix=nearest(value, valid))


def scaled(path: str, size: int, factor: float, what: str, multiple: int = 1) -> int:
    """`size * factor`; raises ConfigError unless it is a positive multiple of `multiple`, a number of tensor ranks."""
    product = size * factor / multiple
    whole = round(product)
    if whole < 1 or not math.isclose(product, whole, rel_tol=1e-9):
        near = {max(1, math.floor(product)), math.ceil(product)}
        constraint = "a positive whole number" if multiple == 1 else f"a multiple of parallel.tensor = {multiple}"
        raise ConfigError(
            path,
            factor,
            f"{what} {size} times it must be {constraint}",
            fix="nearest: " + " or ".join(f"{n * multiple / size:g}" for n in sorted(near)),
        )
    return whole * multiple
