"""Routed SwiGLU experts as one differentiable operation, which keeps what a dense SwiGLU of the same width keeps.

A *slot* is one of the k experts that one of n tokens is sent to: `token * k + choice`. Slots sorted by expert are the
*rows* that grouped GEMMs work on. All sizes follow from shapes and all counts stay on the device, so nothing here waits
for it. Triton kernels on CUDA, PyTorch elsewhere; between them, GEMMs of one of several `Products`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.fused import has_triton, upcast

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10

PRODUCTS = ("auto", "grouped", "grouped_mm", "triton", "quack")
"""Who multiplies: PyTorch's grouped_mm, our Triton kernels, quack-kernels. grouped: on Hopper triton where it can, else
grouped_mm; auto: on Hopper quack where it can, else grouped."""


@dataclass(frozen=True)
class Assignment:
    """Which rows are whose. Without `slot` and `row` the tokens are themselves the rows: k = 1, sorted by expert, those
    without one last; what is computed for these is undefined.

    Attributes:
        counts: `[E]` int32, rows of each expert; they may sum to fewer than there are slots, the rest having none.
        offsets: `[E + 1]` int32, where each expert's rows begin, and where the last one's end.
        slot: `[M]` int32, the slot of each row, M = n * k; slots without an expert come last.
        row: `[n, k]` int32, the row of each slot.
    """

    counts: Tensor
    offsets: Tensor
    slot: Tensor | None = None
    row: Tensor | None = None

    @classmethod
    def of_rows(cls, counts: Tensor) -> Assignment:
        """For tokens already sorted by expert, `counts [E]` of each."""
        counts = counts.to(torch.int32)
        return cls(counts, _offsets(counts))

    @property
    def ends(self) -> Tensor:
        """`[E]`, where each expert's rows end."""
        return self.offsets[1:]

    @property
    def top_k(self) -> int:
        return 1 if self.row is None else self.row.shape[1]


