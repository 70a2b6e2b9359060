"""Checks that mixers' `validate` share; errors name the option, the constraint and the nearest values that meet it."""

from __future__ import annotations

import math

from linear_moe.modeling.ops.recurrences.delta.fla import MAX_KEY_DIM
from linear_moe.options.checks import check
from linear_moe.options.errors import ConfigError


def check_heads(path: str, heads: int, tensor: int, divided: dict[str, int]) -> None:
    """Raises ConfigError unless `heads` is a multiple of `tensor` and divides all sizes in `divided`, given by name."""
    check(
        path,
        heads,
        lambda n: n % tensor == 0 and all(size % n == 0 for size in divided.values()),
        f"must divide {' and '.join(f'{name} {size}' for name, size in divided.items())} and be divisible by "
        f"parallel.tensor = {tensor}",
    )


def check_head_dims(path: str, head_dim: int, expand_v: float) -> None:
    """Raises ConfigError if key heads are too large for the delta rule's kernels, or the value size is not whole."""
    limit = f"must be at most {MAX_KEY_DIM}, the GPU kernels' limit"
    check(f"{path}.head_dim", head_dim, lambda n: n <= MAX_KEY_DIM, limit)
    scaled(f"{path}.expand_v", head_dim, expand_v, "head_dim")


def scaled(path: str, size: int, factor: float, what: str, multiple: int = 1) -> int:
    """Returns `size * factor`; raises ConfigError unless the product is a positive multiple of `multiple`.

    `what` is the name of `size`, and `path` that of `factor`, in the message; `multiple` is the number of tensor ranks.
    """
    product = size * factor / multiple
    whole = round(product)
    if whole < 1 or not math.isclose(product, whole, rel_tol=1e-9):
        near = {max(1, math.floor(product)), math.ceil(product)}
        constraint = "a positive whole number" if multiple == 1 else f"a multiple of parallel.tensor = {multiple}"
        raise ConfigError(
            path,
            factor,
            f"{what} {size} times this factor must be {constraint}",
            fix="nearest: " + " or ".join(f"{n * multiple / size:.12g}" for n in sorted(near)),
        )
    return whole * multiple
