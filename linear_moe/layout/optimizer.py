"""TODO layout.optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
import torch
import torch.distributed as dist
from torch import Tensor
from linear_moe.config.schema import MuonConfig
from linear_moe.modeling.host import ParameterSpec
from linear_moe.training.optimizer.adamw import AdamW, pieces, round_stochastically


def orthogonalized(spec: ParameterSpec) -> bool:
    """Whether Muon updates a parameter; AdamW does otherwise, also where a linear map has one row or column."""
    return spec.matrices is not None and min(spec.shape[-2:]) > 1


def state_names(spec: ParameterSpec, optimizer: str) -> tuple[str, ...]:
    """The tensors of a parameter's state under `optimizer.type`."""
    return ("momentum",) if optimizer == "muon" and orthogonalized(spec) else ("exp_avg", "exp_avg_sq")
