"""`bounded_gate` in two Triton kernels: the projection is read once forward, it and the gradient once backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.modeling.ops.bounded_gate import MIN_FORGET
from linear_moe.modeling.ops.gates_gpu import COLUMNS, PROGRAMS, TILE, _log1p, _rows


@triton.jit
def _forward(
    x, logit, y, rows, width, stride, min_forget, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COMPLEMENT: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    z = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    gate, rest = tl.sigmoid(z), tl.sigmoid(-z)
    if logit is not None:
        b = tl.load(logit + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        gate, rest = tl.sigmoid(b) + tl.sigmoid(-b) * gate, tl.sigmoid(-b) * rest
    if COMPLEMENT:
        value = rest
    else:  # near 1 the gate has no digits left: the rest has them
        value = tl.where(rest < 0.5, _log1p(-tl.minimum(rest, 0.5)), tl.log(tl.maximum(gate, min_forget)))
    tl.store(y + row[:, None] * width + column[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, x, logit, dx, dlogit, rows, width, stride_dy, stride, min_forget, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    COMPLEMENT: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    low = tl.zeros((1, COLUMNS), tl.float32)
    high = low + 1
    if logit is not None:
        b = tl.load(logit + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        low, high = tl.sigmoid(b), tl.sigmoid(-b)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        z = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + row[:, None] * stride_dy + column[None, :], mask=inside, other=0.0).to(tl.float32)
        s, r = tl.sigmoid(z), tl.sigmoid(-z)
        if COMPLEMENT:
            d = -d * high * r
        else:
            gate = low + high * s
            d = tl.where(gate >= min_forget, d / tl.maximum(gate, min_forget), 0.0) * high * r
        if logit is not None:
            total += d * low
        tl.store(dx + row[:, None] * width + column[None, :], (d * s).to(dx.dtype.element_ty), mask=inside)
    if logit is not None:
        tl.store(dlogit + tl.program_id(0) * width + column, tl.sum(total, 0), mask=column < width)


def forward(x: Tensor, logit: Tensor | None, *, complement: bool) -> Tensor:
    """See `bounded_gate.definition`."""
    y = torch.empty(x.shape, dtype=x.dtype if complement else torch.float32, device=x.device)
    flat = _rows(x)
    rows, width = flat.shape
    columns = min(COLUMNS, triton.next_power_of_2(width))
    if rows:
        _forward[(triton.cdiv(rows, TILE // columns), triton.cdiv(width, columns))](
            flat, logit, y, rows, width, flat.stride(0), MIN_FORGET, TILE // columns, columns, complement, num_warps=4
        )
    return y


def backward(grad: Tensor, x: Tensor, logit: Tensor | None, *, complement: bool) -> tuple[Tensor | None, ...]:
    """Gradients of x and logit. Sums over tokens are in a fixed order."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, dy = _rows(x), _rows(grad)
    rows, width = flat.shape
    columns = min(COLUMNS, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, columns)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = max(1, min(triton.cdiv(rows, TILE // columns), triton.cdiv(PROGRAMS * processors, blocks)))
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _backward[(programs, blocks)](
        dy, flat, logit, dx, partial, rows, width, dy.stride(0), flat.stride(0), MIN_FORGET, TILE // columns, columns,
        complement, num_warps=4,
    )  # fmt: skip
    return dx, None if logit is None else partial.sum(0).to(logit.dtype)
