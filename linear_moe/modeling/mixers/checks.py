"""Checks that mixers' `validate` share: each names the field, the constraint and the nearest values that satisfy it."""

from __future__ import annotations

import math
from collections.abc import Callable

from linear_moe.config.errors import ConfigError


def check(path: str, value: int, valid: Callable[[int], bool], constraint: str) -> None:
    """Raises ConfigError unless `valid(value)`, offering the nearest smaller and larger positive valid values."""
    if value >= 1 and valid(value):
        return
    below = next((n for n in range(value - 1, 0, -1) if valid(n)), None)
    above = next((n for n in range(max(value, 0) + 1, 8 * max(value, 32)) if valid(n)), None)
    near = " or ".join(str(n) for n in (below, above) if n is not None)
    raise ConfigError(path, value, constraint, fix=f"nearest valid: {near}" if near else "")


def scaled(path: str, size: int, factor: float, what: str) -> int:
    """`size * factor`; raises ConfigError unless it is a positive whole number."""
    product = size * factor
    whole = round(product)
    if whole < 1 or not math.isclose(product, whole, rel_tol=1e-9):
        near = " or ".join(f"{n / size:g}" for n in sorted({max(1, math.floor(product)), math.ceil(product)}))
        raise ConfigError(
            path, factor, f"{what} {size} times it must be a positive whole number", fix=f"nearest: {near}"
        )
    return whole
