"""Softmax attention over sequences that several ranks hold, with one of three strategies.

all_gather: a rank gathers the tokens of all ranks, with a window only the tokens that its queries see, and computes its
attention in one call (arXiv 2407.21783, 2502.07563). For the backward pass it keeps its own tokens only, and gathers
the others again. ring: keys and values go from rank to rank; each rank attends to the block that it has while the next
one is on its way, and joins the partial outputs by their log-sum-exp (arXiv 2310.01889). In the backward pass the
gradients of keys and values travel round the ring behind them. ulysses: ranks exchange tokens for heads, attend to
whole sequences, and exchange back (arXiv 2309.14509).

all_gather and ring send the `shared` tensors that keys and values are made of, and every rank makes the keys and values
that it uses. With multi-head latent attention, `shared` is one latent for all heads.
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

from linear_moe.config.strategies import AttentionStrategy
from linear_moe.modeling.ops.attention.blocks import Block, Span, attend, attend_backward, join, put, take
from linear_moe.modeling.ops.attention.softmax import softmax_attention
from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.packing import on_device
from linear_moe.modeling.ops.sequence import Expand, pieces_of
from linear_moe.training.sequence.cut import Cut
from linear_moe.training.sequence.exchange import SequenceGroup


class _Pair(NamedTuple):
    """One sequence of a `Block`: a span of queries, the span of their keys, and the band of visible pairs."""

    queries: Span
    keys: Span
    left: int | None
    right: int | None


class Reach:
    """Tokens of every rank that the local queries see, as blocks for kernels.

    One object serves all layers of a forward pass: results are kept by rank and window.
    """

    def __init__(self, cut: Cut, device: torch.device):
        self.cut, self.device = cut, device
        self._known: dict[Any, Any] = {}

    def gathered(self, window: int | None) -> tuple[list[tuple[int, Span]], Block]:
        """All tokens that the local queries see, laid end to end.

        Returns:
            (rank, span of that rank's tokens), in the order in which to lay the spans end to end; and the block of the
            local queries with these tokens as keys.
        """
        if ("all", window) not in self._known:
            self._known["all", window] = self._gathered(window)
        sources_and_block: tuple[list[tuple[int, Span]], Block] = self._known["all", window]
        return sources_and_block

    def of_rank(self, rank: int, window: int | None) -> list[Block]:
        """Blocks of the local queries with keys among the tokens of `rank`. No block has a query twice."""
        if (rank, window) not in self._known:
            self._known[rank, window] = self._of_rank(rank, window)
        blocks: list[Block] = self._known[rank, window]
        return blocks

    def wanted(self, window: int | None) -> tuple[list[list[Span]], list[list[Span]]]:
        """Tokens that this rank and each other rank need of each other.

        Returns:
            for every rank, the spans of its tokens that the local queries see; and, for every rank, the spans of the
            local tokens that its queries see. Both are empty for this rank itself.
        """
        if ("others", window) not in self._known:
            cut, ranks = self.cut, range(self.cut.order.size)
            own, others = self._sources(cut.rank, window), [self._sources(rank, window) for rank in ranks]
            directions = [(own, rank) for rank in ranks], [(sources, cut.rank) for sources in others]
            self._known["others", window] = tuple(
                [
                    [span for source, span in sources if source == holder and peer != cut.rank]
                    for peer, (sources, holder) in enumerate(direction)
                ]
                for direction in directions
            )
        spans: tuple[list[list[Span]], list[list[Span]]] = self._known["others", window]
        return spans

    def _first(self, row: int, piece: int, window: int | None) -> int:
        """First token of the row that the first query of `piece` sees, counted from the beginning of the row."""
        cut = self.cut
        token, start = piece * cut.length, row * cut.order.count * cut.length
        begin = cut.documents[bisect_right(cut.documents, start + token) - 1] - start if cut.packed else 0
        return begin if window is None else max(begin, token - window + 1)

    def _sources(self, rank: int, window: int | None) -> list[tuple[int, Span]]:
        """(rank, span) of all tokens that the queries of `rank` see, in the order of `gathered`."""
        order, length, sources = self.cut.order, self.cut.length, list[tuple[int, Span]]()
        for i, (row, piece) in enumerate(product(range(self.cut.rows), order.pieces(rank))):
            first = self._first(row, piece, window)
            for earlier in range(first // length, piece):
                source, place = order.owner(earlier)
                base = (row * order.per_rank + place) * length
                sources.append((source, (base + max(first - earlier * length, 0), base + length)))
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
            for place, key_piece in enumerate(cut.order.pieces(rank)):
                base, here = (row * cut.order.per_rank + place) * length, i * length
                if key_piece == piece:
                    left = None if window is None else window - 1
                    new = [_Pair((here + a, here + b), (base + a, base + b), left, 0) for a, b in pairwise(starts)]
                elif key_piece < piece and (before := self._before(i, key_piece, window)) is not None:
                    queries, (start, end), left = before
                    new = [_Pair((here, here + queries), (base + start, base + end), left, None)]
                else:
                    continue
                # The same queries with keys that lie next to each other in two pieces are one pair.
                last = pairs[-1] if pairs and window is None else None
                if last is not None and last.queries == new[0].queries and last.keys[1] == new[0].keys[0]:
                    new[0] = new[0]._replace(keys=(pairs.pop().keys[0], new[0].keys[1]))
                pairs += new
        # Pairs with one band form a block; the n-th pair of the same queries goes into the n-th block of this band.
        blocks: dict[Any, list[_Pair]] = {}
        times = Counter[Any]()
        for pair in pairs:
            key = pair.queries[0], *pair[2:]
            times[key] += 1
            blocks.setdefault((*pair[2:], times[key]), []).append(pair)
        return [
            Block(tuple(p.queries for p in members), tuple(p.keys for p in members), *members[0][2:], self.device)
            for members in blocks.values()
        ]

    def _before(self, i: int, key_piece: int, window: int | None) -> tuple[int, Span, int | None] | None:
        """Queries of segment i that see keys of `key_piece`, an earlier piece of the segment's row.

        Returns:
            number of queries, from the segment's first on; span of the piece's tokens that they see; and `left` of the
            `Block`. None: no query sees a token of the piece.
        """
        cut, length = self.cut, self.cut.length
        start, queries = max(cut.begins[i] - key_piece * length, 0), (*cut.starts[i], length)[1]
        if start >= length:
            return None
        if window is None:
            return queries, (start, length), None
        # Number of the piece's last tokens that are in the window of the segment's first query.
        reach = window - 1 - (cut.places[i][1] - key_piece - 1) * length
        if reach < 1:
            return None
        queries, keys = min(queries, reach), min(length - start, reach)
        return queries, (length - keys, length), reach - queries if reach < queries + keys - 1 else None

    @cached_property
    def documents(self) -> tuple[Tensor | None, int | None]:
        """`cu_seqlens` and longest document of the whole rows, laid end to end; None where rows are not packed."""
        if not self.cut.packed:
            return None, None
        offsets = self.cut.documents
        longest = max(b - a for a, b in pairwise(offsets))
        return on_device(torch.tensor(offsets), self.device), longest


@dataclass(frozen=True)
class AttentionTask:
    """Settings of one attention call, see `ops.sequence.Pieces.attention`."""

    reach: Reach
    line: SequenceGroup
    expand: Expand
    parameters: tuple[Tensor, ...]
    scale: float
    window: int | None


def attention(q: Tensor, shared: tuple[Tensor, ...], task: AttentionTask) -> Tensor:
    """Softmax attention of the local queries `[B, T, H, D] -> [B, T, H, V]`. Collective.

    Args:
        shared: tensors `[B, T, ...]` of the local tokens that keys and values are made of.
        task: `task.line.attention` names the strategy.
    """
    flat = STRATEGIES[task.line.attention](q.flatten(0, 1), tuple(x.flatten(0, 1) for x in shared), task)
    return flat.unflatten(0, q.shape[:2])


def _by(function: Any, q: Tensor, shared: tuple[Tensor, ...], task: AttentionTask) -> Tensor:
    o: Tensor = function.apply(task, len(shared), q, *shared, *task.parameters)
    return o


class _Gathered(Function):
    """Attention by all-gather: q `[T, H, D]`, shared tensors `[T, ...]` and parameters -> o `[T, H, V]`."""

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
    """Ring attention, with the arguments and the result of `_Gathered`."""

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
                # The first blocks, in step 0, are the rank's own tokens; their output says what shape o and lse have.
                if o is None or lse is None:
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
        # Gradients are summed over ranks in at least fp32, and travel round the ring in the dtype of the sum.
        kind = torch.promote_types(q.dtype, torch.float32)
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
                d_shared, d_block_parameters = made.gradients(*d_keys)
                d_buffer += _flat(d_shared)
                for total, d in zip(d_parameters, d_block_parameters, strict=True):
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
    """Makes keys `[S, G, D]` and values `[S, G, V]` of the shared tensors `[S, ...]`."""
    k, v = task.expand(*(x.unsqueeze(0) for x in shared))
    return k.squeeze(0), v.squeeze(0)


class _Made:
    """Keys and values, made of the shared tensors again in a backward pass, with the graph that leads back to these."""

    def __init__(self, shared: Sequence[Tensor], task: AttentionTask):
        self.parameters = task.parameters
        with torch.enable_grad():
            self.leaves = [x.detach().requires_grad_() for x in shared]
            self.made = _expanded(self.leaves, task)
        self.k, self.v = (x.detach() for x in self.made)

    def gradients(self, dk: Tensor, dv: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Gradients of the shared tensors, and of the parameters (None: not trained)."""
        trained = [p for p in self.parameters if p.requires_grad]
        outer = [d.to(x.dtype) for d, x in zip((dk, dv), self.made, strict=True)]
        grads = iter(torch.autograd.grad(self.made, [*self.leaves, *trained], outer))
        return [next(grads) for _ in self.leaves], [next(grads) if p.requires_grad else None for p in self.parameters]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of the tensors, one tensor after the other: `[n]`."""
    return torch.cat([x.reshape(-1) for x in tensors])


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undoes `_flat`: cuts `flat [..., n]` into tensors `[..., *shape]`, with the shapes of the tensors in `like`."""
    return [
        x.unflatten(-1, tensor.shape) for x, tensor in zip(flat.split([t.numel() for t in like], -1), like, strict=True)
    ]


def _seen(shared: Sequence[Tensor], task: AttentionTask) -> list[Tensor]:
    """Gathers all tokens that the local queries see, `[S, ...]`, from every rank's own `[T, ...]`, in one message."""
    line, own = task.line, _flat(shared)
    sources, _ = task.reach.gathered(task.window)
    if line.group is None:
        return [torch.cat([x[a:b] for _, (a, b) in sources]) for x in shared]
    if task.window is None:
        everywhere = own.new_empty(line.order.size, len(own))
        dist.all_gather_into_tensor(everywhere.view(-1), own, group=line.group)
        return [torch.cat([x[rank, a:b] for rank, (a, b) in sources]) for x in _parts(everywhere, shared)]
    wanted, given = task.reach.wanted(task.window)
    received = _swap([[take(x, spans) for x in shared] for spans in given], wanted, line)
    seen = []
    for i, x in enumerate(shared):
        parts = [iter(part[i].split(_lengths(spans))) for part, spans in zip(received, wanted, strict=True)]
        seen.append(torch.cat([x[a:b] if rank == line.rank else next(parts[rank]) for rank, (a, b) in sources]))
    return seen


def _back(d_seen: Sequence[Tensor], shared: Sequence[Tensor], task: AttentionTask) -> list[Tensor]:
    """Gradients of the own tokens, summed over ranks, from the local gradients of the tokens that `_seen` returns."""
    line, window = task.line, task.window
    sources, _ = task.reach.gathered(window)
    parts = [x.split(_lengths([span for _, span in sources])) for x in d_seen]
    if line.group is None or window is None:
        everyones = d_seen[0].new_zeros(line.order.size, sum(x.numel() for x in shared))
        for into, by_source in zip(_parts(everyones, shared), parts, strict=True):
            for (rank, (a, b)), part in zip(sources, by_source, strict=True):
                into[rank, a:b] += part
        if line.group is None:
            return _parts(everyones[0], shared)
        total = torch.empty_like(everyones[0])
        dist.reduce_scatter_tensor(total, everyones.view(-1), group=line.group)
        return _parts(total, shared)
    own, sent = [torch.zeros_like(x) for x in shared], [[[x[:0]] for x in shared] for _ in range(line.order.size)]
    for i, by_source in enumerate(parts):
        for (rank, (a, b)), part in zip(sources, by_source, strict=True):
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
    """Sends tokens to every rank and receives tokens of every rank, by one all-to-all.

    Args:
        sent: for every rank, the tensors `[m, ...]` to send there.
        wanted: for every rank, the spans of its tokens that this rank receives; only their lengths count here.

    Returns:
        for every rank, the received tensors, of the same number and widths as the sent ones.
    """
    tokens, width = [sum(_lengths(spans)) for spans in wanted], sum(x.shape[1:].numel() for x in sent[0])
    flat = [_flat(x) for x in sent]
    received = flat[0].new_empty(sum(tokens) * width)
    sizes = [n * width for n in tokens], [len(x) for x in flat]
    dist.all_to_all_single(received, torch.cat(flat), *sizes, group=line.group)
    like = [[x.new_empty(n, *x.shape[1:]) for x in sent[0]] for n in tokens]
    return [_parts(x, empty) for x, empty in zip(received.split(sizes[0]), like, strict=True)]


def _pass_on(x: Tensor, line: SequenceGroup) -> Callable[[], Tensor]:
    """Starts to send x to the next rank and to receive a tensor like x from the previous rank.

    Returns:
        a function that waits for both and returns the received tensor.
    """
    assert line.group is not None
    received, size = torch.empty_like(x), line.order.size
    onwards, back = (dist.get_global_rank(line.group, (line.rank + n) % size) for n in (1, -1))
    both = [P2POp(isend, x, onwards, line.group), P2POp(irecv, received, back, line.group)]
    # In one batch: a send alone may wait for the matching receive, which the next rank would post after its own send.
    works = dist.batch_isend_irecv(both)

    def arrived(sent: Tensor = x) -> Tensor:  # the default keeps x, the buffer of the send, alive until the wait
        for work in works:
            work.wait()
        return received

    return arrived


def _ulysses(q: Tensor, shared: tuple[Tensor, ...], task: AttentionTask) -> Tensor:
    """Ulysses attention, with the arguments and the result of `_Gathered`."""
    cut, line = task.reach.cut, task.line
    size, per_rank = line.order.size, line.order.per_rank
    k, v = _expanded(shared, task)
    if k.shape[1] < size:
        k, v = (x.repeat_interleave(size // k.shape[1], 1) for x in (k, v))
    # W ranks: [tokens, H, D] is cut by heads into [W, tokens, H / W, D]; what arrives are all ranks' tokens with H / W
    # heads, which `in_time` lays out as whole rows. The outputs go back the same way.
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
    """All-to-all `[W, n] -> [W, n]`: sends row r to rank r, and receives row r from rank r."""

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
STRATEGIES: dict[AttentionStrategy, Strategy] = {
    AttentionStrategy.ALL_GATHER: partial(_by, _Gathered),
    AttentionStrategy.RING: partial(_by, _Ring),
    AttentionStrategy.ULYSSES: _ulysses,
}
