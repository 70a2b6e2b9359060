"""TODO checks.fields."""

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
from linear_moe.checks.training import check_batch
from linear_moe.options.checks import check_divisible
from linear_moe.checks.experts import check_ffn
from linear_moe.checks.mixers import check_mixers
from linear_moe.checks.parallel import check_parallel
from linear_moe.checks.training import check_recompute
from linear_moe.checks.training import check_schedule
from linear_moe.layout.processes import parallel_layout


def validate_fields(config: Config, world: int | None = None) -> None:
    """`validate` without files, and without a search for what would work."""
    for path, folder in (("run", config.run), ("data.corpus", config.data.corpus), ("data.cache", config.data.cache)):
        if not folder.strip():
            raise ConfigError(path, folder, "must not be empty")
    layers = resolve_layers(config.model)
    check_mixers(config, layers)
    check_ffn(config, layers)
    check_parallel(config, layers)
    _check_vocabulary(config)
    check_schedule(config)
    if config.optimizer.type != "muon":
        unused("optimizer.muon", config.optimizer.muon, *vars(config.optimizer.muon), needs="set optimizer.type=muon")
    check_recompute(config)
    if world is not None:
        check_batch(config, parallel_layout(config, world))


def _check_vocabulary(config: Config) -> None:
    rows, tensor = vocab_size(config), config.parallel.tensor
    if config.model.vocab_size is None:  # not `rows`: a trained tokenizer may come out smaller than asked for
        check_divisible("model.vocab_multiple", config.model.vocab_multiple, "parallel.tensor", tensor)
    else:
        check_divisible("model.vocab_size", rows, "parallel.tensor", tensor)
