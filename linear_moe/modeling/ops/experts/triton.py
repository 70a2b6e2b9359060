"""The operations around the experts' GEMMs in Triton: every input is read once and every output written once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from linear_moe.modeling.ops.experts.assignment import Assignment

WIDTH = 2048  # features of a row that a program takes, 16 for each thread of 4 warps
ROWS, COLUMNS = 16, 128  # sizes of a tile of the activation: 16 elements for each thread of 4 warps
ASSIGN = 8192  # slots times experts that a program of the sort takes


# -- sorting slots by expert -------------------------------------------------------------------------------------------
@triton.jit
def _block(index, slots, EXPERTS: tl.constexpr, SLOTS: tl.constexpr):
    """Returns this program's slots, and the expert of each slot, one-hot."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    expert = tl.load(index + slot, mask=slot < slots, other=-1).to(tl.int32)
    return slot, (expert[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@triton.jit
def _count(index, counts, slots, blocks, EXPERTS: tl.constexpr, SLOTS: tl.constexpr):
    _, chosen = _block(index, slots, EXPERTS, SLOTS)
    tl.store(counts + tl.arange(0, EXPERTS) * blocks + tl.program_id(0), tl.sum(chosen, 0))


@triton.jit
def _place(
    index, until, slot_of, row_of, counts, offsets, slots, blocks, experts, EXPERTS: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    slot, chosen = _block(index, slots, EXPERTS, SLOTS)
    expert = tl.arange(0, EXPERTS)
    end = tl.load(until + expert * blocks + tl.program_id(0))
    before = (end - tl.sum(chosen, 0))[None, :] + tl.cumsum(chosen, 0) - 1
    row = tl.sum(chosen * before, 1)
    tl.store(row_of + slot, row, mask=slot < slots)
    tl.store(slot_of + row, slot, mask=slot < slots)
    if tl.program_id(0) == 0:
        begin = tl.load(until + expert * blocks - 1, mask=expert > 0, other=0)
        tl.store(offsets + expert, begin, mask=expert <= experts)
        tl.store(counts + expert, tl.load(until + (expert + 1) * blocks - 1) - begin, mask=expert < experts)


def can_assign(num_experts: int) -> bool:
    """Whether `assign` takes this many experts."""
    return num_experts < ASSIGN // 16


def assign(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts the slots of `index [n, k]` by expert: the fields counts, offsets, slot and row of an `Assignment`.

    The algorithm is a counting sort: counts by block of slots, their running sum, places.
    """
    index, slots = index.contiguous(), index.numel()
    width = triton.next_power_of_2(num_experts + 1)
    size = ASSIGN // width
    blocks = max(1, triton.cdiv(slots, size))
    by_block = torch.empty(width, blocks, dtype=torch.int32, device=index.device)
    slot = torch.empty(slots, dtype=torch.int32, device=index.device)
    row = torch.empty(index.shape, dtype=torch.int32, device=index.device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=index.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=index.device)
    with torch.cuda.device_of(index):
        _count[(blocks,)](index, by_block, slots, blocks, EXPERTS=width, SLOTS=size, num_warps=4)
        until = by_block.view(-1).cumsum(0, dtype=torch.int32)
        _place[(blocks,)](
            index, until, slot, row, counts, offsets, slots, blocks, num_experts, EXPERTS=width, SLOTS=size, num_warps=4
        )  # fmt: skip
    return counts, offsets, slot, row


# -- tokens to rows and back -------------------------------------------------------------------------------------------
@triton.jit
def _collect(x, row_of, rows, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(x + token * stride + feature, mask=feature < SIZE)
    for choice in tl.static_range(TOP_K):
        row = tl.load(row_of + token * TOP_K + choice).to(tl.int64)
        tl.store(rows + row * SIZE + feature, value, mask=feature < SIZE)


@triton.jit
def _combine(
    rows, row_of, weights, ends, y, experts, SIZE: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    HAS_SLOTS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    end = tl.load(ends + experts - 1)
    for choice in tl.static_range(TOP_K):
        row = token
        if HAS_SLOTS:
            row = tl.load(row_of + token * TOP_K + choice).to(tl.int64)
        size = tl.where(row < end, SIZE, 0)
        value = tl.load(rows + row * SIZE + feature, mask=feature < size, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * TOP_K + choice).to(tl.float32)
        total += value
    tl.store(y + token * SIZE + feature, total.to(y.dtype.element_ty), mask=feature < SIZE)


@triton.jit
def _slot_sums(
    parts, row_of, ends, out, slots, experts, PARTS: tl.constexpr, SLOTS: tl.constexpr, HAS_SLOTS: tl.constexpr
):  # fmt: skip
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = slot
    if HAS_SLOTS:
        row = tl.load(row_of + slot, mask=slot < slots, other=0)
    inside = (slot < slots) & (row < tl.load(ends + experts - 1))
    total = tl.zeros((SLOTS,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + row.to(tl.int64) * PARTS + part, mask=inside, other=0.0)
    tl.store(out + slot, total.to(out.dtype.element_ty), mask=slot < slots)


def _token_grid(tokens: int, size: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Returns the grid of the kernels that go through tokens of `size` features, and their constants."""
    width = min(WIDTH, triton.next_power_of_2(size))
    return (tokens, triton.cdiv(size, width)), {"SIZE": size, "WIDTH": width, "num_warps": max(1, width // 512)}


def collect(x: Tensor, to: Assignment) -> Tensor:
    """See `reference.collect`. Every token is read once and written k times."""
    if to.row is None:
        return x
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = torch.empty(to.row.numel(), x.shape[1], dtype=x.dtype, device=x.device)
    grid, tile = _token_grid(*x.shape)
    if len(x):
        _collect[grid](x, to.row, rows, x.stride(0), TOP_K=to.top_k, **tile)
    return rows


def combine(y: Tensor, to: Assignment, weights: Tensor | None = None) -> Tensor:
    """See `reference.combine`. Rows are summed in the order of the choices, without atomics."""
    if to.row is None and weights is None:
        return y
    out = torch.empty(len(y) if to.row is None else len(to.row), y.shape[1], dtype=y.dtype, device=y.device)
    grid, tile = _token_grid(*out.shape)
    if len(out):
        _combine[grid](
            y.contiguous(), to.row, None if weights is None else weights.contiguous(), to.ends, out, len(to.counts),
            TOP_K=to.top_k, HAS_SLOTS=to.row is not None, WEIGHTED=weights is not None, **tile,
        )  # fmt: skip
    return out


def slot_sums(parts: Tensor, weights: Tensor, to: Assignment) -> Tensor:
    """See `reference.slot_sums`."""
    out = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    if len(parts):
        _slot_sums[(triton.cdiv(len(parts), COLUMNS),)](
            parts.contiguous(), to.row, to.ends, out, len(parts), len(to.counts), PARTS=parts.shape[1], SLOTS=COLUMNS,
            HAS_SLOTS=to.row is not None, num_warps=4,
        )  # fmt: skip
    return out


# -- activation --------------------------------------------------------------------------------------------------------
@triton.jit
def _weights(weights, slot_of, row, rows, HAS_SLOTS: tl.constexpr):
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slot_of + row, mask=row < rows, other=0)
    return slot, tl.load(weights + slot, mask=row < rows, other=0.0).to(tl.float32)


@triton.jit
def _activate(
    gate_up, weights, slot_of, h, rows, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    _, weight = _weights(weights, slot_of, row, rows, HAS_SLOTS)
    inside = (row < rows)[:, None] & (column < SIZE)[None, :]
    source = gate_up + row.to(tl.int64)[:, None] * (2 * SIZE) + column[None, :]
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(h + row.to(tl.int64)[:, None] * SIZE + column[None, :], value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward(
    grad, gate_up, weights, slot_of, ends, dweights, rows, experts, SIZE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot, weight = _weights(weights, slot_of, row, rows, HAS_SLOTS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, SIZE, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < SIZE)[None, :]
        at = grad + row.to(tl.int64)[:, None] * SIZE + column[None, :]
        source = gate_up + row.to(tl.int64)[:, None] * (2 * SIZE) + column[None, :]
        d = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        swish = gate * s
        total += tl.sum(d * swish * up, 1)
        tl.store(at, (swish * up * weight[:, None]).to(grad.dtype.element_ty), mask=inside)
        d *= weight[:, None]
        dtype = gate_up.dtype.element_ty
        tl.store(source, (d * up * (s + swish * (1 - s))).to(dtype), mask=inside)
        tl.store(source + SIZE, (d * swish).to(dtype), mask=inside)
    total = tl.where(row < tl.load(ends + experts - 1), total, 0.0)
    tl.store(dweights + slot, total.to(dweights.dtype.element_ty), mask=row < rows)


def activate(gate_up: Tensor, weights: Tensor, to: Assignment) -> Tensor:
    """See `reference.activate`."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    h = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _activate[(triton.cdiv(rows, ROWS), triton.cdiv(size, COLUMNS))](
            gate_up, weights.contiguous(), to.slot, h, rows, SIZE=size, ROWS=ROWS, COLUMNS=COLUMNS,
            HAS_SLOTS=to.slot is not None, num_warps=4,
        )  # fmt: skip
    return h


def activate_backward(grad: Tensor, gate_up: Tensor, weights: Tensor, to: Assignment) -> Tensor:
    """See `reference.activate_backward`."""
    assert grad.is_contiguous() and gate_up.is_contiguous(), "grad and gate_up are overwritten: they must be contiguous"
    rows, size = grad.shape
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    if rows:
        _activate_backward[(triton.cdiv(rows, ROWS),)](
            grad, gate_up, weights.contiguous(), to.slot, to.ends, dweights, rows, len(to.ends), SIZE=size, ROWS=ROWS,
            COLUMNS=COLUMNS, HAS_SLOTS=to.slot is not None, num_warps=4,
        )  # fmt: skip
    return dweights
