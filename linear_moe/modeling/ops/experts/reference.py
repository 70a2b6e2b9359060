"""The operations around the experts' GEMMs in PyTorch: the definitions that the kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.experts.assignment import Assignment
from linear_moe.modeling.ops.kernels import upcast


def collect(x: Tensor, to: Assignment) -> Tensor:
    """Returns the rows `[M, D]` of tokens `x [n, D]`."""
    return x if to.slot is None else x.index_select(0, to.slot // to.top_k)


def row_weights(weights: Tensor, to: Assignment) -> Tensor:
    """Returns the weights of the rows, `[M]`, from those of the slots, `[n, k]` or flat."""
    return weights.flatten() if to.slot is None else weights.flatten().index_select(0, to.slot)


def slot_sums(parts: Tensor, weights: Tensor, to: Assignment) -> Tensor:
    """Returns the gradient of `weights`, the sum of its `parts [M, P]` by row; 0 for slots without an expert."""
    rows = torch.arange(len(parts), device=parts.device)
    total = parts.sum(-1).where(rows < to.ends[-1], 0.0).to(weights.dtype)
    return (total if to.row is None else total.index_select(0, to.row.flatten())).view(weights.shape)


def combine(y: Tensor, to: Assignment, weights: Tensor | None = None) -> Tensor:
    """Sums the k rows of each token in fp32, rounded once: `y [M, D]` -> `[n, D]`. Slots without an expert add 0.

    Args:
        y: the rows.
        to: the assignment of tokens to experts.
        weights: factors of the rows by slot, `[n, k]` or flat; None: all are 1.
    """
    if to.row is None and weights is None:
        return y
    row = torch.arange(len(y), device=y.device).unsqueeze(1) if to.row is None else to.row
    chosen = upcast(y.index_select(0, row.flatten())).view(*row.shape, y.shape[1])
    if weights is not None:
        chosen = chosen * weights.view(*row.shape, 1)
    return chosen.where((row < to.ends[-1]).unsqueeze(-1), 0.0).sum(1).to(y.dtype)


def activate(gate_up: Tensor, weights: Tensor, to: Assignment) -> Tensor:
    """Returns the weighted activation `silu(gate) * up * weight` of `gate_up [M, 2F]`, computed in fp32: `[M, F]`."""
    gate, up = upcast(gate_up).chunk(2, -1)
    return (F.silu(gate) * up * row_weights(weights, to).unsqueeze(-1)).to(gate_up.dtype)


def activate_backward(grad: Tensor, gate_up: Tensor, weights: Tensor, to: Assignment) -> Tensor:
    """Computes the backward pass of `activate`, and its output once more, in place.

    `grad [M, F]`, the gradient of the output, is overwritten with the output, and `gate_up` with its own gradient.

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
    """The functions of this module, behind the interface of the module `experts.triton`."""

    collect, combine, activate = staticmethod(collect), staticmethod(combine), staticmethod(activate)
    activate_backward, slot_sums = staticmethod(activate_backward), staticmethod(slot_sums)
