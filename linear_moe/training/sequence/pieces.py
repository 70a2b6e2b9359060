"""The pieces that a rank holds of a micro-batch's sequences, as ops ask for them (`ops.sequence.Pieces`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from linear_moe.modeling.mixers.base import Layout
from linear_moe.modeling.ops.packing import on_device
from linear_moe.modeling.ops.sequence import Expand, Run, Summary
from linear_moe.training.sequence.attention import Exchange, Reach, attention
from linear_moe.training.sequence.carry import carry
from linear_moe.training.sequence.exchange import Line, states_before
from linear_moe.training.sequence.layout import Cut, share


class RankPieces:
    """See `ops.sequence.Pieces`.

    A segment's first sequence may go on with one of the piece before, its last may go on in the piece after. So only
    its last sequence is summarised, and only its first one starts from a state; a boundary between cuts the chain.
    """

    def __init__(self, cut: Cut, line: Line, device: torch.device):
        self.cut, self.line, self.device = cut, line, device
        counts = torch.tensor([len(starts) for starts in cut.starts])
        continued = torch.tensor(cut.continued)
        self._continued = on_device(continued, device)
        self._through = on_device(continued & (counts == 1), device)  # what came before goes on behind
        self._firsts = on_device(counts.cumsum(0) - counts, device)  # of the local sequences, each segment's first
        self._sequences, self.sequences, self.tokens = int(counts.sum()), cut.sequences, cut.rows * cut.filled

    def states(self, summary: Summary, *inputs: Tensor | None, matrix: bool = False) -> Tensor:
        parts = [summary(*part) for part in self._last_sequences(inputs)]
        transition, state = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts, strict=True))
        transition = transition * _as(self._through, transition)
        before = states_before(transition, state, self.line, matrix)
        before = before * _as(self._continued, before)
        if self._sequences == len(before):
            return before
        return before.new_zeros(self._sequences, *before.shape[1:]).index_copy(0, self._firsts, before)

    def _last_sequences(self, inputs: tuple[Tensor | None, ...]) -> Iterator[tuple[Tensor | None, ...]]:
        """Inputs of each segment's last sequence: at once where segments are rows, else one by one."""
        if not self.cut.packed:
            yield inputs
            return
        for s, starts in enumerate(self.cut.starts):
            span = slice(s * self.cut.length + starts[-1], (s + 1) * self.cut.length)
            yield tuple(None if x is None else x[:, span] for x in inputs)

    def carry(
        self,
        run: Run,
        inputs: Sequence[Tensor],
        start: Tensor,
        shared: Sequence[Tensor],
        count: int,
        summary: Summary | None = None,
    ) -> Tensor:
        return carry(self.cut, self.line, run, inputs, start, shared, count, summary)

    def all_tokens(self, x: Tensor) -> Tensor:
        order, own = self.cut.order, x.detach().contiguous()
        everyones = own.new_empty(order.size * len(own), *own.shape[1:])
        if self.line.group is None:
            everyones = own
        else:
            dist.all_gather_into_tensor(everyones, own, group=self.line.group)
        by_rank = everyones.view(order.size, self.cut.rows, order.per_rank, self.cut.length, *own.shape[1:])
        owners = map(order.owner, range(order.count))
        return torch.stack([by_rank[rank, :, place] for rank, place in owners], 1).flatten(0, 2)

    def own_tokens(self, x: Tensor) -> Tensor:
        return share(x.unflatten(0, (self.cut.rows, -1)), self.cut).flatten(0, 1)

    @cached_property
    def numbers(self) -> Tensor:
        return on_device(torch.tensor(self.cut.numbers), self.device)

    def attention(
        self,
        q: Tensor,
        shared: tuple[Tensor, ...],
        expand: Expand,
        parameters: Sequence[Tensor],
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return attention(q, shared, Exchange(self._reach, self.line, expand, tuple(parameters), scale, window))

    @cached_property
    def _reach(self) -> Reach:
        return Reach(self.cut, self.device)


def _as(flags: Tensor, x: Tensor) -> Tensor:
    """Flags `[S]` as factors of `x [S, ...]`."""
    return flags.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def layout_of(cut: Cut, line: Line, device: torch.device, positions: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """The layout of a rank's share: segments as rows, or as one row of packed documents."""
    pieces, shape, longest = RankPieces(cut, line, device), (len(cut.starts), cut.length), None
    if cu_seqlens is not None:
        shape, longest = (1, shape[0] * shape[1]), max(end - start for start, end in pairwise(cut.offsets))
    padding = _padding(cut, shape, device)
    return Layout(*shape, cu_seqlens, longest, positions.reshape(shape), pieces=pieces, padding=padding)


def _padding(cut: Cut, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """See Layout. None on every rank of a sequence or on none: what is done with it is collective."""
    if cut.filled == cut.length * cut.order.count:
        return None
    behind = torch.arange(cut.length) >= cut.length - torch.tensor(cut.padding)[:, None]
    return on_device(behind.view(shape), device)
