"""`rotate` in one Triton kernel, which reads and writes every feature once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of a tile, 16 for each thread of 4 warps


@triton.jit
def _kernel(
    x, cos, sin, y, rows, heads, length, stride_batch, stride_token, stride_head, DIM: tl.constexpr, HALF: tl.constexpr,
    BATCHED: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, token = row % heads, row // heads
    batch, place = token // length, token % length
    source = x + (batch * stride_batch + place * stride_token + head * stride_head)[:, None]
    target = y + (row * DIM)[:, None]
    pair = tl.arange(0, PAIRS)
    inside = (row < rows)[:, None] & (pair < HALF)[None, :]
    angle = (token if BATCHED else place)[:, None] * HALF + pair[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    a = tl.load(source + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(target + pair[None, :], (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(target + HALF + pair[None, :], (b * c + a * s).to(y.dtype.element_ty), mask=inside)
    if 2 * HALF < DIM:
        column = 2 * HALF + tl.arange(0, REST)
        inside = (row < rows)[:, None] & (column < DIM)[None, :]
        tl.store(target + column[None, :], tl.load(source + column[None, :], mask=inside), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """Rotates as `rotary.rotate`, for x in any layout; with `back`, by minus the angles, as gradients need it."""
    batch, length, heads, dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half, rows = cos.shape[-1], batch * length * heads
    tile_rows = max(1, TILE // triton.next_power_of_2(dim))
    _kernel[(triton.cdiv(rows, tile_rows),)](
        x, cos.contiguous(), sin.contiguous(), y, rows, heads, length, *x.stride()[:3], dim, half,
        cos.shape[0] == batch, back, tile_rows, triton.next_power_of_2(half),
        triton.next_power_of_2(max(dim - 2 * half, 1)), num_warps=4,
    )  # fmt: skip
    return y
