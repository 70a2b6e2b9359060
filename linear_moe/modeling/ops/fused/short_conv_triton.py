"""`short_conv` of up to 4 taps, in two Triton kernels.

Each row of a tile walks along a run of tokens with the last inputs in registers, so that every input is read about
once. The backward pass computes the convolution again instead of keeping its result.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.modeling.ops.fused.norms import L2_EPS

EPS = tl.constexpr(L2_EPS)
RUN = 28  # tokens of a run: the walk begins 3 tokens before and ends 3 after
UNROLL = tl.constexpr(4)  # steps whose loads are in flight together; divides RUN and RUN + 4
TILE = 512  # elements of a tile, 4 for each thread of 4 warps
COLUMNS = 128  # channels of a tile at most
PROGRAMS = 16  # programs per multiprocessor, each with its own partial sums of the weight's gradient


@triton.jit
def _channels(channels, COLUMNS: tl.constexpr, NORM: tl.constexpr):
    """Returns a tile's channels, one normalised group (NORM > 0) or COLUMNS of them, and which of them exist."""
    column = tl.arange(0, COLUMNS)
    if NORM > 0:
        return tl.program_id(1) * NORM + column, column < NORM
    else:
        channel = tl.program_id(1) * COLUMNS + column
        return channel, channel < channels


