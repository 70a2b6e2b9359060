"""Denominators of linear attention, and the division by them, in Triton kernels.

`totals` reads q and k in chunks of tokens. Within a chunk it multiplies matrices. Earlier chunks contribute the sum of
the document's keys in them, from one sum per chunk and a scan over the chunks; a running sum for every token is never
written. The backward pass does the same from the end, with the queries, times the gradients of the denominators, in
place of the keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.packing import first_tokens

CHUNK = 64  # tokens
BLOCK = 64  # channels of a tile
SCAN = 128  # chunks that a program of the scan takes at once
SCAN_CHANNELS = 16
TILE = 2048  # elements of a tile of the division


@triton.jit
def _combine(keep_1, sum_1, keep_2, sum_2):
    return keep_1 * keep_2, sum_2 + keep_2 * sum_1


@triton.jit
def _sum_chunks(
    x, weight, first, sums, T, H, K, CHUNK: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Sums over the tokens of a chunk that belong to the document of its last token.

    With REVERSE, over the tokens whose document began before the chunk. These sums are what the chunks behind (REVERSE:
    before) may need of this chunk.
    """
    chunk, row, head = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t, channel = chunk * CHUNK + tl.arange(0, CHUNK), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    keep = t < T
    if first is not None:
        if REVERSE:
            keep = keep & (tl.load(first + t, mask=keep, other=0) < chunk * CHUNK)
        else:
            keep = keep & (t >= tl.load(first + tl.minimum(chunk * CHUNK + CHUNK, T) - 1))
    token = (row * T + t) * H + head
    inside = keep[:, None] & (channel < K)[None, :]
    value = tl.load(x + token[:, None] * K + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        value *= tl.load(weight + token, mask=keep, other=0.0)[:, None]
    to = ((row * tl.num_programs(0) + chunk) * H + head) * K + channel
    tl.store(sums + to, tl.sum(value, 0), mask=channel < K)


@triton.jit
def _scan(
    sums, first, T, H, K, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Adds to the sum of every chunk, in place, its document's sums in the chunks before (REVERSE: behind)."""
    row, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    carried = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunks, CHUNKS):
        i = start + tl.arange(0, CHUNKS)
        chunk = chunks - 1 - i if REVERSE else i
        keep = tl.zeros((CHUNKS, BLOCK), tl.float32) + 1
        if first is not None:  # the sums so far count only if one document covers the whole chunk
            token = (chunk + 1) * CHUNK if REVERSE else tl.minimum((chunk + 1) * CHUNK, T) - 1
            there = (i < chunks) & (token < T)
            begins = tl.load(first + token, mask=there, other=0)
            keep *= (there & (begins < chunk * CHUNK)).to(tl.float32)[:, None]
        at = ((row * chunks + chunk) * H + head)[:, None] * K + channel[None, :]
        inside = (i < chunks)[:, None] & (channel < K)[None, :]
        own = tl.load(sums + at, mask=inside, other=0.0)
        kept, total = tl.associative_scan((keep, own), 0, _combine)
        total += kept * carried[None, :]
        tl.store(sums + at, total, mask=inside)
        carried = tl.sum(tl.where((tl.arange(0, CHUNKS) == CHUNKS - 1)[:, None], total, 0.0), 0)


@triton.jit
def _before(sums, row, head, chunk, chunks, H, K, channel):
    """Loads the scanned sum of a neighbouring chunk; zeros if there is no such chunk."""
    inside = channel < tl.where((chunk >= 0) & (chunk < chunks), K, 0)
    at = ((row * chunks + chunk) * H + head) * K + channel
    return tl.load(sums + at, mask=inside, other=0.0)


@triton.jit
def _forward(q, k, sums, first, total, scale, T, H, K, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    chunk, row, head = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    token = (row * T + t) * H + head
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    across = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, K, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = (t < T)[:, None] & (channel < K)[None, :]
        query = tl.load(q + token[:, None] * K + channel[None, :], mask=inside, other=0.0)
        key = tl.load(k + token[:, None] * K + channel[None, :], mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), scores, input_precision="ieee")
        before = _before(sums, row, head, chunk - 1, tl.num_programs(0), H, K, channel)
        across += tl.sum(query.to(tl.float32) * before[None, :], 1)
    own = t[:, None] >= t[None, :]
    if first is not None:
        begins = tl.load(first + t, mask=t < T, other=0)
        own = own & (t[None, :] >= begins[:, None])
        across = tl.where(begins < chunk * CHUNK, across, 0.0)
    across += tl.sum(tl.where(own, scores, 0.0), 1)
    tl.store(total + token, across * scale, mask=t < T)


@triton.jit
def _backward(
    dtotal, q, k, dq, dk, before_sums, behind_sums, first, dq_out, dk_out, T, H, K, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the denominators' gradients to dq and dk, the gradients from other uses; dtotal includes the scale."""
    chunk, row, head = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t, chunks = chunk * CHUNK + tl.arange(0, CHUNK), tl.num_programs(0)
    token = (row * T + t) * H + head
    weight = tl.load(dtotal + token, mask=t < T, other=0.0)
    own = t[:, None] >= t[None, :]
    since, on = tl.zeros((CHUNK,), tl.float32) + 1, tl.zeros((CHUNK,), tl.float32) + 1
    end = chunk * CHUNK + CHUNK
    if first is not None:
        begins = tl.load(first + t, mask=t < T, other=0)
        own = own & (t[None, :] >= begins[:, None])
        since = (begins < chunk * CHUNK).to(tl.float32)  # the document began before this chunk
        on = (t >= tl.load(first + end, mask=end < T, other=0)).to(tl.float32)  # the document goes on behind it
    mask = own.to(q.dtype.element_ty)
    for start in range(0, K, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = (t < T)[:, None] & (channel < K)[None, :]
        at = token[:, None] * K + channel[None, :]
        key = tl.load(k + at, mask=inside, other=0.0)
        before = _before(before_sums, row, head, chunk - 1, chunks, H, K, channel)
        z = tl.dot(mask, key, input_precision="ieee") + since[:, None] * before[None, :]
        gradient = tl.load(dq + at, mask=inside, other=0.0).to(tl.float32) + weight[:, None] * z
        tl.store(dq_out + at, gradient.to(dq_out.dtype.element_ty), mask=inside)
        query = tl.load(q + at, mask=inside, other=0.0).to(tl.float32) * weight[:, None]
        behind = _before(behind_sums, row, head, chunk + 1, chunks, H, K, channel)
        later = tl.dot(tl.trans(mask), query.to(mask.dtype), input_precision="ieee") + on[:, None] * behind[None, :]
        gradient = tl.load(dk + at, mask=inside, other=0.0).to(tl.float32) + later
        tl.store(dk_out + at, gradient.to(dk_out.dtype.element_ty), mask=inside)


@triton.jit
def _final(k, sums, cu_seqlens, final, chunks, H, K, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the sum of a document's keys: those in its last chunk, and the scanned sum of the chunks before."""
    document, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(cu_seqlens + document), tl.load(cu_seqlens + document + 1)
    chunk = tl.maximum(end - 1, 0) // CHUNK
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ((t >= begin) & (t < end))[:, None] & (channel < K)[None, :]
    value = tl.load(k + (t * H + head)[:, None] * K + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    earlier = tl.where((begin < chunk * CHUNK) & (begin < end), chunk - 1, -1)
    before = _before(sums, document * 0, head, earlier, chunks, H, K, channel)
    tl.store(final + (document * H + head) * K + channel, tl.sum(value, 0) + before, mask=channel < K)


def _sums(x: Tensor, weight: Tensor | None, first: Tensor | None, reverse: bool) -> Tensor:
    """Returns running sums of `x`, times `weight`, over chunks: `[B, chunks, H, K]` fp32."""
    batch, length, heads, size = x.shape
    chunks = triton.cdiv(length, CHUNK)
    sums = torch.empty(batch, chunks, heads, size, dtype=torch.float32, device=x.device)
    _sum_chunks[(chunks, batch * heads, triton.cdiv(size, BLOCK))](
        x, weight, first, sums, length, heads, size, CHUNK=CHUNK, BLOCK=BLOCK, REVERSE=reverse, num_warps=4
    )
    _scan[(batch * heads, triton.cdiv(size, SCAN_CHANNELS))](
        sums, first, length, heads, size, chunks, CHUNK=CHUNK, CHUNKS=SCAN, BLOCK=SCAN_CHANNELS, REVERSE=reverse,
        num_warps=4,
    )  # fmt: skip
    return sums


class _Totals(Function):
    """The autograd function of `totals`.

    It returns q and k too: other operations that use the returned tensors leave their gradients in the backward pass of
    this function, whose kernel adds its own.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, scale: float, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        q, k = q.contiguous(), k.contiguous()
        batch, length, heads, size = q.shape
        first = None if cu_seqlens is None else first_tokens(cu_seqlens, length)
        sums = _sums(k, None, first, False)
        total = torch.empty(batch, length, heads, 1, dtype=torch.float32, device=q.device)
        _forward[(sums.shape[1], batch * heads)](
            q, k, sums, first, total, scale, length, heads, size, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4
        )
        final = sums[:, -1, :, :, None].clone()
        if cu_seqlens is not None:
            final = sums.new_empty(len(cu_seqlens) - 1, heads, size, 1)
            _final[(len(final), heads, triton.cdiv(size, BLOCK))](
                k, sums, cu_seqlens, final, sums.shape[1], heads, size, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4
            )
        ctx.save_for_backward(q, k, sums, first, cu_seqlens)
        ctx.scale = scale
        return q.view_as(q), k.view_as(k), total, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dq: Tensor | None, dk: Tensor | None, dtotal: Tensor | None, dfinal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, sums, first, cu_seqlens = ctx.saved_tensors
        batch, length, heads, size = q.shape
        if dtotal is not None:
            dtotal = (dtotal * ctx.scale).contiguous()
            dq, dk = (torch.zeros_like(q) if d is None else d.contiguous() for d in (dq, dk))
            behind, dq_out, dk_out = _sums(q, dtotal, first, True), torch.empty_like(q), torch.empty_like(k)
            _backward[(sums.shape[1], batch * heads)](
                dtotal, q, k, dq, dk, sums, behind, first, dq_out, dk_out, length, heads, size, CHUNK=CHUNK,
                BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
            dq, dk = dq_out, dk_out
        if dfinal is not None:
            each = dfinal.squeeze(-1).unsqueeze(1)  # the same for every token of a sequence
            if cu_seqlens is not None:
                tokens = torch.arange(length, device=q.device)
                each = each[torch.searchsorted(cu_seqlens, tokens, right=True) - 1].transpose(0, 1)
            dk = (each if dk is None else dk + each).expand_as(k).to(k.dtype)
        return dq, dk, None, None


def totals(q: Tensor, k: Tensor, scale: float, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the denominators `scale * q_t (k_1 + ... + k_t)` within each document, and the sums of its keys.

    Returns:
        q and k `[B, T, H, K]`, which callers must use in place of the arguments, the denominators `[B, T, H, 1]` and
        the sums of k at the documents' ends `[N, H, K, 1]`, both in fp32.
    """
    with torch.cuda.device_of(q):  # Triton launches on the current device; autograd sets it in backward
        return _Totals.apply(q, k, scale, cu_seqlens)


@triton.jit
def _divide(o, total, y, rows, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row, channel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (channel < SIZE)[None, :]
    at = row[:, None] * SIZE + channel[None, :]
    divisor = tl.load(total + row, mask=row < rows, other=1.0) + eps
    value = tl.load(o + at, mask=inside, other=0.0).to(tl.float32) / divisor[:, None]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _divide_backward(
    dy, o, total, do, dtotal, rows, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row, channel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (channel < SIZE)[None, :]
    at = row[:, None] * SIZE + channel[None, :]
    divisor = tl.load(total + row, mask=row < rows, other=1.0) + eps
    gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) / divisor[:, None]
    tl.store(do + at, gradient.to(do.dtype.element_ty), mask=inside)
    value = tl.load(o + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dtotal + row, -tl.sum(gradient * value, 1) / divisor, mask=row < rows)


def _rows(size: int) -> dict[str, int]:
    """Returns the constants of the kernels of the division."""
    block = triton.next_power_of_2(size)
    return {"SIZE": size, "BLOCK": block, "ROWS": max(1, TILE // block), "num_warps": 4}


def forward(o: Tensor, total: Tensor, *, eps: float) -> Tensor:
    """See `normalizer.divide`."""
    o, total = o.contiguous(), total.contiguous()
    y, tile = torch.empty_like(o), _rows(o.shape[-1])
    _divide[(triton.cdiv(total.numel(), tile["ROWS"]),)](o, total, y, total.numel(), eps, **tile)
    return y


def backward(grad: Tensor, o: Tensor, total: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the gradients of o and total."""
    grad, o, total = grad.contiguous(), o.contiguous(), total.contiguous()
    do, dtotal, tile = torch.empty_like(o), torch.empty_like(total), _rows(o.shape[-1])
    _divide_backward[(triton.cdiv(total.numel(), tile["ROWS"]),)](
        grad, o, total, do, dtotal, total.numel(), eps, **tile
    )
    return do, dtotal
