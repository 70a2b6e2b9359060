"""Softmax attention over sequences that several ranks hold, in one of three ways.

all_gather: a rank gathers everything, with a window only what its queries see, and attends to it at once (arXiv
2407.21783, 2502.07563); it keeps its own tokens only, and gathers again in the backward pass. ring: keys and values go
from rank to rank while those at hand are attended to; parts are joined by their log-sum-exp (arXiv 2310.01889); in the
backward pass the gradients follow them. ulysses: ranks exchange tokens for heads, attend to whole sequences, and
exchange back (arXiv 2309.14509).

The first two send what keys and values are made of, and make them where they are used: with latent attention that is
one latent for all heads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import P2POp, irecv, isend

from linear_moe.modeling.ops.attention.blocks import Block, Span, attend, attend_backward, join, put, take
from linear_moe.modeling.ops.attention.softmax import softmax_attention
from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.packing import on_device
from linear_moe.modeling.ops.sequence import Expand, pieces_of
from linear_moe.training.sequence.cut import Cut
from linear_moe.training.sequence.exchange import SequenceGroup


class _Pair(NamedTuple):
    """Of `Block`, one sequence."""

    queries: Span
    keys: Span
    left: int | None
    right: int | None


class Reach:
    """Which tokens of which rank the local queries see, as blocks for kernels. The same for all layers of a pass."""

    def __init__(self, cut: Cut, device: torch.device):
        self.cut, self.device = cut, device
        self._known: dict[Any, Any] = {}

    def gathered(self, window: int | None) -> tuple[list[tuple[int, Span]], Block]:
        """Of which rank which tokens to lay end to end, and what the local queries see of them."""
        if ("all", window) not in self._known:
            self._known["all", window] = self._gathered(window)
        found: tuple[list[tuple[int, Span]], Block] = self._known["all", window]
        return found

    def of_rank(self, rank: int, window: int | None) -> list[Block]:
        """What the local queries see of a rank's tokens. No block has a query twice."""
        if (rank, window) not in self._known:
            self._known[rank, window] = self._of_rank(rank, window)
        found: list[Block] = self._known[rank, window]
        return found

    def wanted(self, window: int | None) -> tuple[list[list[Span]], list[list[Span]]]:
        """Of every other rank, which of its tokens the local queries see; and which local ones its queries see."""
        if ("others", window) not in self._known:
            cut, ranks = self.cut, range(self.cut.order.size)
            own, others = self._sources(cut.rank, window), [self._sources(rank, window) for rank in ranks]
            pairs = [(own, rank) for rank in ranks], [(sources, cut.rank) for sources in others]
            self._known["others", window] = tuple(
                [
                    [span for source, span in sources if source == rank and other != cut.rank]
                    for other, (sources, rank) in enumerate(found)
                ]
                for found in pairs
            )
        found: tuple[list[list[Span]], list[list[Span]]] = self._known["others", window]
        return found

    def _first(self, row: int, piece: int, window: int | None) -> int:
        """Of a row, the first token that a piece's queries see."""
        cut = self.cut
        token, start = piece * cut.length, row * cut.order.count * cut.length
        begin = cut.documents[bisect_right(cut.documents, start + token) - 1] - start if cut.packed else 0
        return begin if window is None else max(begin, token - window + 1)

    def _sources(self, rank: int, window: int | None) -> list[tuple[int, Span]]:
        """See `gathered`; of any rank."""
        order, length, sources = self.cut.order, self.cut.length, list[tuple[int, Span]]()
        for i, (row, piece) in enumerate(product(range(self.cut.rows), order.pieces(rank))):
            first = self._first(row, piece, window)
            for other in range(first // length, piece):
                source, place = order.owner(other)
                base = (row * order.per_rank + place) * length
                sources.append((source, (base + max(first - other * length, 0), base + length)))
            sources.append((rank, (i * length, (i + 1) * length)))
        return sources

    def _gathered(self, window: int | None) -> tuple[list[tuple[int, Span]], Block]:
        cut, length = self.cut, self.cut.length
        queries, keys, end = list[Span](), list[Span](), 0
        for i, (row, piece) in enumerate(cut.places):
            before = max(piece * length - self._first(row, piece, window), 0)
            for a, b in pairwise((*cut.starts[i], length)):
                queries.append((i * length + a, i * length + b))
                keys.append((end, end + before + b - a))
                before, end = 0, keys[-1][1]
        return self._sources(cut.rank, window), Block(
            tuple(queries), tuple(keys), None if window is None else window - 1, 0, self.device
        )

    def _of_rank(self, rank: int, window: int | None) -> list[Block]:
        cut, length = self.cut, self.cut.length
        pairs = list[_Pair]()
        for i, (row, piece) in enumerate(cut.places):
            starts = (*cut.starts[i], length)
            for place, other in enumerate(cut.order.pieces(rank)):
                base, here = (row * cut.order.per_rank + place) * length, i * length
                if other == piece:
                    left = None if window is None else window - 1
                    found = [_Pair((here + a, here + b), (base + a, base + b), left, 0) for a, b in pairwise(starts)]
                elif other < piece and (before := self._before(i, other, window)) is not None:
                    queries, (start, end), left = before
                    found = [_Pair((here, here + queries), (base + start, base + end), left, None)]
                else:
                    continue
                last = pairs[-1] if pairs and window is None else None
                if last is not None and last.queries == found[0].queries and last.keys[1] == found[0].keys[0]:
                    found[0] = found[0]._replace(keys=(pairs.pop().keys[0], found[0].keys[1]))
                pairs += found
        blocks: dict[Any, list[_Pair]] = {}
        times = Counter[Any]()
        for pair in pairs:
            key = pair.queries[0], *pair[2:]
            times[key] += 1
            blocks.setdefault((*pair[2:], times[key]), []).append(pair)
        return [
            Block(tuple(p.queries for p in found), tuple(p.keys for p in found), *found[0][2:], self.device)
            for found in blocks.values()
        ]

    def _before(self, i: int, other: int, window: int | None) -> tuple[int, Span, int | None] | None:
        """Of segment i and an earlier piece of its row: how many queries see how much of it, within which `left`."""
        cut, length = self.cut, self.cut.length
        start, queries = max(cut.begins[i] - other * length, 0), (*cut.starts[i], length)[1]
        if start >= length:
            return None
        if window is None:
            return queries, (start, length), None
        reach = window - 1 - (cut.places[i][1] - other - 1) * length  # of the first query into the piece
        if reach < 1:
            return None
        queries, keys = min(queries, reach), min(length - start, reach)
        return queries, (length - keys, length), reach - queries if reach < queries + keys - 1 else None

    @cached_property
    def documents(self) -> tuple[Tensor | None, int | None]:
        """`cu_seqlens` and longest document of the whole rows, laid end to end."""
        if not self.cut.packed:
            return None, None
        offsets = self.cut.documents
        longest = max(b - a for a, b in pairwise(offsets))
        return on_device(torch.tensor(offsets), self.device), longest


@dataclass(frozen=True)
class AttentionTask:
    """One call's settings, see `ops.sequence.Pieces.attention`."""

    reach: Reach
    line: SequenceGroup
    expand: Expand
    parameters: tuple[Tensor, ...]
    scale: float
    window: int | None


def attention(q: Tensor, shared: tuple[Tensor, ...], task: AttentionTask) -> Tensor:
    """Softmax attention of the local queries `[B, T, H, D] -> [B, T, H, V]`, by the line's strategy. Collective."""
    flat = STRATEGIES[task.line.attention](q.flatten(0, 1), tuple(x.flatten(0, 1) for x in shared), task)
    return flat.unflatten(0, q.shape[:2])


def _by(function: Any, q: Tensor, shared: tuple[Tensor, ...], task: AttentionTask) -> Tensor:
    o: Tensor = function.apply(task, len(shared), q, *shared, *task.parameters)
    return o


class _Gathered(Function):
    """q `[T, H, D]`, shared `[T, ...]` and parameters -> o `[T, H, V]`."""

    @staticmethod
    def forward(ctx: Any, task: AttentionTask, count: int, q: Tensor, *tensors: Tensor) -> Tensor:
        shared = tensors[:count]
        _, block = task.reach.gathered(task.window)
        k, v = _expanded(_seen(shared, task), task)
        o, lse = attend(q, k, v, block, task.scale)
        ctx.task = task
        ctx.save_for_backward(q, o := o.to(q.dtype), lse, *shared)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        task: AttentionTask = ctx.task
        q, o, lse, *shared = ctx.saved_tensors
        _, block = task.reach.gathered(task.window)
        made = _Made(_seen(shared, task), task)
        dq, dk, dv = attend_backward(d_o, q, made.k, made.v, o, lse, block, task.scale)
        d_seen, d_parameters = made.gradients(dk, dv)
        d_shared = _back(d_seen, shared, task)
        return None, None, dq.to(q.dtype), *d_shared, *d_parameters


class _Ring(Function):
    """As `_Gathered`."""

    @staticmethod
    def forward(ctx: Any, task: AttentionTask, count: int, q: Tensor, *tensors: Tensor) -> Tensor:
        shared, line, reach = tensors[:count], task.line, task.reach
        o, lse, buffer = None, None, _flat(shared)
        for step in range(line.order.size):
            arrived = _pass_on(buffer, line) if step + 1 < line.order.size else None
            blocks = reach.of_rank((line.rank - step) % line.order.size, task.window)
            if blocks:
                k, v = _expanded(_parts(buffer, shared), task)
            for block in blocks:
                part, part_lse = attend(q, k, v, block, task.scale)
                if o is None or lse is None:  # the first blocks are of the rank's own tokens
                    o = part.new_zeros(*q.shape[:2], v.shape[-1], dtype=torch.promote_types(q.dtype, torch.float32))
                    lse = part_lse.new_full(q.shape[:2], float("-inf"))
                known = take(o, block.queries), take(lse, block.queries)
                for into, x in zip((o, lse), join(*known, part, part_lse), strict=True):
                    put(into, x, block.queries)
            buffer = buffer if arrived is None else arrived()
        assert o is not None
        ctx.task = task
        ctx.save_for_backward(q, o := o.to(q.dtype), lse, *shared)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        task: AttentionTask = ctx.task
        q, o, lse, *shared = ctx.saved_tensors
        line, size, buffer = task.line, task.line.order.size, _flat(shared)
        kind = torch.promote_types(q.dtype, torch.float32)  # sums of all ranks' gradients, also on their way
        dq = torch.zeros_like(q, dtype=kind)
        d_parameters = [torch.zeros_like(x, dtype=kind) for x in task.parameters]
        home = torch.zeros_like(buffer, dtype=kind)
        following: Callable[[], Tensor] | None = None
        for step in range(size):
            arrived = _pass_on(buffer, line) if step + 1 < size else None
            d_buffer = home if step == 0 else torch.zeros_like(home)
            blocks = task.reach.of_rank((line.rank - step) % size, task.window)
            if blocks:
                made = _Made(_parts(buffer, shared), task)
                d_keys = [torch.zeros_like(x, dtype=kind) for x in (made.k, made.v)]
                for block in blocks:
                    parts = attend_backward(d_o, q, made.k, made.v, o, lse, block, task.scale)
                    for into, x, spans in zip(
                        (dq, *d_keys), parts, (block.queries, block.keys, block.keys), strict=True
                    ):
                        put(into, x, spans, add=True)
                d_shared, found = made.gradients(*d_keys)
                d_buffer += _flat(d_shared)
                for total, d in zip(d_parameters, found, strict=True):
                    if d is not None:
                        total += d
            if step > 0:
                d_buffer = d_buffer if following is None else d_buffer + following()
                following = _pass_on(d_buffer, line)
            buffer = buffer if arrived is None else arrived()
        if following is not None:
            home = home + following()
        of_parameters = [x.to(p.dtype) for x, p in zip(d_parameters, task.parameters, strict=True)]
        d_own = [x.to(like.dtype) for x, like in zip(_parts(home, shared), shared, strict=True)]
        return None, None, dq.to(q.dtype), *d_own, *of_parameters


def _expanded(shared: Sequence[Tensor], task: AttentionTask) -> tuple[Tensor, Tensor]:
    """Shared `[S, ...]` -> k `[S, G, D]`, v `[S, G, V]`."""
    k, v = task.expand(*(x.unsqueeze(0) for x in shared))
    return k.squeeze(0), v.squeeze(0)


class _Made:
    """Keys and values made of what is shared, in a backward pass: with how to go back."""

    def __init__(self, shared: Sequence[Tensor], task: AttentionTask):
        self.parameters = task.parameters
        with torch.enable_grad():
            self.leaves = [x.detach().requires_grad_() for x in shared]
            self.made = _expanded(self.leaves, task)
        self.k, self.v = (x.detach() for x in self.made)

    def gradients(self, dk: Tensor, dv: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Of what is shared, and of the parameters (None: not trained)."""
        trained = [p for p in self.parameters if p.requires_grad]
        outer = [d.to(x.dtype) for d, x in zip((dk, dv), self.made, strict=True)]
        found = iter(torch.autograd.grad(self.made, [*self.leaves, *trained], outer))
        return [next(found) for _ in self.leaves], [next(found) if p.requires_grad else None for p in self.parameters]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """`[..., n]`, as `_flat` makes it of tensors like these, -> `[..., *shape]` of each."""
    return [
        x.unflatten(-1, tensor.shape) for x, tensor in zip(flat.split([t.numel() for t in like], -1), like, strict=True)
    ]


def _seen(shared: Sequence[Tensor], task: AttentionTask) -> list[Tensor]:
    """Own tokens `[T, ...]` -> all that the local queries see, `[S, ...]`, in one message."""
    line, own = task.line, _flat(shared)
    sources, _ = task.reach.gathered(task.window)
    if line.group is None:
        return [torch.cat([x[a:b] for _, (a, b) in sources]) for x in shared]
    if task.window is None:
        everywhere = own.new_empty(line.order.size, len(own))
        dist.all_gather_into_tensor(everywhere.view(-1), own, group=line.group)
        return [torch.cat([x[rank, a:b] for rank, (a, b) in sources]) for x in _parts(everywhere, shared)]
    wanted, given = task.reach.wanted(task.window)
    found = _swap([[take(x, spans) for x in shared] for spans in given], wanted, line)
    seen = []
    for i, x in enumerate(shared):
        parts = [iter(part[i].split(_lengths(spans))) for part, spans in zip(found, wanted, strict=True)]
        seen.append(torch.cat([x[a:b] if rank == line.rank else next(parts[rank]) for rank, (a, b) in sources]))
    return seen


def _back(d_seen: Sequence[Tensor], shared: Sequence[Tensor], task: AttentionTask) -> list[Tensor]:
    """Gradients of what `_seen` gives -> of the own tokens, the sum of all ranks'."""
    line, window = task.line, task.window
    sources, _ = task.reach.gathered(window)
    parts = [x.split(_lengths([span for _, span in sources])) for x in d_seen]
    if line.group is None or window is None:
        everyones = d_seen[0].new_zeros(line.order.size, sum(x.numel() for x in shared))
        for into, found in zip(_parts(everyones, shared), parts, strict=True):
            for (rank, (a, b)), part in zip(sources, found, strict=True):
                into[rank, a:b] += part
        if line.group is None:
            return _parts(everyones[0], shared)
        total = torch.empty_like(everyones[0])
        dist.reduce_scatter_tensor(total, everyones.view(-1), group=line.group)
        return _parts(total, shared)
    own, sent = [torch.zeros_like(x) for x in shared], [[[x[:0]] for x in shared] for _ in range(line.order.size)]
    for i, found in enumerate(parts):
        for (rank, (a, b)), part in zip(sources, found, strict=True):
            if rank == line.rank:
                own[i][a:b] += part
            else:
                sent[rank][i].append(part)
    _, given = task.reach.wanted(window)
    received = _swap([[torch.cat(x) for x in to] for to in sent], given, line)
    for arrived, spans in zip(received, given, strict=True):
        for into, x in zip(own, arrived, strict=True):
            put(into, x, spans, add=True)
    return own


def _lengths(spans: Sequence[Span]) -> list[int]:
    return [b - a for a, b in spans]


def _swap(
    sent: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Span]], line: SequenceGroup
) -> list[list[Tensor]]:
    """To every rank tensors `[m, ...]`, from it others like them, of as many tokens as are wanted of it."""
    tokens, width = [sum(_lengths(spans)) for spans in wanted], sum(x.shape[1:].numel() for x in sent[0])
    flat = [_flat(x) for x in sent]
    received = flat[0].new_empty(sum(tokens) * width)
    sizes = [n * width for n in tokens], [len(x) for x in flat]
    dist.all_to_all_single(received, torch.cat(flat), *sizes, group=line.group)
    like = [[x.new_empty(n, *x.shape[1:]) for x in sent[0]] for n in tokens]
    return [_parts(x, empty) for x, empty in zip(received.split(sizes[0]), like, strict=True)]


