"""`norm` in two Triton kernels: every input is read once and every output and gradient written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of a tile, 16 for each thread of 4 warps
PROGRAMS = 4  # programs per multiprocessor, each with its own partial sums of the weights' gradients


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """Returns the activation and its derivative."""
    s = tl.sigmoid(gate)
    if ACTIVATION == "silu":
        return gate * s, s * (1 + gate * (1 - s))
    elif ACTIVATION == "sigmoid":
        return s, s * (1 - s)
    else:
        return gate, gate * 0 + 1


@triton.jit
def _places(row, groups, BY_GROUP: tl.constexpr):
    """Returns the token and the group of each row: see `_tiles`."""
    if BY_GROUP:
        return row.to(tl.int64), row * 0 + tl.program_id(1)
    else:
        return (row // groups).to(tl.int64), row % groups


@triton.jit
def _forward(
    x, weight, bias, gate, skip, skip_weight, y, rows, groups, head_dim, stride_x, stride_gate, stride_skip, stride_y,
    eps, scale, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BY_GROUP: tl.constexpr,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, group = _places(row, groups, BY_GROUP)
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
    elif GATE_FIRST:
        a, _ = _activate(u, ACTIVATION)
        u = tl.where(inside, a, 0.0)
    if KIND == "layer":
        u = tl.where(inside, u - (tl.sum(u, 1) / SIZE)[:, None], 0.0)
    n = u * scale
    if KIND != "none":
        n *= tl.rsqrt(tl.sum(u * u, 1) / SIZE + eps)[:, None]
    offset = feature + (tl.program_id(1) * SIZE if BY_GROUP else 0)
    if weight is not None:
        n *= tl.load(weight + offset, mask=feature < SIZE, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        n += tl.load(bias + offset, mask=feature < SIZE, other=0.0).to(tl.float32)[None, :]
    if gate is not None and not GATE_FIRST:
        n *= a
    tl.store(y + token[:, None] * stride_y + column, n.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, x, weight, bias, gate, skip, skip_weight, dx, dweight, dbias, dgate, dskip, dskip_weight, rows, groups,
    head_dim, stride_dy, stride_x, stride_gate, stride_skip, stride_d, eps, scale, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BY_GROUP: tl.constexpr, KIND: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, BLOCK)
    offset = feature + (tl.program_id(1) * SIZE if BY_GROUP else 0)
    if weight is not None:
        w = tl.load(weight + offset, mask=feature < SIZE, other=0.0).to(tl.float32)[None, :]
        sum_w = tl.zeros((ROWS, BLOCK), tl.float32)
    if bias is not None:
        b = tl.load(bias + offset, mask=feature < SIZE, other=0.0).to(tl.float32)[None, :]
        sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
    if skip is not None:
        sum_d = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        token, group = _places(row, groups, BY_GROUP)
        inside = (row < rows)[:, None] & (feature < SIZE)[None, :]
        column = group[:, None] * SIZE + feature[None, :]
        dn = tl.load(dy + token[:, None] * stride_dy + column, mask=inside, other=0.0).to(tl.float32)
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
        elif GATE_FIRST:
            a, slope = _activate(u, ACTIVATION)
            u = tl.where(inside, a, 0.0)
        if KIND == "layer":
            u = tl.where(inside, u - (tl.sum(u, 1) / SIZE)[:, None], 0.0)
        n = u
        if KIND != "none":
            r = tl.rsqrt(tl.sum(u * u, 1) / SIZE + eps)[:, None]
            n = u * r
        to = token[:, None] * stride_d + column
        if gate is not None and not GATE_FIRST:
            before = n * scale
            if weight is not None:
                before *= w
            if bias is not None:
                before += b
            tl.store(dgate + to, (dn * before * slope).to(dgate.dtype.element_ty), mask=inside)
            dn *= a
        if bias is not None:
            sum_b += dn
        dn *= scale
        if weight is not None:
            sum_w += dn * n
            dn *= w
        du = dn
        if KIND == "layer":
            du -= (tl.sum(dn, 1) / SIZE)[:, None]
        if KIND != "none":
            du = r * (du - n * (tl.sum(dn * n, 1) / SIZE)[:, None])
        if gate is not None and GATE_FIRST:
            tl.store(dgate + to, (du * before * slope).to(dgate.dtype.element_ty), mask=inside)
            du *= a
        elif GATE_FIRST:
            du *= slope
        tl.store(dx + to, du.to(dx.dtype.element_ty), mask=inside)
        if skip is not None:
            sum_d += du * s
            tl.store(dskip + to, (du * d).to(dskip.dtype.element_ty), mask=inside)
    partial = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * SIZE + feature
    if weight is not None:
        tl.store(dweight + partial, tl.sum(sum_w, 0), mask=feature < SIZE)
    if bias is not None:
        tl.store(dbias + partial, tl.sum(sum_b, 0), mask=feature < SIZE)
    if skip is not None:
        tl.store(dskip_weight + partial, tl.sum(sum_d, 0), mask=feature < SIZE)


def _tokens(x: Tensor | None) -> Tensor | None:
    """Flattens `x [..., C]` to `[tokens, C]` with contiguous features, without a copy where strides allow."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _tiles(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, skip: Tensor | None, size: int
) -> tuple[Tensor | None, Tensor | None, int, int, dict[str, Any]]:
    """Returns weight and bias as the kernels index them, the rows, the grid's second axis, and the kernels' constants.

    If weights differ between the groups of a token, the grid's second axis is the group, and a row is one token's part
    of this group. Otherwise a row is any group of any token.
    """
    groups = x.shape[1] // size
    by_group = groups > 1 and (skip is not None or (weight is not None and len(weight) > size))
    if by_group and weight is not None and len(weight) == size:
        weight, bias = weight.repeat(groups), None if bias is None else bias.repeat(groups)
    block = triton.next_power_of_2(size)
    rows = max(1, TILE // block)
    options = {"SIZE": size, "BLOCK": block, "ROWS": rows, "BY_GROUP": by_group}
    options["num_warps"] = min(16, max(4 if skip is None else 8, block // 512))  # a skip needs registers
    return weight, bias, *((len(x), groups) if by_group else (len(x) * groups, 1)), options


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    *,
    eps: float,
    kind: str,
    size: int,
    activation: str,
    gate_first: bool,
    scale: float,
) -> Tensor:
    """See `norms.definition`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, gate, skip, out = _tokens(x), _tokens(gate), _tokens(skip), _tokens(y)
    assert flat is not None and out is not None
    weight, bias, rows, second, tile = _tiles(flat, weight, bias, skip, size)
    head_dim = 1 if skip_weight is None else flat.shape[1] // len(skip_weight)
    if rows:
        _forward[(triton.cdiv(rows, tile["ROWS"]), second)](
            flat, weight, bias, gate, skip, skip_weight, out, rows, flat.shape[1] // size, head_dim, _stride(flat),
            _stride(gate), _stride(skip), _stride(out), eps, scale, KIND=kind, ACTIVATION=activation,
            GATE_FIRST=gate_first, **tile,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    *,
    eps: float,
    kind: str,
    size: int,
    activation: str,
    gate_first: bool,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, weight, bias, gate, skip and skip_weight. Sums over tokens are in a fixed order."""
    dx, dgate, dskip = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate, skip)
    )
    flat, gate, skip, dy = _tokens(x), _tokens(gate), _tokens(skip), _tokens(grad)
    assert flat is not None
    w, b, rows, second, tile = _tiles(flat, weight, bias, skip, size)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = max(1, min(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(PROGRAMS * processors, second)))
    summed = [t for t in (weight, bias, skip_weight) if t is not None]
    partial = torch.empty(len(summed), programs, second * size, dtype=torch.float32, device=x.device)
    rest = iter(partial)
    partial_w, partial_b, partial_d = (None if t is None else next(rest) for t in (weight, bias, skip_weight))
    head_dim = 1 if skip_weight is None else flat.shape[1] // len(skip_weight)
    _backward[(programs, second)](
        dy, flat, w, b, gate, skip, skip_weight, dx, partial_w, partial_b, dgate, dskip, partial_d, rows,
        flat.shape[1] // size, head_dim, _stride(dy), _stride(flat), _stride(gate), _stride(skip), flat.shape[1], eps,
        scale, KIND=kind, ACTIVATION=activation, GATE_FIRST=gate_first, **tile,
    )  # fmt: skip
    sums = iter(partial.sum(1) if summed else ())
    dweight, dbias = (None if t is None else _over_groups(next(sums), len(t)).to(t.dtype) for t in (weight, bias))
    dskip_weight = None
    if skip_weight is not None:
        dskip_weight = next(sums).view(len(skip_weight), head_dim).sum(1).to(skip_weight.dtype)
    return dx, dweight, dbias, dgate, dskip, dskip_weight


def _over_groups(sums: Tensor, features: int) -> Tensor:
    """Sums a gradient `[C]` over the groups to `[features]` if all groups share a weight of so many features."""
    return sums if len(sums) == features else sums.view(-1, features).sum(0)
