"""TODO modeling.dims."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast
import torch
from torch import Tensor, nn
from linear_moe.options.fields import OneOf, opt
from linear_moe.modeling.host import Host
from linear_moe.modeling.deferred import later, weights_of
from linear_moe.modeling.mixers.registry import MIXERS, mixer_config
from linear_moe.modeling.ops.sequence import Pieces, once_by, pieces_of
from linear_moe.modeling.ops.fused.short_conv import tokens_before


@dataclass(frozen=True)
class Dims:
    """What a mixer must know of the model around it."""

    hidden_size: int
    num_heads: int
    num_layers: int
    layer: int  # global index of this layer
    norm_eps: float
    init_std: float
    output_init_std: float  # of projections that write into the residual stream