def _pass_on(x: Tensor, line: SequenceGroup) -> Callable[[], Tensor]:
    """Start to send x to the next rank and to receive one like it from the previous; call for that."""
    assert line.group is not None
    received, size = torch.empty_like(x), line.order.size
    onwards, back = (dist.get_global_rank(line.group, (line.rank + n) % size) for n in (1, -1))
    both = [P2POp(isend, x, onwards, line.group), P2POp(irecv, received, back, line.group)]
    works = dist.batch_isend_irecv(both)  # together: alone, a send may wait for a receive that is not yet asked for

    def arrived(sent: Tensor = x) -> Tensor:  # which must live as long
        for work in works:
            work.wait()
        return received

    return arrived


def _ulysses(q: Tensor, shared: tuple[Tensor, ...], task: AttentionTask) -> Tensor:
    cut, line = task.reach.cut, task.line
    size, per_rank = line.order.size, line.order.per_rank
    k, v = _expanded(shared, task)
    if k.shape[1] < size:
        k, v = (x.repeat_interleave(size // k.shape[1], 1) for x in (k, v))
    # [tokens, H, D] -> by rank [W, tokens, H / W, D], and back; by piece [pieces, rows, length, ...], and back
    sent = [x.unflatten(1, (size, -1)).transpose(0, 1) for x in (q, k, v)]
    received = _AllToAll.apply(torch.cat([x.flatten(1) for x in sent], 1), line)
    owners = [line.order.owner(piece) for piece in range(line.order.count)]

    def in_time(x: Tensor) -> Tensor:
        x = x.unflatten(1, (cut.rows, per_rank, cut.length))
        return torch.stack([x[rank, :, place] for rank, place in owners], 1).flatten(1, 2)

    whole = [in_time(x) for x in _parts(received, [x[0] for x in sent])]
    cu_seqlens, longest = task.reach.documents
    if cu_seqlens is not None:
        whole = [x.flatten(0, 1).unsqueeze(0) for x in whole]
    with pieces_of(None):
        o = softmax_attention(*whole, scale=task.scale, window=task.window, cu_seqlens=cu_seqlens, max_document=longest)
    o = o.reshape(cut.rows, line.order.count, cut.length, *o.shape[2:])
    mine = torch.stack([o[:, list(line.order.pieces(rank))] for rank in range(size)])
    back = _AllToAll.apply(mine.flatten(1), line)
    return back.view(size, len(q), *o.shape[3:]).transpose(0, 1).flatten(1, 2)


class _AllToAll(Function):
    """`[W, n] -> [W, n]`: row r to rank r, and from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: SequenceGroup) -> Tensor:
        ctx.line = line
        if line.group is None:
            return x
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=line.group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.forward(ctx, gradient, ctx.line), None


Strategy = Callable[[Tensor, tuple[Tensor, ...], AttentionTask], Tensor]
STRATEGIES: dict[str, Strategy] = {
    "all_gather": partial(_by, _Gathered),
    "ring": partial(_by, _Ring),
    "ulysses": _ulysses,
}
