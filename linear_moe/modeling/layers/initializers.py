"""Initialisers that papers or their code publish, for `Host.parameter(init=...)`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linear_moe.modeling.host import Init


def log_uniform_rate(low: float, high: float) -> Init:
    """Initialiser of `A_log = log A` with A ~ U(low, high) (Mamba-2, arXiv 2405.21060: U(1, 16))."""
    return lambda t, g: t.uniform_(low, high, generator=g).log_()


def inverse_softplus_step(low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Init:
    """Initialiser of `dt_bias`: softplus(dt_bias) is log-uniform in [low, high] (Mamba, arXiv 2312.00752, 3.6)."""

    def fill(t: Tensor, generator: torch.Generator) -> None:
        dt = t.uniform_(math.log(low), math.log(high), generator=generator).exp_().clamp_(min=floor)
        t.copy_(dt + torch.log(-torch.expm1(-dt)))

    return fill


def uniform(bound: float) -> Init:
    """Initialiser with a uniform distribution from -bound to bound."""
    return lambda t, g: t.uniform_(-bound, bound, generator=g)


def log_integers() -> Init:
    """Initialiser of `A_log = log A`, A = 1 .. S along the last dimension: S4D-Real (Mamba, arXiv 2312.00752, 3.6)."""
    return lambda t, g: t.copy_(torch.arange(1, t.shape[-1] + 1).log().expand_as(t))


def token_shift_share(power: float, less: float = 0.0) -> Init:
    """Initialiser of RWKV's share of the token before, for each channel: from 1 down to almost 0, minus `less`."""
    return lambda t, _: t.copy_(1 - (torch.arange(len(t), device=t.device) / len(t)) ** power - less)


def orthogonal(gain: float) -> Init:
    """Initialiser with orthonormal rows or columns, whichever are fewer, times `gain`."""
    return lambda t, g: torch.nn.init.orthogonal_(t, gain, generator=g)
