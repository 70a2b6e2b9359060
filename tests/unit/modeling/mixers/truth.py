"""Comparison of a mixer with an independent implementation of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.tokens import TokenLayout
from tests.tolerances import FP32, assert_close
from tests.unit.modeling.mixers.common import stream

BATCH, LENGTH = 2, 11


def rows(x: Tensor) -> Tensor:
    return x.view(BATCH, LENGTH, -1)


def randomise(module: torch.nn.Module) -> None:
    """Moves every parameter away from its initial value, so that a swapped or ignored parameter shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def load(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    module.load_state_dict({k: v.clone() for k, v in weights.items()}, strict=True)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution `y_t = sum_i w_i x_{t - size + 1 + i}` per channel of `x [..., T, C]`, then SiLU; `w [C, size]`."""
    y = (F.pad(x.mT, (weight.shape[1] - 1, 0)).unfold(-1, weight.shape[1], 1) * weight[:, None]).sum(-1).mT
    return y * torch.sigmoid(y)


def compare(ours: Mixer, theirs: Any) -> None:
    """Compares outputs, and gradients with respect to the input, with those of `theirs(x [B, T, hidden])`."""
    x, weight = stream(BATCH, LENGTH), stream(BATCH, LENGTH, seed=1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = ours(a, TokenLayout(BATCH, LENGTH)), theirs(rows(b)).flatten(0, 1)
    assert_close(actual, expected, FP32, "output")
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    assert a.grad is not None and b.grad is not None
    assert_close(a.grad, b.grad, FP32, "gradient")
