"""Forget gates bounded from below, `f = b + (1 - b) sigmoid(x)` with `b = sigmoid(logit)` (HGRN, arXiv 2311.04823)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.decay.gpu import MIN_GATE
from linear_moe.modeling.ops.fused import fused, upcast

MIN_FORGET = math.exp(MIN_GATE)


def bounded_gate(x: Tensor, logit: Tensor | None = None, *, complement: bool = False) -> Tensor:
    """`log f` in fp32, or `complement`: `1 - f` in x's dtype.

    `log f` is at least -80, as the recurrences' kernels need it, and has no gradient there. Triton kernels on
    CUDA; only the inputs are saved for backward.

    Args:
        x: `[..., C]`.
        logit: `[C]`; None: b = 0.

    Raises:
        ValueError: a shape that does not fit.
    """
    if logit is not None and tuple(logit.shape) != (x.shape[-1],):
        raise ValueError(f"logit must be [{x.shape[-1]}], got {tuple(logit.shape)}")
    return fused(definition, "bounded_gate_gpu", x, logit, complement=complement)


def definition(x: Tensor, logit: Tensor | None, *, complement: bool) -> Tensor:
    """See `bounded_gate`."""
    y, bound = upcast(x), None if logit is None else upcast(logit)
    if complement:
        rest = torch.sigmoid(-y)
        return (rest if bound is None else rest * torch.sigmoid(-bound)).to(x.dtype)
    log_gate = F.logsigmoid(y)
    if bound is not None:
        log_gate = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + log_gate)
    return log_gate.clamp(min=MIN_GATE)