@triton.jit
def _tap(weight, channel, inside, lag: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the weight of the input `lag` tokens ago, `[1, COLUMNS]`; 0 beyond the filter."""
    if lag < WIDTH:
        return tl.load(weight + channel * WIDTH + (WIDTH - 1 - lag), mask=inside, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.zeros_like(channel).to(tl.float32)[None, :]


@triton.jit
def _load(x, token, tokens, stride, channel, inside):
    here = ((token >= 0) & (token < tokens))[:, None] & inside[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * stride + channel[None, :], mask=here, other=0.0).to(tl.float32)


@triton.jit
def _position(first, token, tokens, length):
    """Returns the position of each token in its row or document, `[ROWS, 1]`."""
    if first is None:
        return (token % length)[:, None]
    else:
        return (token - tl.load(first + token, mask=token < tokens, other=0))[:, None]


@triton.jit
def _sequence(document, token, tokens, length):
    """Returns the number of each token's row or document, `[ROWS, 1]`."""
    if document is None:
        return (token // length)[:, None]
    else:
        return tl.load(document + token, mask=token < tokens, other=0)[:, None]


@triton.jit
def _earlier(value, lag: tl.constexpr, p, before, here, sequence, channels, channel, inside, WIDTH: tl.constexpr):
    """Returns the input `lag` tokens ago: `value`, or, if that precedes the sequence, the one in `before`, else 0."""
    value = tl.where(p >= lag, value, 0.0)
    if before is not None and lag < WIDTH:
        at = (sequence.to(tl.int64) * (WIDTH - 1) + WIDTH - 1 + p - lag) * channels + channel[None, :]
        value += tl.load(before + at, mask=here & (p < lag) & inside[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def _forward(
    x, weight, bias, before, first, document, y, tokens, length, channels, stride, WIDTH: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    start = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)) * RUN
    channel, inside = _channels(channels, COLUMNS, NORM)
    w0, w1 = _tap(weight, channel, inside, 0, WIDTH), _tap(weight, channel, inside, 1, WIDTH)
    w2, w3 = _tap(weight, channel, inside, 2, WIDTH), _tap(weight, channel, inside, 3, WIDTH)
    x1 = _load(x, start - 1, tokens, stride, channel, inside)
    x2 = _load(x, start - 2, tokens, stride, channel, inside)
    x3 = _load(x, start - 3, tokens, stride, channel, inside)
    b = tl.zeros((1, COLUMNS), tl.float32)
    if bias is not None:
        b += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for step in range(0, RUN, UNROLL):
        for i in tl.static_range(UNROLL):
            token = start + step + i
            x0 = _load(x, token, tokens, stride, channel, inside)
            p = _position(first, token, tokens, length)
            n = p
            if before is not None:
                n = _sequence(document, token, tokens, length)
            here = (token < tokens)[:, None]
            z = b + w0 * x0 + w1 * _earlier(x1, 1, p, before, here, n, channels, channel, inside, WIDTH)
            z += w2 * _earlier(x2, 2, p, before, here, n, channels, channel, inside, WIDTH)
            z += w3 * _earlier(x3, 3, p, before, here, n, channels, channel, inside, WIDTH)
            if SILU:
                z *= tl.sigmoid(z)
            if NORM > 0:
                z *= tl.rsqrt(tl.sum(z * z, 1) + EPS)[:, None]
            to = y + token.to(tl.int64)[:, None] * channels + channel[None, :]
            tl.store(to, z.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & inside[None, :])
            x3 = x2
            x2 = x1
            x1 = x0


@triton.jit
def _backward(
    dy, x, weight, bias, before, first, document, dx, dweight, dbias, dbefore, tokens, length, channels, stride_dy,
    stride, stride_partial, WIDTH: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SILU: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    channel, inside = _channels(channels, COLUMNS, NORM)
    w0, w1 = _tap(weight, channel, inside, 0, WIDTH), _tap(weight, channel, inside, 1, WIDTH)
    w2, w3 = _tap(weight, channel, inside, 2, WIDTH), _tap(weight, channel, inside, 3, WIDTH)
    b = tl.zeros((1, COLUMNS), tl.float32)
    if bias is not None:
        b += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    none = tl.zeros((ROWS, COLUMNS), tl.float32)
    s0, s1, s2, s3, sum_bias = none, none, none, none, none
    for block in range(tl.program_id(0) * ROWS, tl.cdiv(tokens, RUN), tl.num_programs(0) * ROWS):
        start = (block + tl.arange(0, ROWS)) * RUN
        x1 = _load(x, start - 1, tokens, stride, channel, inside)
        x2 = _load(x, start - 2, tokens, stride, channel, inside)
        x3 = _load(x, start - 3, tokens, stride, channel, inside)
        d1, d2, d3 = none, none, none  # the gradients, so far, of the last three inputs
        e1, e2, e3 = none, none, none  # the gradients, so far, of the last three inputs before the sequence
        for step in range(0, RUN + UNROLL, UNROLL):
            for i in tl.static_range(UNROLL):
                token = start + step + i
                x0 = _load(x, token, tokens, stride, channel, inside)
                d = _load(dy, token, tokens, stride_dy, channel, inside)
                p = _position(first, token, tokens, length)
                row = p
                if before is not None:
                    row = _sequence(document, token, tokens, length)
                here = (token < tokens)[:, None]
                y1 = _earlier(x1, 1, p, before, here, row, channels, channel, inside, WIDTH)
                y2 = _earlier(x2, 2, p, before, here, row, channels, channel, inside, WIDTH)
                y3 = _earlier(x3, 3, p, before, here, row, channels, channel, inside, WIDTH)
                if SILU or NORM > 0:
                    z = b + w0 * x0 + w1 * y1 + w2 * y2 + w3 * y3
                    s = tl.sigmoid(z) if SILU else 1.0
                    if NORM > 0:
                        n = z * s
                        r = tl.rsqrt(tl.sum(n * n, 1) + EPS)[:, None]
                        n *= r
                        d = r * (d - n * tl.sum(d * n, 1)[:, None])
                    if SILU:
                        d *= s * (1 + z * (1 - s))
                own = tl.where(step < RUN, d, 0.0)  # the next run sums over the tokens behind this one
                s0 += own * x0
                s1 += own * y1
                s2 += own * y2
                s3 += own * y3
                sum_bias += own
                if before is not None:  # the run with the sequence's first token stores, the last store is complete
                    e1 = tl.where(p == 0, w1 * d, e1 + tl.where(p == 1, w2 * d, tl.where(p == 2, w3 * d, 0.0)))
                    e2 = tl.where(p == 0, w2 * d, e2 + tl.where(p == 1, w3 * d, 0.0))
                    e3 = tl.where(p == 0, w3 * d, e3)
                    begin = token[:, None] - p
                    mine = here & (p < WIDTH - 1) & (begin >= start[:, None]) & (begin < start[:, None] + RUN)
                    mine = mine & inside[None, :]
                    to = dbefore + (row.to(tl.int64) + 1) * (WIDTH - 1) * channels + channel[None, :]
                    tl.store(to - channels, e1, mask=mine)
                    if WIDTH > 2:
                        tl.store(to - 2 * channels, e2, mask=mine)
                    if WIDTH > 3:
                        tl.store(to - 3 * channels, e3, mask=mine)
                d3 += tl.where(p >= 3, w3 * d, 0.0)
                d2 += tl.where(p >= 2, w2 * d, 0.0)
                d1 += tl.where(p >= 1, w1 * d, 0.0)
                at = token - 3
                to = dx + at.to(tl.int64)[:, None] * channels + channel[None, :]
                ours = (at >= start) & (at < start + RUN) & (at < tokens)
                tl.store(to, d3.to(dx.dtype.element_ty), mask=ours[:, None] & inside[None, :])
                d3 = d2
                d2 = d1
                d1 = w0 * d
                x3 = x2
                x2 = x1
                x1 = x0
    partial = tl.program_id(0) * stride_partial
    last = dweight + partial + channel * WIDTH + WIDTH - 1
    tl.store(last, tl.sum(s0, 0), mask=inside)
    if WIDTH > 1:
        tl.store(last - 1, tl.sum(s1, 0), mask=inside)
    if WIDTH > 2:
        tl.store(last - 2, tl.sum(s2, 0), mask=inside)
    if WIDTH > 3:
        tl.store(last - 3, tl.sum(s3, 0), mask=inside)
    if bias is not None:
        tl.store(dbias + partial + channel, tl.sum(sum_bias, 0), mask=inside)


def _flat(x: Tensor) -> Tensor:
    """Flattens `x [B, T, C]` to `[B T, C]` with contiguous channels, without a copy where strides allow."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(channels: int, weight: Tensor, activation: str | None, norm_size: int | None) -> tuple[int, dict[str, Any]]:
    """Returns the number of tiles across the channels, and the constants of the kernels."""
    columns = min(COLUMNS, triton.next_power_of_2(norm_size or channels))
    tile = {"WIDTH": weight.shape[1], "RUN": RUN, "ROWS": TILE // columns, "COLUMNS": columns}
    return triton.cdiv(channels, norm_size or columns), tile | {"SILU": activation == "silu", "NORM": norm_size or 0}


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    first: Tensor | None,
    document: Tensor | None,
    *,
    activation: str | None,
    norm_size: int | None = None,
) -> Tensor:
    """Computes `y [B, T, C]` of `x [B, T, C]`; see `short_conv`.

    Args:
        before: `[N, W - 1, C]` fp32, the inputs before each row or document, oldest first; None: zeros.
        first: `[B T]` int32, the first token of each token's document; None: rows are documents.
        document: `[B T]` int32, the number of each token's document; needed only with both `before` and `first`.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, (blocks, tile) = _flat(x), _tile(x.shape[2], weight, activation, norm_size)
    tokens, channels = flat.shape
    _forward[(triton.cdiv(triton.cdiv(tokens, RUN), tile["ROWS"]), blocks)](
        flat, weight.contiguous(), bias, None if before is None else before.contiguous(), first, document, y, tokens,
        x.shape[1], channels, flat.stride(0), **tile, num_warps=4,
    )  # fmt: skip
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    first: Tensor | None,
    document: Tensor | None,
    *,
    activation: str | None,
    norm_size: int | None = None,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, weight, bias and before. Sums over tokens are in a fixed order."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, dy, (blocks, tile) = _flat(x), _flat(grad), _tile(x.shape[2], weight, activation, norm_size)
    tokens, channels = flat.shape
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(triton.cdiv(triton.cdiv(tokens, RUN), tile["ROWS"]), triton.cdiv(PROGRAMS * processors, blocks))
    taps = weight.numel()
    partial = torch.empty(programs, taps + (0 if bias is None else channels), dtype=torch.float32, device=x.device)
    before = None if before is None else before.contiguous()
    dbefore = None if before is None else torch.zeros_like(before)  # no token writes an empty document's
    _backward[(programs, blocks)](
        dy, flat, weight.contiguous(), bias, before, first, document, dx, partial,
        None if bias is None else partial[:, taps:], dbefore, tokens, x.shape[1], channels, dy.stride(0),
        flat.stride(0), partial.stride(0), **tile, num_warps=4,
    )  # fmt: skip
    sums = partial.sum(0).to(weight.dtype)  # of weight and bias together: one launch
    return dx, sums[:taps].view_as(weight), None if bias is None else sums[taps:], dbefore, None, None
