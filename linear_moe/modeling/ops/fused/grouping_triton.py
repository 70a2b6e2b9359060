"""`Grouping.collect` and `combine` in two Triton kernels: every row of chosen tokens is read and written once.

Both kernels go through the tokens in order of time, so that a token's row that all groups share is read only once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of a tile, 16 for each thread of 4 warps
COLUMNS = 1024  # columns of a tile at most


@triton.jit
def _place(places, group, row, rows, length):
    """Returns the tokens' rows in the regrouped tensor, and whether the tokens are chosen."""
    signed = tl.load(places + group * rows + row, mask=row < rows, other=-1)
    chosen = signed >= 0
    return row - row % length + tl.where(chosen, signed, -1 - signed), chosen


@triton.jit
def _scatter(
    x, weights, regrouped, places, y, dweights, rows, length, width, groups, SIZE: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes rows, read in order of time, to their places, and zeros for tokens that are not chosen.

    With weights `[rows, groups]`, the rows are multiplied by them, and the gradients of the weights are stored: the
    products of x and `regrouped`, a tensor in regrouped order.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    spread = (column // SIZE) * (groups * SIZE) + column % SIZE
    if SHARED:
        once = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    for group in range(0, groups):
        place, chosen = _place(places, group, row, rows, length)
        to = place[:, None] * (groups * width) + (spread + group * SIZE)[None, :]
        here = inside & chosen[:, None]
        if SHARED:
            value = tl.where(here, once, tl.zeros_like(once))
        else:
            source = x + row[:, None] * (groups * width) + (spread + group * SIZE)[None, :]
            value = tl.load(source, mask=here, other=0.0)
        if weights is not None:
            wide = value.to(tl.float32)
            product = wide * tl.load(regrouped + to, mask=here, other=0.0).to(tl.float32)
            partial = (tl.program_id(1).to(tl.int64) * rows + row) * groups + group
            tl.store(dweights + partial, tl.sum(product, 1), mask=row < rows)
            w = tl.load(weights + row * groups + group, mask=row < rows, other=0.0).to(tl.float32)
            tl.store(y + to, (wide * w[:, None]).to(y.dtype.element_ty), mask=inside)
        else:
            tl.store(y + to, value, mask=inside)


@triton.jit
def _gather(
    x, weights, places, y, rows, length, width, groups, SIZE: tl.constexpr, TOTAL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes rows, read from their places, in order of time; with TOTAL, their (weighted) sum over the groups."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    spread = (column // SIZE) * (groups * SIZE) + column % SIZE
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for group in range(0, groups):
        place, chosen = _place(places, group, row, rows, length)
        source = x + place[:, None] * (groups * width) + (spread + group * SIZE)[None, :]
        value = tl.load(source, mask=inside & chosen[:, None], other=0.0)
        if TOTAL:
            wide = value.to(tl.float32)
            if weights is not None:
                w = tl.load(weights + row * groups + group, mask=row < rows, other=0.0).to(tl.float32)
                wide *= w[:, None]
            total += wide
        else:
            to = y + row[:, None] * (groups * width) + (spread + group * SIZE)[None, :]
            tl.store(to, value, mask=inside)
    if TOTAL:
        to = y + row[:, None] * width + column[None, :]
        tl.store(to, total.to(y.dtype.element_ty), mask=inside)


def _tile(rows: int, width: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Returns the grid and the constants of the kernels."""
    columns = min(COLUMNS, triton.next_power_of_2(width))
    tile = {"ROWS": max(1, TILE // columns), "COLUMNS": columns, "num_warps": 4}
    return (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, columns)), tile


def scatter(x: Tensor, places: Tensor) -> Tensor:
    """Regroups `x [B, T, H, M or 1, D]`, in order of time, to `[B, T, H, M, D]`; see `Grouping.collect`."""
    batch, length, heads, own, size = x.shape
    groups, rows, width = len(places), batch * length, heads * size
    y = torch.empty(batch, length, heads, groups, size, dtype=x.dtype, device=x.device)
    grid, tile = _tile(rows, width)
    _scatter[grid](
        x.contiguous(), None, None, places, y, None, rows, length, width, groups, size, own == 1, **tile
    )  # fmt: skip
    return y


def scatter_weighted(dy: Tensor, x: Tensor, weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and weights in `Grouping.combine`; `dy [B, T, H, D]`. Sums are in a fixed order."""
    batch, length, heads, groups, size = x.shape
    rows, width = batch * length, heads * size
    grid, tile = _tile(rows, width)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweights = torch.empty(grid[1], *weights.shape, dtype=torch.float32, device=x.device)
    _scatter[grid](
        dy.contiguous(), weights.contiguous(), x.contiguous(), places, dx, dweights, rows, length, width, groups, size,
        True, **tile,
    )  # fmt: skip
    return dx, (dweights[0] if len(dweights) == 1 else dweights.sum(0)).to(weights.dtype)


def gather(x: Tensor, places: Tensor, weights: Tensor | None = None, *, total: bool) -> Tensor:
    """Puts `x [B, T, H, M, D]` back in order of time, zeros where tokens are not chosen; with `total`, `[B, T, H, D]`.

    Args:
        x: regrouped.
        places: see `Grouping`.
        weights: `[B, T, M]` factors; None: all are 1.
        total: whether to sum over the groups.
    """
    batch, length, heads, groups, size = x.shape
    rows, width = batch * length, heads * size
    shape = (batch, length, heads, size) if total else x.shape
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    grid, tile = _tile(rows, width)
    weights = None if weights is None else weights.contiguous()
    _gather[grid](x.contiguous(), weights, places, y, rows, length, width, groups, size, total, **tile)
    return y
