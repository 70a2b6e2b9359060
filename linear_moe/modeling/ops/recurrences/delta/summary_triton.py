"""States and transitions of the delta rule and DPLR from chunk to chunk, in Triton kernels, given the chunks' WY forms.

In a chunk that starts from state S, tokens write u - w S (see `delta/chunk.py`), so S becomes D S + k^T (u - w S), with
k decayed to the chunk's end and D the chunk's decay. The gradient G of the state after the chunk becomes that of S,
D G + q^T do - w^T (dv + k G), with q decayed from the chunk's start and dv the gradients of the chunk's writes from its
own outputs. DPLR has + in place of -, its b in place of k, and the term k^T v of its own k in addition.

Both recurrences are run on columns of zeros, which end as the state that the tokens add, and on the columns of the
identity, which end as the transition. Parts of the tokens are run side by side, and a second kernel joins them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 64  # columns of a tile
PROGRAMS = 264  # programs wanted at once: two for each multiprocessor of an H100
LEAST = 8  # chunks of a part at least: joining a part costs as much as a few chunks
JOINED = 32  # columns of a tile of the second kernel
MAX_JOINED = 128  # keys of the largest transition that fits into the registers of the second kernel


@triton.jit
def _rows(x, token, stride, column, here, inside):
    """Loads columns of the tokens' rows in `x`, zeros outside."""
    return tl.load(x + token[:, None] * stride + column[None, :], mask=here[:, None] & inside[None, :], other=0.0)


