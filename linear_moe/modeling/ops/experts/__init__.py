"""Routed SwiGLU experts as one differentiable operation, which keeps as much memory as a dense SwiGLU of equal width.

A *slot* is one of the k experts that one of n tokens is sent to: `token * k + choice`. Slots sorted by expert are the
*rows* that grouped GEMMs work on. All sizes follow from shapes and all counts stay on the device, so no function here
waits for the device. Several `Products` implement the GEMMs; the operations around them are Triton kernels on CUDA and
PyTorch functions elsewhere.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.experts.assignment import Assignment, offsets_of
from linear_moe.modeling.ops.experts.products import Products
from linear_moe.modeling.ops.experts.reference import Reference
from linear_moe.modeling.ops.kernels import has_triton

PRODUCTS = ("auto", "grouped", "grouped_mm", "triton", "quack")
"""Implementations of the GEMMs: `grouped_mm` (PyTorch), `triton` (our kernels) and `quack` (quack-kernels). `grouped`
means triton on Hopper where it takes the inputs, else grouped_mm. `auto` means quack on Hopper where it takes the
inputs, else grouped."""


def assign(index: Tensor, num_experts: int) -> Assignment:
    """Sorts the slots of `index [n, k]` (integers in [0, E); E: no expert) by expert, and by token within an expert."""
    kernels = _kernels(index)
    if kernels is not None and kernels.can_assign(num_experts):
        return Assignment(*kernels.assign(index, num_experts))
    flat = index.flatten()
    slot = flat.argsort(stable=True)
    places = torch.arange(len(flat), dtype=torch.int32, device=index.device)
    row = torch.empty_like(places).scatter_(0, slot, places).view(index.shape)
    counts = places.new_zeros(num_experts + 1).scatter_add_(0, flat.long(), torch.ones_like(places))[:-1]
    return Assignment(counts, offsets_of(counts), slot.to(torch.int32), row)


# -- products ----------------------------------------------------------------------------------------------------------


def refused_by_quack(dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns the reason why quack's GEMMs cannot compute in `dtype` on `device`; None: they can."""
    if dtype != torch.bfloat16:
        return f"multiplies bf16, not {str(dtype).removeprefix('torch.')}"
    if not _has_quack():
        return "needs quack-kernels: pip install 'linear-moe[quack]'"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"needs a GPU of compute capability 9.0 or above, not {name}"
    return None


@cache
def _has_quack() -> bool:
    return find_spec("quack") is not None and find_spec("cutlass") is not None


def _kernels(x: Tensor) -> Any:
    """Returns the module of Triton kernels if they take `x`, else None."""
    if x.is_cuda and x.dtype != torch.float64 and has_triton():
        return importlib.import_module("linear_moe.modeling.ops.experts.triton")
    return None


def _products(name: str, x: Tensor, ffn: int) -> Products:
    """Returns the implementation of the GEMMs that `name` stands for (see `experts`), for tokens `x` and F = `ffn`."""
    if name not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {name!r}")
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
    by_16_bytes = x.shape[1] % 8 == 0 and ffn % 8 == 0  # for the tensor memory accelerator
    around = _kernels(x)
    if name == "quack" or (name == "auto" and hopper):
        refusal = refused_by_quack(x.dtype, x.device)
        if refusal is None and not by_16_bytes:
            refusal = f"needs D and F divisible by 8, not {x.shape[1]} and {ffn}"
        if name == "quack" and refusal is not None:
            raise ValueError(f"products 'quack' {refusal}")
        name = "quack" if refusal is None else "triton"
    if name in ("auto", "grouped"):
        name = "triton" if hopper else "grouped_mm"
    if name == "triton" and (around is None or x.element_size() != 2 or not by_16_bytes):
        name = "grouped_mm"
    if name == "grouped_mm" or len(x) == 0:
        return Products(around or Reference)
    module = {"triton": "gemm_triton", "quack": "quack"}[name]
    return importlib.import_module(f"linear_moe.modeling.ops.experts.{module}").Fused(around or Reference)


