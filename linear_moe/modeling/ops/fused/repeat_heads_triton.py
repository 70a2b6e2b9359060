"""`repeat_heads` in two Triton kernels: forward writes the repeated heads, backward reads their gradient once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a tile at most, 16 for each thread of 8 warps


@triton.jit
def _forward(
    x, weight, y, groups, repeats, stride_x, stride_weight, SIZE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr
):
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    row = tl.load(x + token * stride_x + group * SIZE + channel, mask=channel < SIZE, other=0.0).to(tl.float32)
    for start in range(0, repeats, HEADS):
        local = start + tl.arange(0, HEADS)
        head = group * repeats + local
        w = tl.full((HEADS,), 1.0, tl.float32)
        if weight is not None:
            w = tl.load(weight + token * stride_weight + head, mask=local < repeats, other=0.0).to(tl.float32)
        to = y + token * (groups * repeats * SIZE) + head[:, None] * SIZE + channel[None, :]
        value = (w[:, None] * row[None, :]).to(y.dtype.element_ty)
        tl.store(to, value, mask=(local < repeats)[:, None] & (channel < SIZE)[None, :])


@triton.jit
def _backward(
    dy, x, weight, dx, dweight, groups, repeats, stride_dy, stride_head, stride_x, stride_weight, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    if weight is not None:
        row = tl.load(x + token * stride_x + group * SIZE + channel, mask=channel < SIZE, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, repeats, HEADS):
        local = start + tl.arange(0, HEADS)
        head = group * repeats + local
        w = tl.full((HEADS,), 1.0, tl.float32)
        if weight is not None:
            w = tl.load(weight + token * stride_weight + head, mask=local < repeats, other=0.0).to(tl.float32)
        source = dy + token * stride_dy + head[:, None] * stride_head + channel[None, :]
        d = tl.load(source, mask=(local < repeats)[:, None] & (channel < SIZE)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(d * w[:, None], 0)
        if weight is not None:
            dw = tl.sum(d * row[None, :], 1).to(dweight.dtype.element_ty)
            tl.store(dweight + token * (groups * repeats) + head, dw, mask=local < repeats)
    to = dx + token * (groups * SIZE) + group * SIZE + channel
    tl.store(to, total.to(dx.dtype.element_ty), mask=channel < SIZE)


def _tile(x: Tensor, weight: Tensor | None, heads: int) -> tuple[Tensor, Tensor | None, int, int, dict[str, int]]:
    """Returns `x [N, G * K]`, `weight [N, H]`, G, H / G, and the constants of the kernels."""
    groups, size = x.shape[-2:]
    block = triton.next_power_of_2(size)
    at_once = min(triton.next_power_of_2(heads // groups), max(1, TILE // block))
    warps = min(8, max(1, at_once * block // 512))
    tile = {"SIZE": size, "BLOCK": block, "HEADS": at_once, "num_warps": warps}
    rows = x.reshape(-1, groups * size).contiguous()
    weight = None if weight is None else weight.reshape(-1, heads).contiguous()
    return rows, weight, groups, heads // groups, tile


def forward(x: Tensor, weight: Tensor | None, *, heads: int) -> Tensor:
    """See `repeat_heads.definition`."""
    y = torch.empty(*x.shape[:-2], heads, x.shape[-1], dtype=x.dtype, device=x.device)
    rows, w, groups, repeats, tile = _tile(x, weight, heads)
    if len(rows):
        _forward[(len(rows), groups)](rows, w, y, groups, repeats, rows.stride(0), heads, **tile)
    return y


def backward(grad: Tensor, x: Tensor, weight: Tensor | None, *, heads: int) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of x and weight."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = None if weight is None else torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rows, w, groups, repeats, tile = _tile(x, weight, heads)
    dy = grad.reshape(-1, *grad.shape[-2:])
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    if len(rows):
        _backward[(len(rows), groups)](
            dy, rows, w, dx, dweight, groups, repeats, dy.stride(0), dy.stride(1), rows.stride(0), heads, **tile
        )
    return dx, dweight
