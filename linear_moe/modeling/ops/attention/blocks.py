"""Softmax attention of some queries to some of their keys, and its gradients: what others join to the whole.

Parts of one query's keys are joined by the log-sum-exp of their scores, and each part's gradient needs only that of all
(arXiv 2205.14135, arXiv 2310.01889). On a GPU in half precision FlashAttention computes a block, elsewhere loops over
tiles of scores in fp32 do. `ops.softmax` is the op for whole sequences; this one knows no autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.attention.softmax import aligned, one_size, suits_flash
from linear_moe.modeling.ops.backends import requested
from linear_moe.modeling.ops.packing import on_device

Span = tuple[int, int]
"""From where, and up to where, in tokens laid end to end."""

TILE = 512  # queries, and keys, whose scores are made at once where FlashAttention does not do it


@dataclass(frozen=True)
class Block:
    """Sequences of queries, each with keys: query i of n sees key j of m if -left <= j - (m - n) - i <= right.

    Attributes:
        queries, keys: of each sequence, none empty. No query is in two of them, keys may be; every query sees a key.
        left, right: None: without limit; (None, 0): causal, the queries are the last tokens of the keys.
    """

    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    left: int | None
    right: int | None
    device: torch.device

    @property
    def sums(self) -> tuple[list[int], list[int]]:
        """Where sequences begin, queries and keys laid end to end, and the end."""
        queries, keys = ([0, *accumulate(b - a for a, b in spans)] for spans in (self.queries, self.keys))
        return queries, keys

    @cached_property
    def offsets(self) -> tuple[Tensor, Tensor]:
        """`sums` as FlashAttention takes them, int32 `[sequences + 1]`."""
        queries, keys = (on_device(torch.tensor(n, dtype=torch.int32), self.device) for n in self.sums)
        return queries, keys

    @cached_property
    def longest(self) -> tuple[int, int]:
        """What FlashAttention is told of the most queries, and keys, of a sequence.

        At least two: it lays out the log-sum-exp of single queries with grouped heads in another way. Of keys, where
        only `left` is a limit, at least as many as of queries: it takes this number for the missing one.
        """
        queries, keys = (max(b - a for a, b in spans) for spans in (self.queries, self.keys))
        return max(queries, 2), max(keys, 2, queries if self.right is None else 0)


def take(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """The tokens `[n, ...]` of `x [T, ...]` in these spans, one after the other."""
    parts = [x[a:b] for a, b in _joined(spans)]
    return parts[0] if len(parts) == 1 else torch.cat([x[:0], *parts])


def put(into: Tensor, x: Tensor, spans: Sequence[Span], add: bool = False) -> None:
    """`take` the other way: writes (or adds) `x [n, ...]` to the tokens of `into [T, ...]`."""
    runs = _joined(spans)
    for (a, b), part in zip(runs, x.split([b - a for a, b in runs]), strict=True):
        if add:
            into[a:b] += part
        else:
            into[a:b] = part


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Neighbours as one."""
    runs: list[Span] = []
    for a, b in spans:
        if runs and runs[-1][1] == a:
            runs[-1] = (runs[-1][0], b)
        else:
            runs.append((a, b))
    return runs


