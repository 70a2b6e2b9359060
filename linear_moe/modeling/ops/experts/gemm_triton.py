"""The experts' GEMMs in Triton, fused with the operations around them.

Rows are gathered as they are read, and the activation, forward and backward, is computed from products that are still
in registers. A tile has rows of one expert only. The number of tiles depends on the counts, which stay on the device:
as many programs are launched as there could be tiles, and a program without a tile ends at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from linear_moe.modeling.ops.experts.assignment import Assignment
from linear_moe.modeling.ops.experts.products import Products

# Tiles for Hopper: the registers of 8 warps hold the fp32 accumulators, two in UP and one in the others, and shared
# memory holds `num_stages` stages of the inputs.
UP = {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 8, "num_stages": 4}
DOWN_BACKWARD = {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 8, "num_stages": 3}
DOWN_GRADIENT = {"ROWS": 128, "COLUMNS": 256, "INNER": 64, "num_warps": 8, "num_stages": 6}
UP_GRADIENT = {"ROWS": 256, "COLUMNS": 128, "INNER": 32, "num_warps": 8, "num_stages": 8}


@triton.jit
def _rows(ends, experts, tile, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Returns a tile's expert, its first row and the end of the expert's rows; first >= end: there is no such tile."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, mask=e < experts, other=0)
    start = tl.where(e < experts, tl.load(ends + e - 1, mask=(e > 0) & (e <= experts), other=0), 0)
    until = tl.cumsum((end - start + ROWS - 1) // ROWS, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(e < expert, until, 0), 0)
    first = tl.sum(tl.where(e == expert, start, 0), 0) + (tile - before) * ROWS
    return expert, first, tl.sum(tl.where(e == expert, end, 0), 0)


@triton.jit
def _slots(slot_of, row, end, TOP_K: tl.constexpr, GATHER: tl.constexpr):
    """Returns the slots of rows, and the tokens (rows of `x`) that they read."""
    if GATHER:
        slot = tl.load(slot_of + row, mask=row < end, other=0)
        return slot, (slot // TOP_K).to(tl.int64)
    else:
        slot = tl.where(row < end, row, 0)
        return slot, slot.to(tl.int64)


@triton.jit
def _up(
    x, proj, weights, slot_of, ends, gate_up, h, experts, stride, HIDDEN: tl.constexpr, SIZE: tl.constexpr,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    expert, first, end = _rows(ends, experts, tl.program_id(0) // columns, EXPERTS, ROWS)
    if first < end:
        row = first + tl.arange(0, ROWS)
        slot, token = _slots(slot_of, row, end, TOP_K, GATHER)
        start = tl.program_id(0) % columns * COLUMNS
        inner = tl.arange(0, INNER)
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        source = x + token[:, None] * stride + inner[None, :]
        for k in range(0, HIDDEN, INNER):
            if HIDDEN % INNER == 0:
                a = tl.load(source + k)
            else:
                a = tl.load(source + k, mask=(k + inner < HIDDEN)[None, :], other=0.0)
            b = proj.load([expert * 2 * SIZE + start, k])
            gate = tl.dot(a, b.T, gate, input_precision="ieee")
            b = proj.load([expert * 2 * SIZE + SIZE + start, k])
            up = tl.dot(a, b.T, up, input_precision="ieee")
        column = start + tl.arange(0, COLUMNS)
        inside = (row < end)[:, None] & (column < SIZE)[None, :]
        to = gate_up + row.to(tl.int64)[:, None] * (2 * SIZE) + column[None, :]
        gate, up = gate.to(gate_up.dtype.element_ty), up.to(gate_up.dtype.element_ty)
        tl.store(to, gate, mask=inside)
        tl.store(to + SIZE, up, mask=inside)
        gate, up = gate.to(tl.float32), up.to(tl.float32)  # rounded as the backward pass will read them
        weight = tl.load(weights + slot).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up * weight[:, None]
        tl.store(h + row.to(tl.int64)[:, None] * SIZE + column[None, :], value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the left and the right half of the columns of `x [ROWS, COLUMNS]`."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _activate_backward(d, weight, gate_up, h, row, end, start, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Computes the activation's backward pass for some columns.

    `gate_up` is overwritten with its gradient, and `h` is stored. Returns these columns' part of the gradient of the
    weights.
    """
    column = start + tl.arange(0, COLUMNS)
    inside = (row < end)[:, None] & (column < SIZE)[None, :]
    at = gate_up + row.to(tl.int64)[:, None] * (2 * SIZE) + column[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + SIZE, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    swish = gate * s
    value = swish * up
    part = tl.sum(d * value, 1)
    to = h + row.to(tl.int64)[:, None] * SIZE + column[None, :]
    tl.store(to, (value * weight[:, None]).to(h.dtype.element_ty), mask=inside)
    d *= weight[:, None]
    tl.store(at, (d * up * (s + swish * (1 - s))).to(gate_up.dtype.element_ty), mask=inside)
    tl.store(at + SIZE, (d * swish).to(gate_up.dtype.element_ty), mask=inside)
    return part


@triton.jit
def _down_backward(
    grad, proj, weights, slot_of, ends, gate_up, h, dweights, experts, rows, stride, HIDDEN: tl.constexpr,
    SIZE: tl.constexpr, TOP_K: tl.constexpr, GATHER: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    expert, first, end = _rows(ends, experts, tl.program_id(0) // columns, EXPERTS, ROWS)
    if first < end:
        row = first + tl.arange(0, ROWS)
        slot, token = _slots(slot_of, row, end, TOP_K, GATHER)
        start = tl.program_id(0) % columns * COLUMNS
        inner = tl.arange(0, INNER)
        d = tl.zeros((ROWS, COLUMNS), tl.float32)
        source = grad + token[:, None] * stride + inner[None, :]
        for k in range(0, HIDDEN, INNER):
            if HIDDEN % INNER == 0:
                a = tl.load(source + k)
            else:
                a = tl.load(source + k, mask=(k + inner < HIDDEN)[None, :], other=0.0)
            d = tl.dot(a, proj.load([expert * HIDDEN + k, start]), d, input_precision="ieee")
        weight = tl.load(weights + slot).to(tl.float32)
        # A quarter of the columns at a time: the whole does not fit into the registers.
        part = tl.zeros((ROWS,), tl.float32)
        left, right = _halves(d, ROWS, COLUMNS)
        for half in tl.static_range(2):
            first_quarter, second_quarter = _halves(left if half == 0 else right, ROWS, COLUMNS // 2)
            column = start + half * (COLUMNS // 2)
            part += _activate_backward(first_quarter, weight, gate_up, h, row, end, column, SIZE, COLUMNS // 4)
            column += COLUMNS // 4
            part += _activate_backward(second_quarter, weight, gate_up, h, row, end, column, SIZE, COLUMNS // 4)
        tl.store(dweights + (tl.program_id(0) % columns).to(tl.int64) * rows + slot, part, mask=row < end)


@triton.jit
def _add_outer(rows, tokens, total, TOKENS_LEFT: tl.constexpr):
    if TOKENS_LEFT:
        return tl.dot(tokens.T, rows, total, input_precision="ieee")
    else:
        return tl.dot(rows.T, tokens, total, input_precision="ieee")


@triton.jit
def _outer(
    rows, rows_at, tokens, slot_of, ends, out, stride, LEFT: tl.constexpr, RIGHT: tl.constexpr, TOP_K: tl.constexpr,
    TOKENS_LEFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (RIGHT + COLUMNS - 1) // COLUMNS
    tiles: tl.constexpr = (LEFT + ROWS - 1) // ROWS * columns
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    end = tl.load(ends + expert)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    i, j = tile // columns * ROWS, tile % columns * COLUMNS
    of_left, of_right = i + tl.arange(0, ROWS), j + tl.arange(0, COLUMNS)
    if TOKENS_LEFT:
        column, size, at, wide, row_size = of_left, LEFT, j, of_right, RIGHT
    else:
        column, size, at, wide, row_size = of_right, RIGHT, i, of_left, LEFT
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    whole = first + (end - first) // INNER * INNER
    for start in range(first, whole, INNER):
        _, token = _slots(slot_of, start + tl.arange(0, INNER), end, TOP_K, True)
        a = rows.load([start, at])
        b = tl.load(tokens + token[:, None] * stride + column[None, :], mask=(column < size)[None, :], other=0.0)
        total = _add_outer(a, b, total, TOKENS_LEFT)
    if whole < end:  # rows from `end` on are not this expert's, and may even be NaN
        row = whole + tl.arange(0, INNER)
        _, token = _slots(slot_of, row, end, TOP_K, True)
        inside = (row < end)[:, None]
        a = tl.load(
            rows_at + row.to(tl.int64)[:, None] * row_size + wide[None, :],
            mask=inside & (wide < row_size)[None, :],
            other=0.0,
        )
        b = tl.load(
            tokens + token[:, None] * stride + column[None, :], mask=inside & (column < size)[None, :], other=0.0
        )
        total = _add_outer(a, b, total, TOKENS_LEFT)
    to = out + expert.to(tl.int64) * (LEFT * RIGHT) + of_left.to(tl.int64)[:, None] * RIGHT + of_right[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(of_left < LEFT)[:, None] & (of_right < RIGHT)[None, :])


def _tokens(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(rows: int, size: int, to: Assignment, tile: dict[str, int]) -> tuple[tuple[int], dict[str, Any]]:
    """Returns the grid of `_up` and `_down_backward`, and their constants."""
    experts = len(to.ends)
    tiles = triton.cdiv(rows, tile["ROWS"]) + min(experts, rows)
    constants = {"TOP_K": to.top_k, "GATHER": to.slot is not None, "EXPERTS": triton.next_power_of_2(experts)}
    return (tiles * triton.cdiv(size, tile["COLUMNS"]),), constants | tile


def up(x: Tensor, proj: Tensor, weights: Tensor, to: Assignment) -> tuple[Tensor, Tensor]:
    """Multiplies the rows of `x [n, D]` by `proj [E, 2, F, D]`, and activates the products.

    Returns:
        gate_up `[M, 2F]`, and its weighted activation h `[M, F]`.
    """
    x, rows, (_, _, size, hidden) = _tokens(x), weights.numel(), proj.shape
    gate_up = torch.empty(rows, 2 * size, dtype=x.dtype, device=x.device)
    h = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    if rows:
        grid, constants = _launch(rows, size, to, UP)
        matrix = TensorDescriptor.from_tensor(proj.view(-1, hidden), [UP["COLUMNS"], UP["INNER"]])
        _up[grid](
            x, matrix, weights.contiguous(), to.slot, to.ends, gate_up, h, len(to.ends), x.stride(0), HIDDEN=hidden,
            SIZE=size, **constants,
        )  # fmt: skip
    return gate_up, h


def down_backward(dy: Tensor, proj: Tensor, gate_up: Tensor, weights: Tensor, to: Assignment) -> tuple[Tensor, Tensor]:
    """Multiplies the rows of `dy [n, D]` by `proj [E, D, F]`, and computes the activation's backward pass.

    `gate_up` is overwritten with its gradient.

    Returns:
        The weighted activation h `[M, F]` and the gradient of `weights`.
    """
    dy, (rows, _), (_, hidden, size) = _tokens(dy), gate_up.shape, proj.shape
    h = torch.empty(rows, size, dtype=dy.dtype, device=dy.device)
    # Zeros, because slots without an expert are in no tile. The parts of all tiles are added in a fixed order.
    parts = torch.zeros(triton.cdiv(size, DOWN_BACKWARD["COLUMNS"]), rows, dtype=torch.float32, device=dy.device)
    if rows:
        grid, constants = _launch(rows, size, to, DOWN_BACKWARD)
        matrix = TensorDescriptor.from_tensor(proj.view(-1, size), [DOWN_BACKWARD["INNER"], DOWN_BACKWARD["COLUMNS"]])
        _down_backward[grid](
            dy, matrix, weights.contiguous(), to.slot, to.ends, gate_up, h, parts, len(to.ends), rows,
            dy.stride(0), HIDDEN=hidden, SIZE=size, **constants,
        )  # fmt: skip
    return h, parts.sum(0).view(weights.shape).to(weights.dtype)


def outer(tokens: Tensor, rows: Tensor, to: Assignment, tokens_left: bool) -> Tensor:
    """Returns each expert's sum over its rows of `left [row, :, None] * right [row, None, :]`, `[E, L, R]`.

    Args:
        tokens: `[n, L or R]`, one of the two factors, which is gathered by row.
        rows: `[M, R or L]`, the other factor, contiguous.
        to: an assignment with slots. Without slots nothing has to be gathered, and grouped_mm serves.
        tokens_left: whether `tokens` is the left factor.
    """
    tile, tokens = DOWN_GRADIENT if tokens_left else UP_GRADIENT, _tokens(tokens)
    left, right = (tokens.shape[1], rows.shape[1])[:: 1 if tokens_left else -1]
    out = torch.empty(len(to.counts), left, right, dtype=rows.dtype, device=rows.device)
    tiles = triton.cdiv(left, tile["ROWS"]) * triton.cdiv(right, tile["COLUMNS"])
    block = [tile["INNER"], tile["COLUMNS" if tokens_left else "ROWS"]]
    _outer[(len(to.counts) * tiles,)](
        TensorDescriptor.from_tensor(rows, block), rows, tokens, to.slot, to.ends, out, tokens.stride(0), LEFT=left,
        RIGHT=right, TOP_K=to.top_k, TOKENS_LEFT=tokens_left, **tile,
    )  # fmt: skip
    return out


class Fused(Products):
    """`Products` by the Triton GEMMs of this module; grouped_mm where no rows are gathered and nothing is activated."""

    up, down_backward = staticmethod(up), staticmethod(down_backward)

    def gather(self, tokens: Tensor, to: Assignment) -> Tensor:
        return tokens

    def down_gradient(self, dy: Tensor, h: Tensor, to: Assignment) -> Tensor:
        return outer(dy, h, to, tokens_left=True) if to.slot is not None else super().down_gradient(dy, h, to)

    def up_gradient(self, gate_up: Tensor, x: Tensor, to: Assignment) -> Tensor:
        if to.slot is None:
            return super().up_gradient(gate_up, x, to)
        dproj = outer(x, gate_up, to, tokens_left=False)
        return dproj.view(len(dproj), 2, -1, x.shape[1])
