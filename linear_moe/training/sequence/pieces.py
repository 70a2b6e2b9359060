"""The pieces that a rank holds of a micro-batch's sequences, as ops ask for them (`ops.sequence.Pieces`)."""

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
    """See `ops.sequence.Pieces`.

    A segment's first sequence may go on with one of the piece before, its last may go on in the piece after. So only
    its last sequence is summarised, and only its first one starts from a state; a boundary between cuts the chain.
    """

    def __init__(self, cut: Cut, line: SequenceGroup, device: torch.device):
        self.cut, self.line, self.device = cut, line, device
        counts = torch.tensor([len(starts) for starts in cut.starts])
        continued = torch.tensor(cut.continued)
        self._continued = on_device(continued.float(), device)
        self._through = on_device((continued & (counts == 1)).float(), device)  # what came before goes on behind
        self._firsts = on_device(counts.cumsum(0) - counts, device)  # of the local sequences, each segment's first
        self._lasts = on_device(counts.cumsum(0) - 1, device)  # and each segment's last
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
            with torch.enable_grad():  # a graph of its own
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
        """Of every segment's last sequence; the transition 0 where the segment before does not go on behind it."""
        transitions, states = zip(*(summary(*part) for part in self._segments(inputs, last=True)), strict=True)
        state = states[0] if len(states) == 1 else torch.cat(states)
        if transitions[0] is None:
            return None, state
        transition = transitions[0] if len(transitions) == 1 else torch.cat(transitions)
        return transition * _as(self._through, transition) if self.cut.packed else transition, state

    def _segments(self, inputs: tuple[Tensor | None, ...], last: bool) -> Iterator[tuple[Tensor | None, ...]]:
        """Inputs of each segment's last (or first) sequence: at once where segments are rows, else one by one."""
        if not self.cut.packed:
            yield inputs
            return
        for s, starts in enumerate(self.cut.starts):
            first, end = (starts[-1], self.cut.length) if last else (0, (*starts, self.cut.length)[1])
            span = slice(s * self.cut.length + first, s * self.cut.length + end)
            yield tuple(None if x is None else x[:, span] for x in inputs)

    def _at(self, places: Tensor, x: Tensor) -> Tensor:
        """`x [S, ...]` of every segment's first or last sequence, among all local ones `[N, ...]`; zeros elsewhere."""
        if self._sequences == len(x):
            return x
        return x.new_zeros(self._sequences, *x.shape[1:]).index_copy(0, places, x)

    def _continuing(self, x: Tensor) -> Tensor:
        """`x [S, ...]`, 0 where a segment begins a sequence: of whole rows only the first, which nothing is before."""
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
    """`through(o, final, d_final, *inputs) -> o`; on the way back, the final states' gradients from that of o."""

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
    """Flags `[S]` as factors of `x [S, ...]`."""
    return flags.view(-1, *[1] * (x.ndim - 1))


def pieces_layout(
    cut: Cut, line: SequenceGroup, device: torch.device, positions: Tensor, cu_seqlens: Tensor | None
) -> TokenLayout:
    """The layout of a rank's share: segments as rows, or as one row of packed documents."""
    pieces, shape, longest = RankPieces(cut, line, device), (len(cut.starts), cut.length), None
    if cu_seqlens is not None:
        shape, longest = (1, shape[0] * shape[1]), max(end - start for start, end in pairwise(cut.offsets))
    padding = _padding(cut, shape, device)
    return TokenLayout(*shape, cu_seqlens, longest, positions.reshape(shape), pieces=pieces, padding=padding)


def _padding(cut: Cut, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """See Layout. None on every rank of a sequence or on none: what is done with it is collective."""
    if cut.filled == cut.length * cut.order.count:
        return None
    behind = torch.arange(cut.length) >= cut.length - torch.tensor(cut.padding)[:, None]
    return on_device(behind.view(shape), device)
