"""`bounded_gate` in two Triton kernels: forward reads the inputs once, backward reads inputs and gradients once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.modeling.ops.fused.bounded_gate import MIN_FORGET
from linear_moe.modeling.ops.fused.gates_triton import COLUMNS, PROGRAMS, TILE, _log1p, _rows


@triton.jit
def _forward(
    x, y, logit, log_gate, value, rows, width, stride_x, stride_y, min_forget, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    z = tl.load(x + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    gate, rest = tl.sigmoid(z), tl.sigmoid(-z)
    if logit is not None:
        b = tl.load(logit + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        gate, rest = tl.sigmoid(b) + tl.sigmoid(-b) * gate, tl.sigmoid(-b) * rest
    # the logarithm of a gate near 1 comes from 1 - gate, because the gate itself is rounded to 1
    log = tl.where(rest < 0.5, _log1p(-tl.minimum(rest, 0.5)), tl.log(tl.maximum(gate, min_forget)))
    if y is not None:
        i = tl.load(y + row[:, None] * stride_y + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rest *= i * tl.sigmoid(i)
    at = row[:, None] * width + column[None, :]
    tl.store(log_gate + at, log, mask=inside)
    tl.store(value + at, rest.to(value.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dlog, dvalue, x, y, logit, dx, dy, dlogit, rows, width, stride_dlog, stride_dvalue, stride_x, stride_y, min_forget,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
        at = row[:, None] * width + column[None, :]
        z = tl.load(x + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dlog + row[:, None] * stride_dlog + column[None, :], mask=inside, other=0.0).to(tl.float32)
        e = tl.load(dvalue + row[:, None] * stride_dvalue + column[None, :], mask=inside, other=0.0).to(tl.float32)
        s, r = tl.sigmoid(z), tl.sigmoid(-z)
        gate = low + high * s
        d = tl.where(gate >= min_forget, d / tl.maximum(gate, min_forget), 0.0)
        if y is not None:
            i = tl.load(y + row[:, None] * stride_y + column[None, :], mask=inside, other=0.0).to(tl.float32)
            t = tl.sigmoid(i)
            di = e * high * r * t * (1 + i * (1 - t))
            tl.store(dy + at, di.to(dy.dtype.element_ty), mask=inside)
            e *= i * t
        d = (d - e) * high * r
        if logit is not None:
            total += d * low
        tl.store(dx + at, (d * s).to(dx.dtype.element_ty), mask=inside)
    if logit is not None:
        tl.store(dlogit + tl.program_id(0) * width + column, tl.sum(total, 0), mask=column < width)


def forward(x: Tensor, y: Tensor | None, logit: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `bounded_gate.definition`."""
    log_gate = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    value = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, flat_y = _rows(x), None if y is None else _rows(y)
    rows, width = flat.shape
    columns = min(COLUMNS, triton.next_power_of_2(width))
    if rows:
        _forward[(triton.cdiv(rows, TILE // columns), triton.cdiv(width, columns))](
            flat, flat_y, logit, log_gate, value, rows, width, flat.stride(0),
            0 if flat_y is None else flat_y.stride(0), MIN_FORGET, TILE // columns, columns, num_warps=4,
        )  # fmt: skip
    return log_gate, value


def backward(
    grads: tuple[Tensor, Tensor], x: Tensor, y: Tensor | None, logit: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, y and logit. Sums over tokens are in a fixed order."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy = None if y is None else torch.empty(y.shape, dtype=y.dtype, device=y.device)
    flat, flat_y = _rows(x), None if y is None else _rows(y)
    dlog, dvalue = (_rows(grad) for grad in grads)
    rows, width = flat.shape
    columns = min(COLUMNS, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, columns)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = max(1, min(triton.cdiv(rows, TILE // columns), triton.cdiv(PROGRAMS * processors, blocks)))
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _backward[(programs, blocks)](
        dlog, dvalue, flat, flat_y, logit, dx, dy, partial, rows, width, dlog.stride(0), dvalue.stride(0),
        flat.stride(0), 0 if flat_y is None else flat_y.stride(0), MIN_FORGET, TILE // columns, columns, num_warps=4,
    )  # fmt: skip
    return dx, dy, None if logit is None else partial.sum(0).to(logit.dtype)