def join(o: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of attention `[n, H, V]` with log-sum-exps `[n, H]`, minus infinity where a part has no keys."""
    together = torch.logaddexp(lse, other_lse)
    known = together.masked_fill(together == float("-inf"), 0.0)
    mine, theirs = ((x - known).exp().unsqueeze(-1) for x in (lse, other_lse))
    return o * mine + other * theirs, together


def attend(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    """A block of attention, its queries one after the other: `o [n, H, V]` and log-sum-exp `[n, H]` in fp32.

    Args:
        q, k, v: `[T, H, D]`, `[S, G, D]`, `[S, G, V]`; G divides H.
    """
    q, k, v = take(q, block.queries), take(k, block.keys), take(v, block.keys)
    if not _flash(q, v):
        return _tiles_forward(q, k, v, block, scale)
    wide = [aligned(x) for x in one_size(q, k, v, scale, 8)[:3]]
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        *wide, *block.offsets, *block.longest, 0.0, _causal(block), False, scale=scale, **_limits(block)
    )
    return o[..., : v.shape[-1]], lse.mT


def attend_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the block's q `[n, H, D]`, k `[m, G, D]` and v `[m, G, V]`, each one after the other.

    Args:
        d_o, o: `[T, H, V]`, the gradient and the value of the attention to all keys, of all queries.
        lse: `[T, H]` fp32, of all keys.
    """
    d_o, q, o, lse = (take(x, block.queries) for x in (d_o, q, o, lse))
    k, v = take(k, block.keys), take(v, block.keys)
    if not _flash(q, v):
        return _tiles_backward(d_o, q, k, v, o, lse, block, scale)
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    wide = [aligned(x) for x in one_size(q, k, v, scale, 8)[:3]]
    outer = [aligned(one_size(q, k, x, scale, 8)[2]) for x in (d_o, o)]
    nothing = torch.empty(0, device=q.device)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
    gradients = torch.ops.aten._flash_attention_backward(
        outer[0],
        *wide,
        outer[1],
        lse.mT.contiguous(),
        *block.offsets,
        *block.longest,
        0.0,
        _causal(block),
        state,
        nothing,
        scale=scale,
        **_limits(block),
    )
    dq, dk, dv = (x[..., :size] for x, size in zip(gradients, sizes, strict=True))
    return dq, dk, dv


def _flash(q: Tensor, v: Tensor) -> bool:
    return requested("auto") != "reference" and suits_flash(q) and v.shape[-1] <= 256


def _causal(block: Block) -> bool:
    return (block.left, block.right) == (None, 0)


def _limits(block: Block) -> dict[str, Any]:
    limits = {"window_size_left": block.left, "window_size_right": block.right}
    return {name: -1 if limit is None else limit for name, limit in limits.items()}


def _tiles(block: Block) -> Iterator[tuple[Span, Span, int]]:
    """Queries, keys that some of them see (of those laid end to end), and how far the first key is ahead of the first
    query."""
    for (a, b), (c, d) in zip(*(pairwise(sums) for sums in block.sums), strict=True):
        shift = (d - c) - (b - a)
        for i in range(a, b, TILE):
            end = min(i + TILE, b)
            for j in range(c, d, TILE):
                stop = min(j + TILE, d)
                ahead = (j - c) - shift - (i - a)
                too_late = block.right is not None and ahead - (end - i - 1) > block.right
                too_early = block.left is not None and ahead + (stop - j - 1) < -block.left
                if not too_late and not too_early:
                    yield (i, end), (j, stop), ahead


def _scores(q: Tensor, k: Tensor, ahead: int, block: Block, scale: float) -> Tensor:
    """`[n, G, R, D], [m, G, D] -> [G, R, n, m]`, minus infinity where invisible."""
    scores = torch.einsum("ngrd,mgd->grnm", q, k) * scale
    queries, keys = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
    distance = keys + ahead - queries.unsqueeze(-1)
    if block.right is not None:
        scores = scores.masked_fill(distance > block.right, float("-inf"))
    if block.left is not None:
        scores = scores.masked_fill(distance < -block.left, float("-inf"))
    return scores


def _exact(x: Tensor, heads: int | None = None) -> Tensor:
    """In fp32 or more; with `heads`, `[T, H, D] -> [T, G, R, D]`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if heads is None else x.unflatten(1, (heads, -1))


def _tiles_forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    groups, (tokens, heads, _) = k.shape[1], q.shape
    q, k, v = _exact(q, groups), _exact(k), _exact(v)
    o, lse = q.new_zeros(tokens, heads, v.shape[-1]), q.new_full((tokens, heads), float("-inf"))
    for (a, b), (c, d), ahead in _tiles(block):
        scores = _scores(q[a:b], k[c:d], ahead, block, scale)
        sums = scores.logsumexp(-1)
        weights = (scores - sums.masked_fill(sums == float("-inf"), 0.0).unsqueeze(-1)).exp()
        part = torch.einsum("grnm,mgv->ngrv", weights, v[c:d]).flatten(1, 2)
        o[a:b], lse[a:b] = join(o[a:b], lse[a:b], part, sums.flatten(0, 1).T)
    return o, lse


def _tiles_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups, delta = k.shape[1], (_exact(d_o) * _exact(o)).sum(-1)
    d_o, q, k, v = _exact(d_o, groups), _exact(q, groups), _exact(k), _exact(v)
    delta, lse = (x.unflatten(1, (groups, -1)).permute(1, 2, 0).unsqueeze(-1) for x in (delta, lse))  # [G, R, T, 1]
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for (a, b), (c, d), ahead in _tiles(block):
        weights = (_scores(q[a:b], k[c:d], ahead, block, scale) - lse[:, :, a:b]).exp()
        dv[c:d] += torch.einsum("grnm,ngrv->mgv", weights, d_o[a:b])
        d_weights = torch.einsum("ngrv,mgv->grnm", d_o[a:b], v[c:d])
        d_scores = weights * (d_weights - delta[:, :, a:b]) * scale
        dq[a:b] += torch.einsum("grnm,mgd->ngrd", d_scores, k[c:d])
        dk[c:d] += torch.einsum("grnm,ngrd->mgd", d_scores, q[a:b])
    return dq.flatten(1, 2), dk, dv
