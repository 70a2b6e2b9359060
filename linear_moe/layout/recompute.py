"""TODO layout.recompute."""

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


def recomputed(config: Config) -> tuple[frozenset[str], frozenset[int]]:
    """What the backward pass computes again, as `Activations` names it, and in which layers."""
    training, total = config.training, config.model.num_layers
    modules = frozenset(training.recompute_modules) | ({"layer"} if training.recompute == "full" else set())
    number = total if training.recompute_layers is None else training.recompute_layers
    return modules, frozenset(i * total // number for i in range(number))