def _offsets(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


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
    return Assignment(counts, _offsets(counts), slot.to(torch.int32), row)


# -- definitions: differentiable PyTorch -------------------------------------------------------------------------------
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


class _Definition:
    """The functions above, behind the interface of the kernels."""

    collect, combine, activate = staticmethod(collect), staticmethod(combine), staticmethod(activate)
    activate_backward, slot_sums = staticmethod(activate_backward), staticmethod(slot_sums)


# -- products ----------------------------------------------------------------------------------------------------------
class Products:
    """The GEMMs and what surrounds them: by grouped_mm, of rows that were gathered.

    Others have the same methods. `gate_up [M, 2F]` is passed between these only, so its columns' order is their own.

    Args:
        around: the functions above, or the kernels for them.
    """

    def __init__(self, around: Any):
        self.around = around

    def up(self, x: Tensor, proj: Tensor, weights: Tensor, to: Assignment) -> tuple[Tensor, Tensor]:
        """Tokens `[n, D]` and `proj [E, 2, F, D]` -> gate_up, and the activation h `[M, F]`."""
        rows = self.around.collect(x, to)
        gate_up = grouped_mm(rows, proj.flatten(1, 2).transpose(1, 2), offs=to.ends)
        del rows
        return gate_up, self.around.activate(gate_up, weights, to)

    def down(self, h: Tensor, proj: Tensor, to: Assignment) -> Tensor:
        """h and `proj [E, D, F]` -> rows `[M, D]`."""
        return grouped_mm(h, proj.transpose(1, 2), offs=to.ends)

    def combine(self, y: Tensor, weights: Tensor, to: Assignment) -> Tensor:
        """Rows from `down` -> tokens `[n, D]`; weighted here unless h was."""
        return self.around.combine(y, to)

    def gather(self, tokens: Tensor, to: Assignment) -> Tensor:
        """Gradients of tokens, as `down_backward` and `down_gradient` take them."""
        return self.around.collect(tokens, to)

    def down_backward(
        self, dy: Tensor, proj: Tensor, gate_up: Tensor, weights: Tensor, to: Assignment
    ) -> tuple[Tensor, Tensor]:
        """-> weighted h `[M, F]` and the gradient of `weights`. `gate_up` becomes its own gradient."""
        h = grouped_mm(dy, proj, offs=to.ends)
        return h, self.around.activate_backward(h, gate_up, weights, to)

    def down_gradient(self, dy: Tensor, h: Tensor, to: Assignment) -> Tensor:
        """-> the gradient of the projection, `[E, D, F]`."""
        return grouped_mm(dy.t(), h, offs=to.ends)

    def up_backward(self, gate_up: Tensor, proj: Tensor, to: Assignment) -> Tensor:
        """The gradient of gate_up and `proj [E, 2, F, D]` -> that of the rows `[M, D]`."""
        return grouped_mm(gate_up, proj.flatten(1, 2), offs=to.ends)

    def up_gradient(self, gate_up: Tensor, x: Tensor, to: Assignment) -> Tensor:
        """The gradient of gate_up and tokens `[n, D]` -> the gradient of the projection, `[E, 2, F, D]`."""
        dproj = grouped_mm(gate_up.t(), self.around.collect(x, to), offs=to.ends)
        return dproj.view(len(dproj), 2, -1, x.shape[1])


def refused_by_quack(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why quack's GEMMs cannot compute there; None: they can."""
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
    """The Triton kernels of this module if `x` is theirs, else None."""
    if x.is_cuda and x.dtype != torch.float64 and has_triton():
        return importlib.import_module("linear_moe.modeling.ops.experts_gpu")
    return None


def _products(name: str, x: Tensor, ffn: int) -> Products:
    """See `experts`."""
    if name not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {name!r}")
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
    by_16_bytes = x.shape[1] % 8 == 0 and ffn % 8 == 0  # the tensor memory accelerator's terms
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
        return Products(around or _Definition)
    module = {"triton": "experts_gemm_gpu", "quack": "experts_quack"}[name]
    return importlib.import_module(f"linear_moe.modeling.ops.{module}").Fused(around or _Definition)


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
    """`y[t] = sum_j weights[t, j] * down_e(silu(gate_e(x[t])) * up_e(x[t]))`, e the expert of slot (t, j).

    Differentiable once in `x`, `weights` and both projections. For the backward pass it keeps its inputs and, with
    `keep`, the rows' gate and up projections, which that pass overwrites: neither x nor the experts' outputs are kept
    by rows, and the gradient of a weight is the product of the activation and the gradient of the weighted activation.

    Args:
        x: `[n, D]`.
        weights: `[n, k]`, or `[n]` where `to` has no slots; fp32.
        gate_up_proj: `[E, 2, F, D]` in x's dtype, gates first.
        down_proj: `[E, D, F]`.
        to: from `assign`, or `Assignment.of_rows`.
        products: one of PRODUCTS. "triton" is grouped_mm where there are no such kernels: on a CPU, and for dtypes
            and sizes that they do not take.
        keep: else the backward pass computes the gate and up projections again.

    Returns:
        `[n, D]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit; `products` "quack" where it cannot compute.
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


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        products: Products,
        keep: bool,
        x: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *indices: Tensor | None,
    ) -> Tensor:
        to = Assignment(*indices)  # type: ignore[arg-type]
        ctx.products = products
        with torch.cuda.device_of(x):  # where kernels are launched; autograd sees to the backward pass
            gate_up, h = products.up(x, gate_up_proj, weights, to)
            y = products.down(h, down_proj, to)
            del h
            ctx.save_for_backward(x, weights, gate_up_proj, down_proj, gate_up if keep else None, *indices)
            return products.combine(y, weights, to)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weights, gate_up_proj, down_proj, gate_up, *indices = ctx.saved_tensors
        to, products, (need_x, _, need_up, need_down) = Assignment(*indices), ctx.products, ctx.needs_input_grad[2:6]
        dx = dup = ddown = None
        dy = products.gather(grad.contiguous(), to)
        if gate_up is None:
            gate_up = products.up(x, gate_up_proj, weights, to)[0]
        h, dweights = products.down_backward(dy, down_proj, gate_up, weights, to)
        torch.autograd.graph.increment_version(gate_up)  # autograd refuses to use it a second time
        if need_down:
            ddown = products.down_gradient(dy, h, to)
        del dy, h
        if need_x:
            dx = products.around.combine(products.up_backward(gate_up, gate_up_proj, to), to)
        if need_up:
            dup = products.up_gradient(gate_up, x, to)
        return None, None, dx, dweights, dup, ddown, None, None, None, None
