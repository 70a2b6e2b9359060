"""Sums over tokens of decaying outer products, in two Triton kernels: parts of the tokens side by side, then joined."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64  # tokens of one product
BLOCK = 128  # keys and values of a tile at most
PROGRAMS = 264  # programs wanted at once: two for each multiprocessor of an H100
JOINED = 32  # keys of a tile of the second kernel
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _decays(g, token, stride, channel, there, FLOOR: tl.constexpr, BACKWARDS: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """Returns log2-decays of a chunk: from each token to the end (BACKWARDS: from the beginning), and of the whole."""
    value = tl.load(g + token[:, None] * stride + channel[None, :], mask=there, other=0.0).to(tl.float32)
    value = tl.maximum(value, FLOOR) * LOG2_E
    value = tl.where(there, value, 0.0)
    sums, total = tl.cumsum(value, 0), tl.sum(value, 0)
    if BACKWARDS:
        left = sums - value if EXCLUSIVE else sums
    else:
        left = total[None, :] - sums
    return left, total


@triton.jit
def _parts(
    k, v, g, gv, part, total, total_v, T, H, K, V, tokens, k_n, k_t, k_h, v_n, v_t, v_h, g_n, g_t, g_h, gv_n, gv_t,
    gv_h, FLOOR: tl.constexpr, PER_KEY: tl.constexpr, BACKWARDS: tl.constexpr, EXCLUSIVE: tl.constexpr,
    CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Stores the sums over S parts of the tokens, `part [N, S, H, K, V]`, and the log2-decays of the parts.

    The latter are `total [N, S, H, K]` of keys and `total_v [N, S, H, V]` of values.
    """
    piece, row, head = tl.program_id(0), (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    tiles = tl.cdiv(V, BV)
    key = (tl.program_id(2) // tiles) * BK + tl.arange(0, BK)
    value = (tl.program_id(2) % tiles) * BV + tl.arange(0, BV)
    k += row * k_n + head * k_h
    v += row * v_n + head * v_h
    state = tl.zeros((BK, BV), tl.float32)
    sums_k, sums_v = tl.zeros((BK,), tl.float32), tl.zeros((BV,), tl.float32)
    begin, end = piece * tokens, tl.minimum(piece * tokens + tokens, T)
    for i in range(0, tokens, CHUNK):
        at = end - 1 - i - (CHUNK - 1) if BACKWARDS else begin + i
        t = at + tl.arange(0, CHUNK)
        here = (t >= begin) & (t < end)
        t = t.to(tl.int64)
        in_k, in_v = here[:, None] & (key < K)[None, :], here[:, None] & (value < V)[None, :]
        keys = tl.load(k + t[:, None] * k_t + key[None, :], mask=in_k, other=0.0)
        values = tl.load(v + t[:, None] * v_t + value[None, :], mask=in_v, other=0.0)
        if g is not None:
            base = g + row * g_n + head * g_h
            if PER_KEY:
                left, all_k = _decays(base, t, g_t, key, in_k, FLOOR, BACKWARDS, EXCLUSIVE)
            else:
                left, all_k = _decays(
                    base, t, g_t, tl.zeros((1,), tl.int32), here[:, None], FLOOR, BACKWARDS, EXCLUSIVE
                )
            keys = (keys * tl.exp2(left)).to(values.dtype)
            state *= tl.exp2(all_k)[:, None]
            sums_k += all_k
        if gv is not None:
            base = gv + row * gv_n + head * gv_h
            left, all_v = _decays(base, t, gv_t, value, in_v, FLOOR, BACKWARDS, EXCLUSIVE)
            values = (values * tl.exp2(left)).to(values.dtype)
            state *= tl.exp2(all_v)[None, :]
            sums_v += all_v
        state = tl.dot(tl.trans(keys.to(values.dtype)), values, state)
    place = (row * tl.num_programs(0) + piece) * H + head
    inside = (key < K)[:, None] & (value < V)[None, :]
    tl.store(part + place * K * V + key[:, None] * V + value[None, :], state, mask=inside)
    if g is not None:
        tl.store(total + place * K + key, sums_k, mask=key < K)
    if gv is not None:
        tl.store(total_v + place * V + value, sums_v, mask=value < V)


@triton.jit
def _join(
    part, total, total_v, state, transition, H, K, V, parts, LEFT_K: tl.constexpr, LEFT_V: tl.constexpr,
    BACKWARDS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Runs the recurrence from part to part: `state [N, H, K, V]` and `transition [N, H, K or 1, V or 1]`."""
    row, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    key, value = tl.program_id(1) * BK + tl.arange(0, BK), tl.arange(0, BV)
    inside = (key < K)[:, None] & (value < V)[None, :]
    joined = tl.zeros((BK, BV), tl.float32)
    sums = tl.zeros((BK, BV), tl.float32)
    for i in range(parts):
        place = (row * parts + (parts - 1 - i if BACKWARDS else i)) * H + head
        own = tl.load(part + place * K * V + key[:, None] * V + value[None, :], mask=inside, other=0.0)
        left = tl.zeros((BK, BV), tl.float32)
        if total is not None:
            left += tl.load(total + place * K + key, mask=key < K, other=0.0)[:, None]
        if total_v is not None:
            left += tl.load(total_v + place * V + value, mask=value < V, other=0.0)[None, :]
        joined = joined * tl.exp2(left) + own
        sums += left
    at = row * H + head
    tl.store(state + at * K * V + key[:, None] * V + value[None, :], joined, mask=inside)
    # a decay that all keys, or all values, share is stored once
    if LEFT_K == 1:
        inside = inside & (key == 0)[:, None]
    if LEFT_V == 1:
        inside = inside & (value == 0)[None, :]
    to = transition + at * LEFT_K * LEFT_V + key[:, None] * LEFT_V + value[None, :]
    tl.store(to, tl.exp2(sums), mask=inside)


def weighted_sum(
    k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, *, floor: float, backwards: bool, exclusive: bool
) -> tuple[Tensor, Tensor]:
    """Computes the sum over t of `k_t v_t^T`, decayed by the gates of the tokens behind t (backwards: up to t).

    Args:
        k: `[N, T, H, K]`.
        v: `[N, T, H, V]`; its dtype is that of the products.
        g: `[N, T, H]` or `[N, T, H, K]` log-decay; None: no decay.
        gv: `[N, T, H, V]` log-decay; None: no decay.
        floor: gates below the floor count as the floor.
        backwards: whether decays run from the beginning to t, its own gate included, instead of from t to the end.
        exclusive: backwards, whether the gate of t itself is left out.

    Returns:
        The decay over all tokens `[N, H, K or 1, V or 1]`, and the sum `[N, H, K, V]`; fp32.
    """
    rows, length, heads, keys = k.shape
    values, per_key = v.shape[3], g is not None and g.ndim == 4
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    g = g if g is None or not per_key or g.stride(3) == 1 else g.contiguous()
    gv = gv if gv is None or gv.stride(3) == 1 else gv.contiguous()
    block_k, block_v = (max(16, min(BLOCK, triton.next_power_of_2(n))) for n in (keys, values))
    tiles = triton.cdiv(keys, block_k) * triton.cdiv(values, block_v)
    chunks = triton.cdiv(length, CHUNK)
    tokens = triton.cdiv(chunks, min(chunks, max(1, PROGRAMS // (rows * heads * tiles)))) * CHUNK
    parts = triton.cdiv(length, tokens)
    new = k.new_empty
    part = new(rows, parts, heads, keys, values, dtype=torch.float32)
    total = None if g is None else new(rows, parts, heads, keys, dtype=torch.float32)
    total_v = None if gv is None else new(rows, parts, heads, values, dtype=torch.float32)
    gate, gate_v = ((0, 0, 0) if x is None else x.stride()[:3] for x in (g, gv))
    _parts[(parts, rows * heads, tiles)](
        k, v, g, gv, part, total, total_v, length, heads, keys, values, tokens, *k.stride()[:3], *v.stride()[:3],
        *gate, *gate_v, FLOOR=floor, PER_KEY=per_key, BACKWARDS=backwards, EXCLUSIVE=exclusive, CHUNK=CHUNK,
        BK=block_k, BV=block_v, num_warps=8 if block_k * block_v > 4096 else 4, num_stages=2,
    )  # fmt: skip
    state = new(rows, heads, keys, values, dtype=torch.float32)
    left = new(rows, heads, keys if per_key else 1, 1 if gv is None else values, dtype=torch.float32)
    _join[(rows * heads, triton.cdiv(keys, JOINED))](
        part, total, total_v, state, left, heads, keys, values, parts, LEFT_K=left.shape[2], LEFT_V=left.shape[3],
        BACKWARDS=backwards, BK=JOINED, BV=triton.next_power_of_2(values), num_warps=4,
    )  # fmt: skip
    return left, state