# -- the operation -----------------------------------------------------------------------------------------------------
def experts(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    to: Assignment,
    products: str = "auto",
    keep: bool = True,
) -> Tensor:
    """Applies the experts of every token, and sums their weighted outputs.

    `y[t] = sum_j weights[t, j] * down_e(silu(gate_e(x[t])) * up_e(x[t]))`, where e is the expert of slot (t, j).

    The operation is differentiable once in `x`, `weights` and both projections. For the backward pass it keeps its
    inputs and, with `keep`, the gate and up projections of the rows, which the backward pass overwrites. Neither x nor
    the experts' outputs are kept by rows: the gradient of a weight is the product of the activation and the gradient of
    the weighted activation.

    Args:
        x: `[n, D]`.
        weights: `[n, k]`, or `[n]` where `to` has no slots; fp32.
        gate_up_proj: `[E, 2, F, D]` in x's dtype, gates first.
        down_proj: `[E, D, F]`.
        to: the assignment of tokens to experts, from `assign` or `Assignment.of_rows`.
        products: one of PRODUCTS. "triton" falls back to grouped_mm on a CPU, and for dtypes and sizes that the kernels
            do not take.
        keep: whether to keep the gate and up projections; otherwise the backward pass computes them again.

    Returns:
        `[n, D]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit; `products` "quack" where quack's GEMMs cannot compute.
    """
    num, two, ffn, hidden = gate_up_proj.shape
    if two != 2 or down_proj.shape != (num, hidden, ffn) or x.shape[1:] != (hidden,) or len(to.counts) != num:
        raise ValueError(
            f"x {[*x.shape]} and counts {[*to.counts.shape]} do not fit gate_up_proj [E, 2, F, D] = "
            f"{[*gate_up_proj.shape]} and down_proj [E, D, F] = {[*down_proj.shape]}"
        )
    if weights.numel() != len(x) * to.top_k or (to.row is not None and len(to.row) != len(x)):
        raise ValueError(f"{len(x)} tokens with {to.top_k} experts each do not fit weights {[*weights.shape]}")
    indices = (to.counts, to.offsets, to.slot, to.row)
    return _Experts.apply(_products(products, x, ffn), keep, x, weights, gate_up_proj, down_proj, *indices)


class _Experts(Function):
    """The autograd function of `experts`."""

    @staticmethod
    def forward(
        ctx: Any,
        products: Products,
        keep: bool,
        x: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        counts: Tensor,
        offsets: Tensor,
        slot: Tensor | None,
        row: Tensor | None,
    ) -> Tensor:
        to = Assignment(counts, offsets, slot, row)
        ctx.products = products
        with torch.cuda.device_of(x):  # kernels launch on the current device; autograd sets it in backward
            gate_up, h = products.up(x, gate_up_proj, weights, to)
            y = products.down(h, down_proj, to)
            del h
            kept = gate_up if keep else None
            ctx.save_for_backward(x, weights, gate_up_proj, down_proj, kept, counts, offsets, slot, row)
            return products.combine(y, weights, to)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up_proj, down_proj, gate_up, *indices = ctx.saved_tensors
        to, products, (need_x, _, need_up, need_down) = Assignment(*indices), ctx.products, ctx.needs_input_grad[2:6]
        dx = dup = ddown = None
        dy = products.gather(grad.contiguous(), to)
        if gate_up is None:
            gate_up = products.up(x, gate_up_proj, weights, to)[0]
        h, dweights = products.down_backward(dy, down_proj, gate_up, weights, to)
        torch.autograd.graph.increment_version(gate_up)  # overwritten: autograd refuses a second pass
        if need_down:
            ddown = products.down_gradient(dy, h, to)
        del dy, h
        if need_x:
            dx = products.around.combine(products.up_backward(gate_up, gate_up_proj, to), to)
        if need_up:
            dup = products.up_gradient(gate_up, x, to)
        return None, None, dx, dweights, dup, ddown, None, None, None, None
