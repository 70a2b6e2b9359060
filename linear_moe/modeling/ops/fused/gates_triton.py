"""`gate` in two Triton kernels: forward reads the projection once, backward reads projection and gradient once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.modeling.ops.fused import gates

MAX_EXPONENT = tl.constexpr(gates.MAX_EXPONENT)
TILE = 2048  # elements of a tile, 16 for each thread of 4 warps
COLUMNS = 128  # columns of a tile at most
PROGRAMS = 4  # programs per multiprocessor, each with its own partial sums of the gradients of bias and rate


@triton.jit
def _log1p(x):
    """Returns log(1 + x), exact for small x too: the quotient corrects the rounding of w = 1 + x."""
    w = 1 + x
    return tl.where(w == 1, x, tl.log(w) * (x / (w - 1)))


@triton.jit
def _complement(x):
    """Returns 1 - exp(x), exact for small x too."""
    w = tl.exp(x)
    small = (1 - w) * (x / tl.log(tl.where(w == 1, 0.5, w)))  # the quotient corrects w's rounding
    return tl.where(x < -1, 1 - w, tl.where(w == 1, -x, small))


@triton.jit
def _evaluate(x, FUNCTION: tl.constexpr):
    """Returns the function and its derivative at x."""
    if FUNCTION == "logsigmoid":
        return tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x))), tl.sigmoid(-x)
    elif FUNCTION == "softplus":
        return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x))), tl.sigmoid(x)
    elif FUNCTION == "sigmoid":
        s = tl.sigmoid(x)
        return s, s * (1 - s)
    else:
        e = tl.exp(tl.minimum(x, MAX_EXPONENT))
        return e, tl.where(x > MAX_EXPONENT, 0.0, e)


@triton.jit
def _forward(
    x, bias, log_rate, y, complement, rows, width, head_dim, stride, scale, floor, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, FUNCTION: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    z = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    value, _ = _evaluate(z, FUNCTION)
    value *= scale
    if log_rate is not None:
        rate = tl.load(log_rate + column // head_dim, mask=column < width, other=0.0).to(tl.float32)
        value *= tl.exp(rate)[None, :]
    if floor is not None:
        value = tl.maximum(value, floor)
    tl.store(y + row[:, None] * width + column[None, :], value, mask=inside)
    if complement is not None:
        to = complement + row[:, None] * width + column[None, :]
        tl.store(to, _complement(value).to(complement.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, dcomplement, x, bias, log_rate, dx, dbias, drate, rows, width, head_dim, stride_dy, stride_dc, stride, scale,
    floor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FUNCTION: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rate = tl.zeros((COLUMNS,), tl.float32) + scale
    if log_rate is not None:
        rate *= tl.exp(tl.load(log_rate + column // head_dim, mask=column < width, other=0.0).to(tl.float32))
        sum_rate = tl.zeros((ROWS, COLUMNS), tl.float32)
    if bias is not None:
        b = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
        sum_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        z = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            z += b[None, :]
        value, slope = _evaluate(z, FUNCTION)
        value *= rate[None, :]
        d = tl.load(dy + row[:, None] * stride_dy + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if dcomplement is not None:
            to = dcomplement + row[:, None] * stride_dc + column[None, :]
            d -= tl.exp(value) * tl.load(to, mask=inside, other=0.0).to(tl.float32)
        if floor is not None:
            d = tl.where(value >= floor, d, 0.0)
        if log_rate is not None:
            sum_rate += d * value
        d *= rate[None, :] * slope
        if bias is not None:
            sum_bias += d
        tl.store(dx + row[:, None] * width + column[None, :], d.to(dx.dtype.element_ty), mask=inside)
    partial = tl.program_id(0) * width + column
    if bias is not None:
        tl.store(dbias + partial, tl.sum(sum_bias, 0), mask=column < width)
    if log_rate is not None:
        tl.store(drate + partial, tl.sum(sum_rate, 0), mask=column < width)


def _rows(x: Tensor) -> Tensor:
    """Flattens `x [..., C]` to `[N, C]` with contiguous features, without a copy where strides allow."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def forward(
    x: Tensor,
    bias: Tensor | None,
    log_rate: Tensor | None,
    *,
    function: str,
    scale: float,
    floor: float | None,
    complement: bool = False,
) -> Any:
    """See `gates.definition`."""
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    one_minus = torch.empty(x.shape, dtype=x.dtype, device=x.device) if complement else None
    flat = _rows(x)
    rows, width = flat.shape
    columns = min(COLUMNS, triton.next_power_of_2(width))
    head_dim = 1 if log_rate is None else width // len(log_rate)
    if rows:
        _forward[(triton.cdiv(rows, TILE // columns), triton.cdiv(width, columns))](
            flat, bias, log_rate, y, one_minus, rows, width, head_dim, flat.stride(0), scale, floor, TILE // columns,
            columns, function, num_warps=4,
        )  # fmt: skip
    return y if one_minus is None else (y, one_minus)


def backward(
    grad: Any,
    x: Tensor,
    bias: Tensor | None,
    log_rate: Tensor | None,
    *,
    function: str,
    scale: float,
    floor: float | None,
    complement: bool = False,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, bias and log_rate. Sums over tokens are in a fixed order."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, dy = _rows(x), _rows(grad[0] if complement else grad)
    dcomplement = _rows(grad[1]) if complement else None
    rows, width = flat.shape
    columns = min(COLUMNS, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, columns)
    head_dim = 1 if log_rate is None else width // len(log_rate)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = max(1, min(triton.cdiv(rows, TILE // columns), triton.cdiv(PROGRAMS * processors, blocks)))
    summed = [t for t in (bias, log_rate) if t is not None]
    partial = torch.empty(len(summed), programs, width, dtype=torch.float32, device=x.device)
    rest = iter(partial)
    partial_b, partial_r = (None if t is None else next(rest) for t in (bias, log_rate))
    _backward[(programs, blocks)](
        dy, dcomplement, flat, bias, log_rate, dx, partial_b, partial_r, rows, width, head_dim, dy.stride(0),
        0 if dcomplement is None else dcomplement.stride(0), flat.stride(0), scale, floor, TILE // columns, columns,
        function, num_warps=4,
    )  # fmt: skip
    sums = iter(partial.sum(1) if summed else ())
    dbias = None if bias is None else next(sums).to(bias.dtype)
    if log_rate is None:
        return dx, dbias, None
    drate = next(sums)
    return dx, dbias, (drate if head_dim == 1 else drate.view(-1, head_dim).sum(1)).to(log_rate.dtype)