@triton.jit
def _parts(
    q, k, w, u, do, g, gk, part, scale, T, H, K, V, tokens, SIGN: tl.constexpr, BACKWARDS: tl.constexpr,
    CHUNK: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores `part [N, S, H, K, V + K]`: the added states and the transitions of S parts of the tokens.

    All inputs are `[N, T, H, ...]`; u is dv if BACKWARDS.
    """
    tile, piece, head = tl.program_id(0), tl.program_id(1), tl.program_id(2) % H
    row = (tl.program_id(2) // H).to(tl.int64)
    tiles = tl.cdiv(V, COLUMNS)
    adds = tile < tiles  # columns of the added state, else of the transition
    key = tl.arange(0, BK)
    column = tl.where(adds, tile, tile - tiles) * COLUMNS + tl.arange(0, COLUMNS)
    in_key, in_value = key < K, column < tl.where(adds, V, 0)
    state = tl.where(key[:, None] == tl.where(adds, -1, column)[None, :], 1.0, 0.0)
    first = row * T * H + head  # the first token of this row and head; tokens are H apart
    begin, end = piece * tokens, tl.minimum(piece * tokens + tokens, T)
    for i in range(0, tl.cdiv(end - begin, CHUNK)):
        chunk = tl.cdiv(end - begin, CHUNK) - 1 - i if BACKWARDS else i
        t = begin + chunk * CHUNK + tl.arange(0, CHUNK)
        here = t < end
        last = first + (tl.minimum(begin + chunk * CHUNK + CHUNK, end) - 1).to(tl.int64) * H
        token = first + t.to(tl.int64) * H
        keys, reads = _rows(k, token, K, key, here, in_key), _rows(w, token, K, key, here, in_key)
        left = tl.full((CHUNK,), 1.0, tl.float32)
        if BACKWARDS:
            writes = tl.dot(keys, state.to(keys.dtype))
        else:
            writes = SIGN * tl.dot(reads, state.to(reads.dtype))
        if g is not None:
            sums, total = tl.load(g + token, mask=here, other=0.0), tl.load(g + last)
            left = tl.where(here, tl.exp2(total - sums), 0.0)
            state *= tl.exp2(total)
        if gk is not None:
            state *= tl.exp2(tl.load(gk + last * K + key, mask=in_key, other=0.0))[:, None]
        own = _rows(u, token, V, column, here, in_value).to(tl.float32)
        if BACKWARDS:
            writes = own + writes * left[:, None]
            state += SIGN * tl.dot(tl.trans(reads), writes.to(reads.dtype))
        else:
            writes = (own + writes) * left[:, None]
            state = tl.dot(tl.trans(keys), writes.to(keys.dtype), state)
        if q is not None:  # noqa: SIM102  only this condition is known at compile time
            if adds:
                queries = _rows(q, token, K, key, here, in_key) * scale
                if g is not None:
                    queries = queries * tl.exp2(sums)[:, None]
                d = _rows(do, token, V, column, here, in_value)
                state = tl.dot(tl.trans(queries.to(d.dtype)), d, state)
    width = V + K
    place = ((row * tl.num_programs(1) + piece) * H + head) * K * width
    to = tl.where(adds, 0, V) + column
    there = column < tl.where(adds, V, K)
    tl.store(part + place + key[:, None] * width + to[None, :], state, mask=in_key[:, None] & there[None, :])


@triton.jit
def _join(
    part, joined, H, K, V, parts, BACKWARDS: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Runs the recurrence from part to part: `joined [N, H, K, V + K]`."""
    row, head, width = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, V + K
    key, column = tl.arange(0, BK), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_key = key < K
    inside, square = in_key[:, None] & (column < width)[None, :], in_key[:, None] & in_key[None, :]
    state = tl.where(key[:, None] + V == column[None, :], 1.0, 0.0)
    for i in range(parts):
        piece = parts - 1 - i if BACKWARDS else i
        at = part + ((row * parts + piece) * H + head) * K * width + key[:, None] * width
        transition = tl.load(at + V + key[None, :], mask=square, other=0.0)
        adds = tl.load(at + column[None, :], mask=inside & (column < V)[None, :], other=0.0)
        state = tl.dot(transition, state, input_precision="tf32x3") + adds
    to = joined + (row * H + head) * K * width + key[:, None] * width + column[None, :]
    tl.store(to, state, mask=inside)


@triton.jit
def _local(scores, do, dv, T, H, V, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    chunk, head, row = tl.program_id(0), tl.program_id(2) % H, (tl.program_id(2) // H).to(tl.int64)
    column, at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, CHUNK)
    t = chunk * CHUNK + at
    here, token = t < T, (row * T + t) * H + head
    seen = (at[:, None] >= at[None, :]) & here[:, None]
    weights = tl.load(scores + token[:, None] * CHUNK + at[None, :], mask=seen, other=0.0)
    d = _rows(do, token, V, column, here, column < V)
    inside = here[:, None] & (column < V)[None, :]
    gradient = tl.dot(tl.trans(weights.to(d.dtype)), d)
    tl.store(dv + token[:, None] * V + column[None, :], gradient.to(dv.dtype.element_ty), mask=inside)


def local(scores: Tensor, do: Tensor) -> Tensor:
    """Computes the gradients of writes `[N, T, H, V]` from the outputs of their own chunk.

    Args:
        scores: `[N, T, H, C]`, the weights with which an output reads the C writes of its chunk.
        do: `[N, T, H, V]`, the gradients of the outputs.
    """
    (rows, length, heads, values), chunk = do.shape, scores.shape[3]
    scores, do = scores.contiguous(), do.contiguous()
    dv = torch.empty_like(do)
    _local[(triton.cdiv(length, chunk), triton.cdiv(values, COLUMNS), rows * heads)](
        scores, do, dv, length, heads, values, CHUNK=chunk, COLUMNS=COLUMNS, num_warps=4
    )
    return dv


def scan(
    k: Tensor,
    w: Tensor,
    u: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    *,
    q: Tensor | None = None,
    do: Tensor | None = None,
    scale: float = 1.0,
    sign: int = -1,
    chunk: int = 64,
    backwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """Computes the affine map that rows of tokens apply to a state, or, backwards, to the gradient of a state.

    Args:
        k, w: `[N, T, H, K]` of the WY form; with `gk`, k is already decayed to the end of its chunk.
        u: `[N, T, H, V]` of the WY form; backwards, the gradients of the writes from the outputs of their own chunk.
        g: `[N, T, H]` fp32, log2-decays per head since the beginning of the chunk.
        gk: `[N, T, H, K]` fp32, log2-decays per key channel since the beginning of the chunk.
        q: `[N, T, H, K]`. Backwards, the queries, with `gk` already decayed from the start of their chunk. Forwards,
            for DPLR only, its k, decayed to the end of the chunk.
        do: `[N, T, H, V]`, the factors of q in the sum that is added: backwards, the gradients of the outputs;
            forwards, DPLR's v.
        scale: factor of q.
        sign: -1 for the delta rule, 1 for DPLR.
        chunk: tokens of a chunk.
        backwards: whether the map is that of gradients, from the end of the rows to their beginning.

    Returns:
        The transition `[N, H, K, K]`, and the state or gradient that the tokens add `[N, H, K, V]`, fp32.
    """
    rows, length, heads, keys = k.shape
    values = u.shape[3]
    k, w, u = k.contiguous(), w.contiguous(), u.contiguous()
    q, do, g, gk = (None if x is None else x.contiguous() for x in (q, do, g, gk))
    tiles = triton.cdiv(values, COLUMNS) + triton.cdiv(keys, COLUMNS)
    chunks, block = triton.cdiv(length, chunk), max(16, triton.next_power_of_2(keys))
    most = max(1, chunks // LEAST) if block <= MAX_JOINED else 1
    tokens = triton.cdiv(chunks, min(most, max(1, PROGRAMS // (rows * heads * tiles)))) * chunk
    parts = triton.cdiv(length, tokens)
    warps, stages = (4, 1) if backwards else (4 if q is None else 8, 2)  # measured on an H200 with 128 keys
    part = torch.empty(rows, parts, heads, keys, values + keys, dtype=torch.float32, device=k.device)
    _parts[(tiles, parts, rows * heads)](
        q, k, w, u, do, g, gk, part, scale, length, heads, keys, values, tokens, SIGN=sign, BACKWARDS=backwards,
        CHUNK=chunk, BK=block, COLUMNS=COLUMNS, num_warps=warps if block <= 128 else 8, num_stages=stages,
    )  # fmt: skip
    joined = part[:, 0]
    if parts > 1:
        joined = torch.empty_like(joined, memory_format=torch.contiguous_format)
        _join[(triton.cdiv(values + keys, JOINED), rows * heads)](
            part, joined, heads, keys, values, parts, BACKWARDS=backwards, BK=block, COLUMNS=JOINED, num_warps=8,
            num_stages=1,
        )  # fmt: skip
    adds, transition = joined.split([values, keys], -1)
    return transition, adds
