"""Softmax attention of some queries to some of their keys, with gradients, for callers that join such parts.

The attention of a query to parts of its keys is joined by the log-sum-exp of each part's scores. The gradients of a
part need only the output and the log-sum-exp over all keys (arXiv 2205.14135, arXiv 2310.01889). FlashAttention
computes a block on a GPU in half precision; loops over tiles of scores in fp32 compute the block elsewhere.
`ops.attention.softmax` has the op for whole sequences. The functions of this module are not differentiable by autograd.
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
"""A half-open range `(first, end)` of tokens, in sequences laid end to end."""

TILE = 512  # queries, and keys, of one tile of scores, where FlashAttention does not compute the block


@dataclass(frozen=True)
class Block:
    """Sequences of queries, each with keys: query i of n sees key j of m if -left <= j - (m - n) - i <= right.

    Attributes:
        queries, keys: spans of each sequence's queries, and of its keys. No span is empty. Spans of queries do not
            overlap, spans of keys may; every query sees at least one key.
        left, right: None: no limit on this side. (None, 0) is causal attention whose queries are the last tokens of
            the keys.
        device: where the queries and keys are.
    """

    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    left: int | None
    right: int | None
    device: torch.device

    @property
    def sums(self) -> tuple[list[int], list[int]]:
        """Offsets of the sequences in the queries, and in the keys, of the block: `sequences + 1` numbers each."""
        queries, keys = ([0, *accumulate(b - a for a, b in spans)] for spans in (self.queries, self.keys))
        return queries, keys

    @cached_property
    def offsets(self) -> tuple[Tensor, Tensor]:
        """Tensors of the two `sums`, int32 `[sequences + 1]` on the device, as FlashAttention takes them."""
        queries, keys = (on_device(torch.tensor(n, dtype=torch.int32), self.device) for n in self.sums)
        return queries, keys

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Upper bounds of the queries, and of the keys, of a sequence, as FlashAttention is told them.

        Each bound is at least two: with grouped heads, FlashAttention lays out the log-sum-exp differently if no
        sequence has more than one query. Without a limit on the right, the bound of the keys is at least that of the
        queries, because FlashAttention puts this bound in place of the missing limit.
        """
        queries, keys = (max(b - a for a, b in spans) for spans in (self.queries, self.keys))
        return max(queries, 2), max(keys, 2, queries if self.right is None else 0)


def take(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """Returns the tokens `[n, ...]` of `x [T, ...]` that lie in the spans, one span after the other."""
    parts = [x[a:b] for a, b in _joined(spans)]
    return parts[0] if len(parts) == 1 else torch.cat([x[:0], *parts])


def put(into: Tensor, x: Tensor, spans: Sequence[Span], add: bool = False) -> None:
    """Writes (or adds) `x [n, ...]` to the tokens of `into [T, ...]` that lie in the spans: the inverse of `take`."""
    runs = _joined(spans)
    for (a, b), part in zip(runs, x.split([b - a for a, b in runs]), strict=True):
        if add:
            into[a:b] += part
        else:
            into[a:b] = part


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Merges adjoining spans, of which one ends where the next begins."""
    runs: list[Span] = []
    for a, b in spans:
        if runs and runs[-1][1] == a:
            runs[-1] = (runs[-1][0], b)
        else:
            runs.append((a, b))
    return runs


def join(o: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Joins the attention of the same queries to two parts of their keys.

    Args:
        o, other: `[n, H, V]`.
        lse, other_lse: `[n, H]`, the log-sum-exps of their scores, minus infinity where a part has no keys.

    Returns:
        The attention to the keys of both parts, and its log-sum-exp.
    """
    joined = torch.logaddexp(lse, other_lse)
    finite = joined.masked_fill(joined == float("-inf"), 0.0)
    weight, other_weight = ((x - finite).exp().unsqueeze(-1) for x in (lse, other_lse))
    return o * weight + other * other_weight, joined


def attend(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    """Computes the attention of a block.

    Args:
        q, k, v: `[T, H, D]`, `[S, G, D]`, `[S, G, V]`; G divides H. The block's spans count the T queries and S keys.

    Returns:
        `o [n, H, V]` and the log-sum-exp `[n, H]` in fp32 of the block's n queries, one span after the other.
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
    """Computes the part of the gradients of q, k and v that comes from the pairs of a block.

    Args:
        d_o, o: `[T, H, V]`, the gradient and the value of the attention of all queries to all of their keys.
        q, k, v: see `attend`.
        lse: `[T, H]` fp32, the log-sum-exp over all keys.

    Returns:
        Gradients of the block's n queries `[n, H, D]`, and of its m keys `[m, G, D]` and values `[m, G, V]`, one span
        after the other; a key in two spans appears twice.
    """
    d_o, q, o, lse = (take(x, block.queries) for x in (d_o, q, o, lse))
    k, v = take(k, block.keys), take(v, block.keys)
    if not _flash(q, v):
        return _tiles_backward(d_o, q, k, v, o, lse, block, scale)
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    wide = [aligned(x) for x in one_size(q, k, v, scale, 8)[:3]]
    outer = [aligned(one_size(q, k, x, scale, 8)[2]) for x in (d_o, o)]
    nothing = torch.empty(0, device=q.device)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the random state of dropout, which is off
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
    """Yields every tile of scores that has visible pairs.

    A tile is a span of queries, a span of keys (counted in the block's tokens laid end to end), and the number of
    positions by which its first key is ahead of its first query.
    """
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
    """Returns the scores `[G, R, n, m]` of `q [n, G, R, D]` and `k [m, G, D]`, minus infinity for invisible pairs."""
    scores = torch.einsum("ngrd,mgd->grnm", q, k) * scale
    queries, keys = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
    distance = keys + ahead - queries.unsqueeze(-1)
    if block.right is not None:
        scores = scores.masked_fill(distance > block.right, float("-inf"))
    if block.left is not None:
        scores = scores.masked_fill(distance < -block.left, float("-inf"))
    return scores


def _exact(x: Tensor, heads: int | None = None) -> Tensor:
    """Casts `x` to fp32 (fp64 stays); with `heads`, the number G of groups, also `[T, H, D] -> [T, G, R, D]`."""
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
