"""Forget gates bounded from below, `f = b + (1 - b) sigmoid(x)` with `b = sigmoid(logit)` (HGRN, arXiv 2311.04823)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.kernels import fused, upcast
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE

MIN_FORGET = math.exp(MIN_GATE)


def bounded_gate(x: Tensor, y: Tensor | None = None, logit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns `log f` in fp32, and `(1 - f) silu(y)`, or `1 - f` without y, in x's dtype.

    `log f` is clamped to at least -80, as the recurrences' kernels need it; clamped values have no gradient. Triton
    kernels compute both on CUDA; only the inputs are saved for backward.

    Args:
        x, y: `[..., C]`.
        logit: `[C]`; None: b = 0.

    Raises:
        ValueError: a shape that does not fit.
    """
    if y is not None and y.shape != x.shape:
        raise ValueError(f"y must be {tuple(x.shape)}, got {tuple(y.shape)}")
    if logit is not None and tuple(logit.shape) != (x.shape[-1],):
        raise ValueError(f"logit must be [{x.shape[-1]}], got {tuple(logit.shape)}")
    gates: tuple[Tensor, Tensor] = fused(definition, "bounded_gate_triton", x, y, logit)
    return gates


def definition(x: Tensor, y: Tensor | None, logit: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `bounded_gate`."""
    z = upcast(x)
    log_gate, rest = F.logsigmoid(z), torch.sigmoid(-z)
    if logit is not None:
        bound = upcast(logit)
        log_gate = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + log_gate)
        rest = rest * torch.sigmoid(-bound)
    if y is not None:
        rest = rest * F.silu(upcast(y))
    return log_gate.clamp(min=MIN_GATE), rest.to(x.dtype)
