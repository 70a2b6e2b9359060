"""Routed SwiGLU experts as one differentiable operation, which keeps what a dense SwiGLU of the same width keeps.

A *slot* is one of the k experts that one of n tokens is sent to: `token * k + choice`. Slots sorted by expert are the
*rows* that grouped GEMMs work on. All sizes follow from shapes and all counts stay on the device, so nothing here waits
for it. Triton kernels on CUDA, PyTorch elsewhere.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.fused import has_triton, upcast

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10

STEPS = frozenset({"up", "down_backward", "outer"})
"""What can be one Triton kernel: tokens to activations, and back, and the projections' gradients."""

FUSE: frozenset[str] = frozenset()
"""Those of STEPS that are."""


@dataclass(frozen=True)
class Assignment:
    """Which rows are whose. Without `slot` and `row` the tokens are themselves the rows: k = 1, sorted by expert.

    Attributes:
        counts: `[E]` int32, rows of each expert; they may sum to fewer than there are slots, the rest having none.
        ends: `[E]` int32, where each expert's rows end.
        slot: `[M]` int32, the slot of each row, M = n * k; slots without an expert come last.
        row: `[n, k]` int32, the row of each slot.
    """

    counts: Tensor
    ends: Tensor
    slot: Tensor | None = None
    row: Tensor | None = None

    @classmethod
    def of_rows(cls, counts: Tensor) -> Assignment:
        """For tokens already sorted by expert, `counts [E]` of each."""
        counts = counts.to(torch.int32)
        return cls(counts, counts.cumsum(0, dtype=torch.int32))

    @property
    def top_k(self) -> int:
        return 1 if self.row is None else self.row.shape[1]


def assign(index: Tensor, num_experts: int) -> Assignment:
    """Sort the slots of `index [n, k]` (integers in [0, E); E: no expert) by expert, and by token within an expert."""
    kernels = _kernels(index)
    if kernels is not None and kernels.can_assign(num_experts):
        return Assignment(*kernels.assign(index, num_experts))
    flat = index.flatten()
    slot = flat.argsort(stable=True)
    places = torch.arange(len(flat), dtype=torch.int32, device=index.device)
    row = torch.empty_like(places).scatter_(0, slot, places).view(index.shape)
    counts = places.new_zeros(num_experts + 1).scatter_add_(0, flat.long(), torch.ones_like(places))[:-1]
    return Assignment(counts, counts.cumsum(0, dtype=torch.int32), slot.to(torch.int32), row)


