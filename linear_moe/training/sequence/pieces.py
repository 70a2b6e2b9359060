"""The pieces that a rank holds of a micro-batch's sequences, as ops ask for them (`ops.sequence.Pieces`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from linear_moe.modeling.mixers.base import Layout
from linear_moe.modeling.ops.packing import on_device
from linear_moe.modeling.ops.sequence import Expand, Summary
from linear_moe.training.sequence.attention import Exchange, Reach, attention
from linear_moe.training.sequence.exchange import Line, StateExchange
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
    return flags.view(-1, *[1] * (x.ndim - 1))


def layout_of(cut: Cut, line: Line, device: torch.device, positions: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """The layout of a rank's share: segments as rows, or as one row of packed documents."""
    pieces, count = RankPieces(cut, line, device), len(cut.starts)
    if cu_seqlens is None:
        return Layout(count, cut.length, positions=positions.reshape(count, -1), pieces=pieces)
    longest = max(end - start for start, end in pairwise(cut.offsets))
    return Layout(1, count * cut.length, cu_seqlens, longest, positions.reshape(1, -1), pieces=pieces)
