"""TODO options.checks."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any
from linear_moe.options.errors import ConfigError, nearest
from linear_moe.config.schema import Config, ParallelConfig
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.activations import MODULES
from linear_moe.modeling.host import DTYPES
from linear_moe.options.checks import check, unused
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.pattern import ResolvedLayer, resolve_layers
from linear_moe.layout.pipeline import default_split
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any
from linear_moe.options.errors import ConfigError, nearest
from linear_moe.modeling.ops.recurrences.delta.fla import MAX_KEY_DIM


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
