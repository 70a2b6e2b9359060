"""The pieces that a rank holds of a micro-batch's sequences, as ops ask for them (`ops.sequence.Pieces`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from linear_moe.modeling.mixers.base import Layout
from linear_moe.modeling.ops.packing import on_device
from linear_moe.modeling.ops.sequence import Keys, Summary
from linear_moe.training.sequence.exchange import AllTokens, StateExchange, Line
from linear_moe.training.sequence.layout import Cut


class RankPieces:
    """See `ops.sequence.Pieces`.

    A segment's first sequence may go on with one of the piece before, its last may go on in the piece after. So only
    its last sequence is summarised, and only its first one starts from a state; a boundary between cuts the chain.
    """

    def __init__(self, cut: Cut, line: Line, device: torch.device):
        self.cut, self.line, self.device = cut, line, device
        counts = torch.tensor([len(starts) for starts in cut.starts])
        continued = torch.tensor(cut.continued)
        self._continued = on_device(continued.float(), device)
        self._through = on_device((continued & (counts == 1)).float(), device)  # what came before goes on behind
        self._firsts = on_device(counts.cumsum(0) - counts, device)  # of the local sequences, each segment's first
        self._sequences = int(counts.sum())
        self._begun: dict[int, tuple[Tensor, StateExchange]] = {}  # by the identity of their inputs

    def ahead(self, summary: Summary, x: Tensor, matrix: bool = False) -> None:
        self._begun[id(x)] = x, self._begin(summary, (x,), matrix)

    def states(self, summary: Summary, *inputs: Tensor | None, matrix: bool = False) -> Tensor:
        _, exchange = self._begun.pop(id(inputs[0]), (None, None)) if len(inputs) == 1 else (None, None)
        before = (exchange or self._begin(summary, inputs, matrix)).wait()
        if not self.cut.packed:  # every piece but the first goes on, and nothing is before that
            return before
        before = before * _as(self._continued, before)
        if self._sequences == len(before):
            return before
        return before.new_zeros(self._sequences, *before.shape[1:]).index_copy(0, self._firsts, before)

    def _begin(self, summary: Summary, inputs: tuple[Tensor | None, ...], matrix: bool) -> StateExchange:
        parts = [summary(*part) for part in self._last_sequences(inputs)]
        transition, state = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts, strict=True))
        if self.cut.packed:
            transition = transition * _as(self._through, transition)
        return StateExchange(transition, state, self.line, matrix)

    def _last_sequences(self, inputs: tuple[Tensor | None, ...]) -> Iterator[tuple[Tensor | None, ...]]:
        """Inputs of each segment's last sequence: at once where segments are rows, else one by one."""
        if not self.cut.packed:
            yield inputs
            return
        for s, starts in enumerate(self.cut.starts):
            span = slice(s * self.cut.length + starts[-1], (s + 1) * self.cut.length)
            yield tuple(None if x is None else x[:, span] for x in inputs)

    def keys(self, k: Tensor, v: Tensor) -> Keys:
        cut, sizes = self.cut, (k.shape[-1], v.shape[-1])
        own = torch.cat([k, v], -1).view(cut.rows, cut.order.per_rank, cut.length, k.shape[2], sum(sizes))
        everything = (
            AllTokens.apply(own.transpose(0, 1), self.line).transpose(0, 1).flatten(1, 2)
        )  # [rows, T, G, D + V]
        reach = zip(cut.places, cut.begins, strict=True)
        seen = [everything[row, begin : (piece + 1) * cut.length] for (row, piece), begin in reach]
        k, v = torch.cat(seen).unsqueeze(0).split(sizes, -1)
        return Keys(k, v, self._spans, self._offsets)

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        spans = []
        for starts, begin, (_, piece) in zip(self.cut.starts, self.cut.begins, self.cut.places, strict=True):
            before = piece * self.cut.length - begin
            for start, end in pairwise((*starts, self.cut.length)):
                spans.append((end - start, end - start + before))
                before = 0
        return spans

    @cached_property
    def _offsets(self) -> tuple[Tensor, Tensor]:
        queries, keys = (torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in zip(*self._spans, strict=True))
        return on_device(queries, self.device), on_device(keys, self.device)


def _as(flags: Tensor, x: Tensor) -> Tensor:
    """Flags `[S]` as factors of `x [S, ...]`."""
    return flags.view(-1, *[1] * (x.ndim - 1))


def layout_of(cut: Cut, line: Line, device: torch.device, positions: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """The layout of a rank's share: segments as rows, or as one row of packed documents."""
    pieces, count = RankPieces(cut, line, device), len(cut.starts)
    if cu_seqlens is None:
        return Layout(count, cut.length, positions=positions.reshape(count, -1), pieces=pieces)
    longest = max(end - start for start, end in pairwise(cut.offsets))
    return Layout(1, count * cut.length, cu_seqlens, longest, positions.reshape(1, -1), pieces=pieces)