# -- definitions: differentiable PyTorch -------------------------------------------------------------------------------
def collect(x: Tensor, to: Assignment) -> Tensor:
    """Tokens `[n, D]` -> rows `[M, D]`."""
    return x if to.slot is None else x.index_select(0, to.slot // to.top_k)


def row_weights(weights: Tensor, to: Assignment) -> Tensor:
    """Weights of the slots, `[n, k]` or flat -> of the rows, `[M]`."""
    return weights.flatten() if to.slot is None else weights.flatten().index_select(0, to.slot)


def combine(y: Tensor, to: Assignment) -> Tensor:
    """Rows `[M, D]` -> tokens `[n, D]`, the sum of each one's k rows in fp32, rounded once; no-expert slots add 0."""
    if to.row is None:
        return y
    has_expert = (to.row < to.ends[-1]).unsqueeze(-1)
    chosen = y.index_select(0, to.row.flatten()).view(*to.row.shape, y.shape[1])
    return upcast(chosen).where(has_expert, 0.0).sum(1).to(y.dtype)


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
    rows = torch.arange(len(grad), device=grad.device)
    dweight = (d * h).sum(-1).where(rows < to.ends[-1], 0.0).to(weights.dtype)
    d = d * weight
    gate_up.copy_(torch.cat([d * up * (s + swish * (1 - s)), d * swish], -1))
    grad.copy_(h * weight)
    if to.row is None:
        return dweight.view(weights.shape)
    return dweight.index_select(0, to.row.flatten()).view(weights.shape)


# -- the operation -----------------------------------------------------------------------------------------------------
def experts(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    to: Assignment,
    fuse: frozenset[str] | None = None,
) -> Tensor:
    """`y[t] = sum_j weights[t, j] * down_e(silu(gate_e(x[t])) * up_e(x[t]))`, e the expert of slot (t, j).

    Differentiable once in `x`, `weights` and both projections. For the backward pass it keeps its inputs and the rows'
    gate and up projections, which that pass overwrites: neither x nor the experts' outputs are kept by rows, and the
    gradient of a weight is the product of the activation and the gradient of the weighted activation.

    Args:
        x: `[n, D]`.
        weights: `[n, k]`, or `[n]` where `to` has no slots; fp32.
        gate_up_proj: `[E, 2, F, D]` in x's dtype, gates first.
        down_proj: `[E, D, F]`.
        to: from `assign`, or `Assignment.of_rows`.
        fuse: which of STEPS to compute by Triton kernels that gather and activate within a product, where there are
            such kernels, instead of grouped_mm with those around it; None: the faster ones.

    Returns:
        `[n, D]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    num, two, ffn, hidden = gate_up_proj.shape
    if two != 2 or down_proj.shape != (num, hidden, ffn) or x.shape[1:] != (hidden,) or len(to.counts) != num:
        raise ValueError(
            f"x {[*x.shape]} and counts {[*to.counts.shape]} do not fit gate_up_proj [E, 2, F, D] = "
            f"{[*gate_up_proj.shape]} and down_proj [E, D, F] = {[*down_proj.shape]}"
        )
    if weights.numel() != len(x) * to.top_k or (to.row is not None and len(to.row) != len(x)):
        raise ValueError(f"{len(x)} tokens with {to.top_k} experts each do not fit weights {[*weights.shape]}")
    fuse = FUSE if fuse is None else fuse
    assert fuse <= STEPS, fuse
    if _kernels(x) is None or x.element_size() != 2 or hidden % 8 or ffn % 8:  # the tensor memory accelerator's terms
        fuse = frozenset()
    return _Experts.apply(fuse, x, weights, gate_up_proj, down_proj, to.counts, to.ends, to.slot, to.row)


def _kernels(x: Tensor) -> Any:
    """The Triton kernels of this module if `x` is theirs, else None."""
    if x.is_cuda and x.dtype != torch.float64 and has_triton():
        return importlib.import_module("linear_moe.modeling.ops.experts_gpu")
    return None


def _products() -> Any:
    return importlib.import_module("linear_moe.modeling.ops.experts_gemm_gpu")


class _Definition:
    """The functions above, behind the interface of the kernels."""

    collect, combine, activate = staticmethod(collect), staticmethod(combine), staticmethod(activate)
    activate_backward = staticmethod(activate_backward)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        fuse: frozenset[str],
        x: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *indices: Tensor | None,
    ) -> Tensor:
        to = Assignment(*indices)  # type: ignore[arg-type]
        ctx.fuse, ctx.kernels = fuse, _kernels(x) or _Definition
        with torch.cuda.device_of(x):  # where Triton launches; autograd sees to the backward pass
            if "up" in fuse:
                gate_up, h = _products().up(x, gate_up_proj, weights, to)
            else:
                rows = ctx.kernels.collect(x, to)
                gate_up = grouped_mm(rows, gate_up_proj.flatten(1, 2).transpose(1, 2), offs=to.ends)
                del rows
                h = ctx.kernels.activate(gate_up, weights, to)
            y = grouped_mm(h, down_proj.transpose(1, 2), offs=to.ends)
            del h
            ctx.save_for_backward(x, weights, gate_up_proj, down_proj, gate_up, *indices)
            return ctx.kernels.combine(y, to)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weights, gate_up_proj, down_proj, gate_up, *indices = ctx.saved_tensors
        to, fuse, kernels, (need_x, _, need_up, need_down) = (
            Assignment(*indices), ctx.fuse, ctx.kernels, ctx.needs_input_grad[1:5],
        )  # fmt: skip
        dx = dup = ddown = None
        grad = grad.contiguous()
        dy = grad if fuse >= {"down_backward", "outer"} else kernels.collect(grad, to)
        if "down_backward" in fuse:
            h, dweights = _products().down_backward(grad, down_proj, gate_up, weights, to)
        else:
            h = grouped_mm(dy, down_proj, offs=to.ends)
            dweights = kernels.activate_backward(h, gate_up, weights, to)
        torch.autograd.graph.increment_version(gate_up)  # autograd refuses to use it a second time
        if need_down and "outer" in fuse:
            ddown = _products().outer(grad, h, to, gather_left=True, gather_right=False)
        elif need_down:
            ddown = grouped_mm(dy.t(), h, offs=to.ends)
        del dy, h
        if need_x:
            dx = kernels.combine(grouped_mm(gate_up, gate_up_proj.flatten(1, 2), offs=to.ends), to)
        if need_up and "outer" in fuse:
            dup = _products().outer(gate_up, x, to, gather_left=False, gather_right=True).view(gate_up_proj.shape)
        elif need_up:
            dup = grouped_mm(gate_up.t(), kernels.collect(x, to), offs=to.ends).view(gate_up_proj.shape)
        return None, dx, dweights, dup, ddown, None, None, None, None
