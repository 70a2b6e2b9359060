"""Implements `ops.sequence.Pieces`, the interface through which ops reach the tokens before their own pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.packing import on_device
from linear_moe.modeling.ops.sequence import Expand, FromState, Gradient, Run, Summary, once
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.training.sequence import attention as softmax
from linear_moe.training.sequence.carry import carry
from linear_moe.training.sequence.cut import Cut, share
from linear_moe.training.sequence.exchange import SequenceGroup, StateExchange, states_before


class RankPieces:
    """The pieces that a rank holds of a micro-batch's sequences. See `ops.sequence.Pieces` for the methods.

    The first sequence of a segment may have begun in an earlier piece, and its last sequence may go on in the next
    piece. So a segment's summary is that of its last sequence, and only its first sequence gets an initial state from
    the exchange. A document boundary inside the segment makes the two different sequences; the transition is then 0.
    """

    def __init__(self, cut: Cut, line: SequenceGroup, device: torch.device):
        self.cut, self.line, self.device = cut, line, device
        counts = torch.tensor([len(starts) for starts in cut.starts])
        continued = torch.tensor(cut.continued)
        self._continued = on_device(continued.float(), device)
        # 1 where a segment's only sequence began before it: its final state depends on the state before the segment.
        self._through = on_device((continued & (counts == 1)).float(), device)
        # Numbers of each segment's first and last sequence among the local sequences.
        self._firsts = on_device(counts.cumsum(0) - counts, device)
        self._lasts = on_device(counts.cumsum(0) - 1, device)
        self._sequences, self.sequences, self.tokens = int(counts.sum()), cut.sequences, cut.rows * cut.filled

    @property
    def length(self) -> int:
        return self.cut.length

    @property
    def packed(self) -> bool:
        return self.cut.packed

    def states(self, summary: Summary, *inputs: Tensor | None, matrix: bool = False) -> Tensor:
        wait = once(lambda: StateExchange(self.line, matrix)).begin(*self._summaries(summary, inputs))
        return self._at(self._firsts, self._continuing(wait()))

    def through(
        self, run: FromState, summary: tuple[Any, ...], gradient: tuple[Any, ...], matrix: bool = False
    ) -> tuple[Tensor, Tensor]:
        def exchanged() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                transition, state = self._summaries(summary[0], summary[1:])
            with torch.enable_grad():  # the exchange's own graph: d_final walks through it in the backward pass
                return states_before(transition, state.requires_grad_(), self.line, matrix), state

        before, state = once(exchanged)
        o, final = run(self._at(self._firsts, self._continuing(before.detach())))
        start_gradient: Gradient = gradient[0]

        def d_final(inputs: tuple[Tensor | None, ...]) -> Tensor:
            d_starts = torch.cat([start_gradient(*part) for part in self._segments(inputs, last=False)])
            (d_state,) = torch.autograd.grad(before, state, self._continuing(d_starts))
            return self._at(self._lasts, d_state)

        return _Through.apply(o, final, d_final, *gradient[1:]), final

    def _summaries(self, summary: Summary, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, Tensor]:
        """Summaries `[S, ...]` of every segment's last sequence; transitions of sequences that begin in it are 0."""
        transitions, states = zip(*(summary(*part) for part in self._segments(inputs, last=True)), strict=True)
        state = states[0] if len(states) == 1 else torch.cat(states)
        if transitions[0] is None:
            return None, state
        transition = transitions[0] if len(transitions) == 1 else torch.cat(transitions)
        return transition * _as(self._through, transition) if self.cut.packed else transition, state

    def _segments(self, inputs: tuple[Tensor | None, ...], last: bool) -> Iterator[tuple[Tensor | None, ...]]:
        """Yields the inputs of the segments' last (or first) sequences: in one piece where segments are rows."""
        if not self.cut.packed:
            yield inputs
            return
        for s, starts in enumerate(self.cut.starts):
            first, end = (starts[-1], self.cut.length) if last else (0, (*starts, self.cut.length)[1])
            span = slice(s * self.cut.length + first, s * self.cut.length + end)
            yield tuple(None if x is None else x[:, span] for x in inputs)

    def _at(self, places: Tensor, x: Tensor) -> Tensor:
        """Places `x [S, ...]` of S segments at the numbers `places` of all N local sequences `[N, ...]`; else zeros."""
        if self._sequences == len(x):
            return x
        return x.new_zeros(self._sequences, *x.shape[1:]).index_copy(0, places, x)

    def _continuing(self, x: Tensor) -> Tensor:
        """Sets `x [S, ...]` to 0 for segments that begin with a new sequence.

        Rows that are not packed need no mask: only their first piece begins a sequence, and the state before is 0.
        """
        return x * _as(self._continued, x) if self.cut.packed else x

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
        seen = softmax.AttentionTask(self._reach, self.line, expand, tuple(parameters), scale, window)
        return softmax.attention(q, shared, seen)

    @cached_property
    def _reach(self) -> softmax.Reach:
        return softmax.Reach(self.cut, self.device)


class _Through(Function):
    """Returns o; the backward pass also gives `final`, the final states, the gradient `d_final(*inputs, d_o)`."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, final: Tensor, d_final: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.d_final = d_final
        return o.view_as(o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        return d_o, ctx.d_final((*inputs, d_o)), None, *[None] * len(inputs)


def _as(flags: Tensor, x: Tensor) -> Tensor:
    """Flags `[S]`, reshaped so that they multiply `x [S, ...]`."""
    return flags.view(-1, *[1] * (x.ndim - 1))


def pieces_layout(
    cut: Cut, line: SequenceGroup, device: torch.device, positions: Tensor, cu_seqlens: Tensor | None
) -> TokenLayout:
    """The layout of a rank's share of a micro-batch: segments as rows, or as one row of packed documents.

    Args:
        positions: int64, the position of each local token in its document.
        cu_seqlens: offsets of the local sequences, with the segments laid end to end; None: not packed.
    """
    pieces, shape, longest = RankPieces(cut, line, device), (len(cut.starts), cut.length), None
    if cu_seqlens is not None:
        shape, longest = (1, shape[0] * shape[1]), max(end - start for start, end in pairwise(cut.offsets))
    padding = _padding(cut, shape, device)
    return TokenLayout(*shape, cu_seqlens, longest, positions.reshape(shape), pieces=pieces, padding=padding)


def _padding(cut: Cut, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """The local tokens that are padding, bool; None: no rank has any.

    All ranks of a sequence decide alike, by the whole row, since the code that uses the mask calls collectives.
    """
    if cut.filled == cut.length * cut.order.count:
        return None
    behind = torch.arange(cut.length) >= cut.length - torch.tensor(cut.padding)[:, None]
    return on_device(behind.view(shape), device)
