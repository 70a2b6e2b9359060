"""`squares` and `taylor` of `feature_maps` in two Triton kernels; only the channels are saved for the backward pass.

The features are the pairs of channels i <= j in the order (0, 0), (0, 1), ..., (1, 1), ...; the first pair of i is
feature i (2 SIZE + 1 - i) / 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # features of a program
COLUMNS = 64  # columns of a tile
BACKWARD_TILE = 512  # channels of a program in the backward pass; the gradient of a channel reads SIZE features
PROGRAMS = 16  # programs per multiprocessor, each with its own partial sums of the gradients of gamma and beta

ROOT_2 = tl.constexpr(2**0.5)
ROOT_HALF = tl.constexpr(0.5**0.5)


@triton.jit
def _normalise(x, row, rows, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the mean and 1 / standard deviation of every row."""
    d = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (d < SIZE)[None, :]
    u = tl.load(x + row[:, None] * SIZE + d[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(u, 1) / SIZE
    u = tl.where(inside, u - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(u * u, 1) / SIZE + eps)


@triton.jit
def _channel(x, gamma, beta, row, channel, mask, mean, r):
    """Loads channels, normed and with gamma and beta applied; row, mean and r broadcast against `channel`."""
    z = (tl.load(x + row + channel, mask=mask, other=0.0).to(tl.float32) - mean) * r
    if gamma is not None:
        z *= tl.load(gamma + channel).to(tl.float32)
    if beta is not None:
        z += tl.load(beta + channel).to(tl.float32)
    return z


@triton.jit
def _forward(
    x, gamma, beta, y, rows, width, eps, scale, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, NORMED: tl.constexpr, SERIES: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = SIZE * (SIZE + 1) // 2
    BEFORE: tl.constexpr = 1 + SIZE if SERIES else 0  # features before the pairs
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if NORMED:
        mean, r = _normalise(x, row, rows, eps, SIZE, BLOCK)
    else:
        mean, r = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32) + scale
    pair = tl.minimum(tl.maximum(column - BEFORE, 0), PAIRS - 1)
    # The radicands of neighbouring pairs differ by 8. The 4 keeps the root away from the points where i changes, so
    # that its rounding cannot change i.
    root = tl.sqrt(((2 * SIZE + 1) * (2 * SIZE + 1) - 4 - 8 * pair).to(tl.float32))
    i = ((2 * SIZE + 1 - root) / 2).to(tl.int32)
    j = pair - i * (2 * SIZE - 1 - i) // 2
    weight = tl.where(i == j, 1.0, ROOT_2)
    if SERIES:
        linear = column < BEFORE
        weight = tl.where(linear, 1.0, weight * ROOT_HALF)
        j = tl.where(linear, tl.maximum(column - 1, 0), j)
    weight = tl.where(column < BEFORE + PAIRS, weight, 0.0)
    inside = (row < rows)[:, None] & (column < BEFORE + PAIRS)[None, :]
    at, mean, r = row[:, None] * SIZE, mean[:, None], r[:, None]
    first = _channel(x, gamma, beta, at, i[None, :], inside, mean, r)
    second = _channel(x, gamma, beta, at, j[None, :], inside, mean, r)
    if SERIES:
        first = tl.where(linear[None, :], 1.0, first)
        second = tl.where((column == 0)[None, :], 1.0, second)
    value = (first * second * weight[None, :]).to(y.dtype.element_ty)
    tl.store(y + row[:, None] * width + column[None, :], value, mask=(row < rows)[:, None] & (column < width)[None, :])


@triton.jit
def _backward(
    dy, x, gamma, beta, dx, dgamma, dbeta, rows, width, eps, scale, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, NORMED: tl.constexpr, SERIES: tl.constexpr,
):  # fmt: skip
    BEFORE: tl.constexpr = 1 + SIZE if SERIES else 0
    PAIR: tl.constexpr = ROOT_HALF if SERIES else 1.0
    d = tl.arange(0, BLOCK)
    if gamma is not None:
        weight = tl.load(gamma + d, mask=d < SIZE, other=0.0).to(tl.float32)[None, :]
        sum_gamma = tl.zeros((ROWS, BLOCK), tl.float32)
    if beta is not None:
        sum_beta = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (d < SIZE)[None, :]
        if NORMED:
            mean, r = _normalise(x, row, rows, eps, SIZE, BLOCK)
        else:
            mean, r = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32) + scale
        dz = tl.zeros((ROWS, BLOCK), tl.float32)
        if SERIES:
            dz += tl.load(dy + row[:, None] * width + 1 + d[None, :], mask=inside, other=0.0).to(tl.float32)
        for j in range(0, SIZE):
            low, high = tl.minimum(d, j), tl.maximum(d, j)
            column = BEFORE + low * (2 * SIZE - 1 - low) // 2 + high
            g = tl.load(dy + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
            z = _channel(x, gamma, beta, row * SIZE, j, row < rows, mean, r)
            dz += g * z[:, None] * (tl.where(d == j, 2.0, ROOT_2) * PAIR)[None, :]
        n = tl.load(x + row[:, None] * SIZE + d[None, :], mask=inside, other=0.0).to(tl.float32)
        n = tl.where(inside, (n - mean[:, None]) * r[:, None], 0.0)
        if beta is not None:
            sum_beta += dz
        if gamma is not None:
            sum_gamma += dz * n
            dz *= weight
        if NORMED:
            dz -= (tl.sum(dz, 1) / SIZE)[:, None] + n * (tl.sum(dz * n, 1) / SIZE)[:, None]
        dz *= r[:, None]
        tl.store(dx + row[:, None] * SIZE + d[None, :], dz.to(dx.dtype.element_ty), mask=inside)
    if gamma is not None:
        tl.store(dgamma + tl.program_id(0) * SIZE + d, tl.sum(sum_gamma, 0), mask=d < SIZE)
    if beta is not None:
        tl.store(dbeta + tl.program_id(0) * SIZE + d, tl.sum(sum_beta, 0), mask=d < SIZE)


def forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, *, eps: float | None, series: bool, width: int
) -> Tensor:
    """See `feature_maps.quadratic_definition`."""
    size, x = x.shape[-1], x.contiguous()
    rows, block = x.numel() // size, triton.next_power_of_2(size)
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    at_once = TILE // COLUMNS
    if rows:
        _forward[(triton.cdiv(rows, at_once), triton.cdiv(width, COLUMNS))](
            x, gamma, beta, y, rows, width, eps or 0.0, size**-0.25 if series else 1.0, SIZE=size, BLOCK=block,
            ROWS=at_once, COLUMNS=COLUMNS, NORMED=eps is not None, SERIES=series, num_warps=4,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    eps: float | None,
    series: bool,
    width: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the gradients of x, gamma and beta. Sums over tokens are in a fixed order."""
    size, x, grad = x.shape[-1], x.contiguous(), grad.contiguous()
    rows, block = x.numel() // size, triton.next_power_of_2(size)
    dx, at_once = torch.empty_like(x), max(1, BACKWARD_TILE // block)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = max(1, min(triton.cdiv(rows, at_once), PROGRAMS * processors))
    partial = torch.empty(2, programs, size, dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        grad, x, gamma, beta, dx, partial[0], partial[1], rows, width, eps or 0.0, size**-0.25 if series else 1.0,
        SIZE=size, BLOCK=block, ROWS=at_once, NORMED=eps is not None, SERIES=series, num_warps=4,
    )  # fmt: skip
    dgamma, dbeta = (
        None if t is None else s.sum(0).to(t.dtype) for t, s in zip((gamma, beta), partial.unbind(), strict=True)
    )
    return dx, dgamma, dbeta
