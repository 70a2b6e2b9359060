"""`rms_norm` in two Triton kernels: every input is read once and every output and gradient written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of a tile, 16 for each thread of 4 warps
PROGRAMS = 4  # per multiprocessor, each with its own partial sums of the weights' gradients


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    s = tl.sigmoid(gate)
    if ACTIVATION == "silu":
        return gate * s, s * (1 + gate * (1 - s))
    elif ACTIVATION == "sigmoid":
        return s, s * (1 - s)
    else:
        return gate, gate * 0 + 1


@triton.jit
def _forward(
    x, weight, gate, skip, skip_weight, y, rows, groups, head_dim, stride_x, stride_gate, stride_skip, stride_y, eps,
    scale, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BY_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if BY_GROUP:
        token, group = row.to(tl.int64), row * 0 + tl.program_id(1)
    else:
        token, group = (row // groups).to(tl.int64), row % groups
    feature = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (feature < SIZE)[None, :]
    column = group[:, None] * SIZE + feature[None, :]
    u = tl.load(x + token[:, None] * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    if skip is not None:
        d = tl.load(skip_weight + column // head_dim, mask=inside, other=0.0).to(tl.float32)
        u += d * tl.load(skip + token[:, None] * stride_skip + column, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        g = tl.load(gate + token[:, None] * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
        a, _ = _activate(g, ACTIVATION)
        if GATE_FIRST:
            u *= a
    n = u * (scale * tl.rsqrt(tl.sum(u * u, 1) / SIZE + eps))[:, None]
    if weight is not None:
        offset = tl.program_id(1) * SIZE if BY_GROUP else 0
        n *= tl.load(weight + offset + feature, mask=feature < SIZE, other=0.0).to(tl.float32)[None, :]
    if gate is not None and not GATE_FIRST:
        n *= a
    tl.store(y + token[:, None] * stride_y + column, n.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, x, weight, gate, skip, skip_weight, dx, dweight, dgate, dskip, dskip_weight, rows, groups, head_dim, stride_dy,
    stride_x, stride_gate, stride_skip, stride_d, eps, scale, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BY_GROUP: tl.constexpr, ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, BLOCK)
    if weight is not None:
        offset = tl.program_id(1) * SIZE if BY_GROUP else 0
        w = tl.load(weight + offset + feature, mask=feature < SIZE, other=0.0).to(tl.float32)[None, :]
        sum_w = tl.zeros((ROWS, BLOCK), tl.float32)
    if skip is not None:
        sum_d = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        if BY_GROUP:
            token, group = row.to(tl.int64), row * 0 + tl.program_id(1)
        else:
            token, group = (row // groups).to(tl.int64), row % groups
        inside = (row < rows)[:, None] & (feature < SIZE)[None, :]
        column = group[:, None] * SIZE + feature[None, :]
        dn = scale * tl.load(dy + token[:, None] * stride_dy + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(x + token[:, None] * stride_x + column, mask=inside, other=0.0).to(tl.float32)
        if skip is not None:
            d = tl.load(skip_weight + column // head_dim, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(skip + token[:, None] * stride_skip + column, mask=inside, other=0.0).to(tl.float32)
            u += d * s
        if gate is not None:
            g = tl.load(gate + token[:, None] * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
            a, slope = _activate(g, ACTIVATION)
            if GATE_FIRST:
                before = u
                u *= a
        r = tl.rsqrt(tl.sum(u * u, 1) / SIZE + eps)[:, None]
        n = u * r
        to = token[:, None] * stride_d + column
        if gate is not None and not GATE_FIRST:
            dg = dn * n * slope
            if weight is not None:
                dg *= w
            tl.store(dgate + to, dg.to(dgate.dtype.element_ty), mask=inside)
            dn *= a
        if weight is not None:
            sum_w += dn * n
            dn *= w
        du = r * (dn - n * (tl.sum(dn * n, 1) / SIZE)[:, None])
        if gate is not None and GATE_FIRST:
            tl.store(dgate + to, (du * before * slope).to(dgate.dtype.element_ty), mask=inside)
            du *= a
        tl.store(dx + to, du.to(dx.dtype.element_ty), mask=inside)
        if skip is not None:
            sum_d += du * s
            tl.store(dskip + to, (du * d).to(dskip.dtype.element_ty), mask=inside)
    partial = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * SIZE + feature
    if weight is not None:
        tl.store(dweight + partial, tl.sum(sum_w, 0), mask=feature < SIZE)
    if skip is not None:
        tl.store(dskip_weight + partial, tl.sum(sum_d, 0), mask=feature < SIZE)


def _tokens(x: Tensor | None) -> Tensor | None:
    """`[..., C]` -> `[tokens, C]` with neighbouring features, without a copy where strides allow."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _tiles(
    x: Tensor, weight: Tensor | None, skip: Tensor | None, size: int
) -> tuple[Tensor | None, int, int, dict[str, Any]]:
    """The weight as the kernels index it, rows, the grid's second axis, and constants of the kernels.

    Where weights differ between the groups of a token, the second axis is the group and a row one token's part of it;
    else a row is any group of any token.
    """
    groups = x.shape[1] // size
    by_group = groups > 1 and (skip is not None or (weight is not None and len(weight) > size))
    if by_group and weight is not None and len(weight) == size:
        weight = weight.repeat(groups)
    block = triton.next_power_of_2(size)
    rows = max(1, TILE // block)
    options = {"SIZE": size, "BLOCK": block, "ROWS": rows, "BY_GROUP": by_group}
    options["num_warps"] = min(16, max(4 if skip is None else 8, block // 512))  # a skip takes registers
    return (weight, len(x), groups, options) if by_group else (weight, len(x) * groups, 1, options)


def forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    *,
    eps: float,
    size: int,
    activation: str,
    gate_first: bool,
    scale: float,
) -> Tensor:
    """See `rms_norm.definition`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, gate, skip, out = _tokens(x), _tokens(gate), _tokens(skip), _tokens(y)
    assert flat is not None and out is not None
    weight, rows, second, tile = _tiles(flat, weight, skip, size)
    head_dim = 1 if skip_weight is None else flat.shape[1] // len(skip_weight)
    if rows:
        _forward[(triton.cdiv(rows, tile["ROWS"]), second)](
            flat, weight, gate, skip, skip_weight, out, rows, flat.shape[1] // size, head_dim, _stride(flat),
            _stride(gate), _stride(skip), _stride(out), eps, scale, ACTIVATION=activation, GATE_FIRST=gate_first,
            **tile,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    *,
    eps: float,
    size: int,
    activation: str,
    gate_first: bool,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, gate, skip and skip_weight. Sums over tokens are in a fixed order."""
    dx, dgate, dskip = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate, skip)
    )
    flat, gate, skip, dy = _tokens(x), _tokens(gate), _tokens(skip), _tokens(grad)
    assert flat is not None
    expanded, rows, second, tile = _tiles(flat, weight, skip, size)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = max(1, min(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(PROGRAMS * processors, second)))
    partial = torch.empty(2, programs, second * size, dtype=torch.float32, device=x.device)
    head_dim = 1 if skip_weight is None else flat.shape[1] // len(skip_weight)
    _backward[(programs, second)](
        dy, flat, expanded, gate, skip, skip_weight, dx, partial[0], dgate, dskip, partial[1], rows,
        flat.shape[1] // size, head_dim, _stride(dy), _stride(flat), _stride(gate), _stride(skip), flat.shape[1], eps,
        scale, ACTIVATION=activation, GATE_FIRST=gate_first, **tile,
    )  # fmt: skip
    dweight = dskip_weight = None
    if weight is not None:
        dweight = partial[0].sum(0).view(-1, len(weight)).sum(0).to(weight.dtype)
    if skip_weight is not None:
        dskip_weight = partial[1].sum(0).view(len(skip_weight), head_dim).sum(1).to(skip_weight.dtype)
    return dx, dweight, dgate, dskip, dskip_weight
