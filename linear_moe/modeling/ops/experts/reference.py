"""The experts' operation in PyTorch: the definition that kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.experts.assignment import Assignment
from linear_moe.modeling.ops.kernels import upcast


def collect(x: Tensor, to: Assignment) -> Tensor:
    """Tokens `[n, D]` -> rows `[M, D]`."""
    return x if to.slot is None else x.index_select(0, to.slot // to.top_k)


def row_weights(weights: Tensor, to: Assignment) -> Tensor:
    """Weights of the slots, `[n, k]` or flat -> of the rows, `[M]`."""
    return weights.flatten() if to.slot is None else weights.flatten().index_select(0, to.slot)


def slot_sums(parts: Tensor, weights: Tensor, to: Assignment) -> Tensor:
    """`parts [M, P]` of the gradients of the rows' weights -> those of `weights`; 0 for slots without an expert."""
    rows = torch.arange(len(parts), device=parts.device)
    total = parts.sum(-1).where(rows < to.ends[-1], 0.0).to(weights.dtype)
    return (total if to.row is None else total.index_select(0, to.row.flatten())).view(weights.shape)


def combine(y: Tensor, to: Assignment, weights: Tensor | None = None) -> Tensor:
    """Rows `[M, D]` -> tokens `[n, D]`, the sum of each one's k rows in fp32, rounded once; no-expert slots add 0.

    With `weights`, `[n, k]` or flat, rows are multiplied by them.
    """
    if to.row is None and weights is None:
        return y
    row = torch.arange(len(y), device=y.device).unsqueeze(1) if to.row is None else to.row
    chosen = upcast(y.index_select(0, row.flatten())).view(*row.shape, y.shape[1])
    if weights is not None:
        chosen = chosen * weights.view(*row.shape, 1)
    return chosen.where((row < to.ends[-1]).unsqueeze(-1), 0.0).sum(1).to(y.dtype)


def activate(gate_up: Tensor, weights: Tensor, to: Assignment) -> Tensor:
    """`silu(gate) * up * weight` of `gate_up [M, 2F]`, computed in fp32: `[M, F]`."""
    gate, up = upcast(gate_up).chunk(2, -1)
    return (F.silu(gate) * up * row_weights(weights, to).unsqueeze(-1)).to(gate_up.dtype)


def activate_backward(grad: Tensor, gate_up: Tensor, weights: Tensor, to: Assignment) -> Tensor:
    """What the backward pass needs of `activate`, in place.

    `grad [M, F]` of its output becomes that output again, `gate_up` becomes its own gradient.

    Returns:
        The gradient of `weights`, in their shape; 0 for slots without an expert.
    """
    gate, up = upcast(gate_up).chunk(2, -1)
    d, weight = upcast(grad), upcast(row_weights(weights, to)).unsqueeze(-1)
    s = gate.sigmoid()
    swish = gate * s
    h = swish * up
    dweight = slot_sums((d * h).sum(-1, keepdim=True), weights, to)
    d = d * weight
    gate_up.copy_(torch.cat([d * up * (s + swish * (1 - s)), d * swish], -1))
    grad.copy_(h * weight)
    return dweight


class Reference:
    """The functions above, behind the interface of the kernels."""

    collect, combine, activate = staticmethod(collect), staticmethod(combine), staticmethod(activate)
    activate_backward, slot_sums = staticmethod(activate_backward), staticmethod(slot_sums)
