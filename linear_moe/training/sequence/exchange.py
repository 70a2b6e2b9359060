"""The state before every piece, from the summaries (A_i, E_i) of all pieces, which lie on several ranks.

The scan is S_before(i + 1) = A_i S_before(i) + E_i, with A_i the transition and E_i the state of piece i. Two
strategies give the same numbers. `all_gather`: one collective sends all summaries to all ranks, and every rank scans
them by itself; the bytes that a rank receives grow with the number of pieces. `ring`: states go from piece to piece, in
blocks so that ranks work at the same time; the bytes that a rank sends and receives do not depend on the number of
ranks, and no transition is sent.

The backward pass is the same scan from the last piece to the first. With d_i the gradient of S_before(i), the gradient
of E_i is G_i = d_(i+1) + A_(i+1)^H G_(i+1), and the gradient of A_i is G_i S_before(i)^H.

An exchange begins at one point of an op and is waited for at a later point. The op's work between the two overlaps with
the communication, in the backward pass too: autograd runs nodes in the reverse of the order in which they were made, so
the gradients are sent where the forward pass waited for states, and are waited for where the forward pass sent states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.config.strategies import AttentionStrategy, StateExchangeStrategy
from linear_moe.layout.sequence import RING_BLOCKS, PieceOrder
from linear_moe.modeling.deferred import fill_gap
from linear_moe.modeling.ops.autograd import Function

STRATEGIES = tuple(StateExchangeStrategy)


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share out sequences, and the settings of their communication.

    Attributes:
        order: order of the pieces of a row over the ranks.
        rank: this rank's number in the group.
        group: process group of the ranks; None: this process alone.
        strategy: how states travel.
        attention: how softmax attention sees the other ranks' tokens.
        dtype: dtype in which states and transitions are sent; all arithmetic on them is fp32.
    """

    order: PieceOrder
    rank: int
    group: dist.ProcessGroup | None = None
    strategy: StateExchangeStrategy = StateExchangeStrategy.ALL_GATHER
    attention: AttentionStrategy = AttentionStrategy.ALL_GATHER
    dtype: torch.dtype = torch.float32


def states_before(transition: Tensor | None, state: Tensor, line: SequenceGroup, matrix: bool) -> Tensor:
    """Runs a `StateExchange` and waits for it at once.

    Args:
        transition, state: see `StateExchange.begin`.
        matrix: whether transitions are matrices; else they are elementwise.

    Returns:
        the states before this rank's segments `[S, ...]`, differentiable.
    """
    return StateExchange(line, matrix).begin(transition, state)()


Finish = Callable[[], Tensor]
"""Waits for an exchange, and returns `[P, rows, ...]`: the state before each of this rank's pieces, or, of a scan from
the last piece to the first, the gradient of the state after each of them."""


class StateExchange:
    """One exchange of states, forward and backward. Both passes are collective.

    `begin` sends the summaries and returns the function that waits for the states. When activation recomputation calls
    `begin` a second time, nothing is sent: the exchange keeps the states, and all that its backward pass needs.

    Args:
        matrix: whether transitions are matrices; else they are elementwise.
    """

    def __init__(self, line: SequenceGroup, matrix: bool = False):
        self.line, self.matrix = line, matrix
        # A transition A near 1, rounded to 16 bits, loses 1 - A, the part that it forgets, and the error adds up over
        # pieces. So A - 1 is sent: sum_m (1 - A_m) prod_(l > m) A_l is at most 1, and the error of the states does not
        # grow with the number of pieces.
        self.less_one = line.strategy == StateExchangeStrategy.ALL_GATHER and line.dtype != torch.float32
        self.finish: Finish | None = None  # waits for the messages on their way, of the forward or the backward pass
        self.kept: Tensor | None = None  # transitions that the backward pass needs
        self.before: Tensor | None = None  # states before this rank's pieces [P, rows, ...], once they have arrived

    def begin(self, transition: Tensor | None, state: Tensor) -> Callable[[], Tensor]:
        """Sends this rank's summaries.

        Args:
            transition: `[S, ...]`, see `ops.sequence.Summary`; 0 for a segment whose final state does not depend on
                the state before it, because a document begins inside. None: no final state depends on the state before.
            state: `[S, ...]` fp32 or complex; S segments: row by row, and within a row its pieces in order of time.

        Returns:
            a function that waits for the states before this rank's segments and returns them, `[S, ...]`,
            differentiable.
        """
        rows = (None if x is None else x.unflatten(0, (-1, self.line.order.per_rank)) for x in (transition, state))
        started: Tensor = _Start.apply(*(None if x is None else x.transpose(0, 1) for x in rows), self)

        def wait() -> Tensor:
            before: Tensor = _Wait.apply(started, self)
            return before.transpose(0, 1).flatten(0, 1)

        return wait

    def arrived(self) -> Tensor:
        """Computes the weight gradients that were put off for this gap (`fill_gap`), then waits for the messages."""
        assert self.finish is not None, "an exchange is waited for once, after it began"
        finish, self.finish = self.finish, None  # the function holds the buffers, which must not outlive this call
        fill_gap()
        return finish()

    def one(self, like: Tensor) -> Tensor | int:
        """The transition that changes nothing: the identity matrix, or 1."""
        return torch.eye(like.shape[-1], device=like.device) if self.matrix else 1

    def step(self, state: Tensor, transition: Tensor | None, carried: Tensor) -> Tensor:
        """One step of the scan: `transition carried + state`, with the 1 added back that was sent less (`less_one`)."""
        if transition is None:
            return state
        if self.less_one:
            state = state + carried
        if not self.matrix:
            return torch.addcmul(state, transition, carried)
        state3, transition3, carried3 = (x.flatten(0, -3) for x in (state, transition, carried))
        return torch.baddbmm(state3, transition3, carried3).view(state.shape)

    def adjoint(self, x: Tensor) -> Tensor:
        """Adjoint of the transition x: transposed matrix, or complex conjugate of the elements."""
        return x.mT if self.matrix else x.conj()


class _Start(Function):
    """Sends transitions `[P, rows, ...]` and states `[P, rows, ...]` of this rank's P pieces; `_Wait` waits for them.

    The output is an empty tensor, the input of `_Wait`: it tells autograd the order of the two functions. Buffers of
    messages, and the few tensors that the backward pass needs, are kept in the exchange. Saved by autograd, they would
    be dropped by activation recomputation and have to be exchanged again.
    """

    @staticmethod
    def forward(ctx: Any, transition: Tensor | None, state: Tensor, exchange: StateExchange) -> Tensor:
        ctx.exchange, ctx.shape = exchange, None if transition is None else transition.shape
        if exchange.before is None:
            if exchange.line.strategy == StateExchangeStrategy.RING:
                exchange.kept = None if transition is None else transition.detach()
                exchange.finish = _ring(exchange, transition, state, reverse=False)
            else:
                exchange.finish = _gather(exchange, transition, state)
        return state.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        exchange: StateExchange = ctx.exchange
        after, before = exchange.arrived(), exchange.before
        exchange.before = exchange.kept = None
        if not ctx.needs_input_grad[0]:
            return None, after, None
        assert before is not None
        if exchange.matrix:
            return after @ before.mT, after, None
        return (after * before.conj()).sum_to_size(ctx.shape), after, None


class _Wait(Function):
    """Waits for the exchange that `_Start` began: the states before this rank's pieces `[P, rows, ...]`."""

    @staticmethod
    def forward(ctx: Any, started: Tensor, exchange: StateExchange) -> Tensor:
        ctx.exchange = exchange
        if exchange.before is None:
            exchange.before = exchange.arrived()
        # Autograd ties the returned tensor to the graph. The exchange keeps another one, so as not to hold the graph.
        return exchange.before.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        exchange: StateExchange = ctx.exchange
        assert exchange.before is not None, "an exchange has one backward pass"
        if exchange.line.strategy == StateExchangeStrategy.RING:
            transition = None if exchange.kept is None else exchange.adjoint(exchange.kept)
            exchange.finish = _ring(exchange, transition, gradient, reverse=True)
        else:
            exchange.finish = _gather_gradients(exchange, gradient)
        return gradient.new_empty(0), None


def _gather(exchange: StateExchange, transition: Tensor | None, state: Tensor) -> Finish:
    """Gathers all ranks' summaries in one message; `finish` scans them as far as this rank's last piece.

    The transitions of the pieces behind this rank's first one are kept for the backward pass.
    """
    line, parts = exchange.line, [state]
    if transition is not None:
        parts.append(transition - exchange.one(transition) if exchange.less_one else transition)
    arrived = _from_all(parts, line)

    def finish() -> Tensor:
        states, *others = arrived()
        transitions = dict[int, Tensor]()
        if transition is not None:
            transitions = dict(enumerate(others[0]))
            behind = others[0][min(line.order.pieces(line.rank)) + 1 :]
            exchange.kept = torch.stack(behind) if behind else transition.new_empty(0)
        return _scan(exchange, transitions, states, range(line.order.count))

    return finish


def _gather_gradients(exchange: StateExchange, gradient: Tensor) -> Finish:
    """Gathers gradients of the states before all pieces; `finish` scans them from the last piece to the first."""
    line, kept, arrived = exchange.line, exchange.kept, _from_all([gradient], exchange.line)

    def finish() -> Tensor:
        (gradients,) = arrived()
        behind = () if kept is None else enumerate(kept.unbind(), min(line.order.pieces(line.rank)) + 1)
        transitions = {piece: exchange.adjoint(x) for piece, x in behind}
        return _scan(exchange, transitions, gradients, range(line.order.count - 1, -1, -1))

    return finish


def _scan(exchange: StateExchange, transitions: dict[int, Tensor], states: list[Tensor], pieces: range) -> Tensor:
    """Scans all pieces in the order of `pieces`, and returns the carried states `[P, rows, ...]` before this rank's.

    Args:
        transitions: `[rows, ...]` by piece; a piece that is missing passes nothing on of the state before it.
        states: `[rows, ...]` of every piece, in order of time.
        pieces: first to last, or last to first. The scan ends where it has reached all pieces of this rank.
    """
    own = exchange.line.order.pieces(exchange.line.rank)
    before, carried = dict[int, Tensor](), None
    for piece in pieces:
        if piece in own:
            before[piece] = torch.zeros_like(states[piece]) if carried is None else carried
            if len(before) == len(own):
                break
        carried = states[piece] if carried is None else exchange.step(states[piece], transitions.get(piece), carried)
    return torch.stack([before[piece] for piece in own])


def _from_all(parts: Sequence[Tensor], line: SequenceGroup) -> Callable[[], list[list[Tensor]]]:
    """Gathers tensors `[P, ...]` of every rank, in one message.

    Returns:
        a function that waits for the message and returns, for every tensor of `parts`, a list `[...]` by piece, in
        order of time. The tensors of the list are fp32 or complex, and views of one buffer.
    """
    order, shapes = line.order, [_real(part).shape[1:] for part in parts]
    sizes = [shape.numel() for shape in shapes]
    own = torch.empty(order.per_rank, sum(sizes), dtype=line.dtype, device=parts[0].device)
    for place, part, shape in zip(own.split(sizes, 1), parts, shapes, strict=True):
        place.unflatten(1, shape).copy_(_real(part))
    everyones, work = own, None
    if line.group is not None:
        everyones = own.new_empty(order.count, sum(sizes))
        work = dist.all_gather_into_tensor(everyones, own, group=line.group, async_op=True)
    complex_parts = [part.is_complex() for part in parts]

    def finish() -> list[list[Tensor]]:
        if work is not None:
            work.wait()
        by_part = []
        for x, shape, is_complex in zip(everyones.float().split(sizes, 1), shapes, complex_parts, strict=True):
            x = x.unflatten(1, shape)
            by_rank = (torch.view_as_complex(x) if is_complex else x).unbind()
            by_part.append([by_rank[n] for n in _in_time(order)])
        return by_part

    return finish


@cache
def _in_time(order: PieceOrder) -> tuple[int, ...]:
    """Index of each piece, in order of time, in the pieces of all ranks laid end to end."""
    owners = (order.owner(piece) for piece in range(order.count))
    return tuple(rank * order.per_rank + place for rank, place in owners)


def _ring(exchange: StateExchange, transition: Tensor | None, state: Tensor, reverse: bool) -> Finish:
    """`_scan` by messages from piece to piece, each rank with its own transitions and states `[P, rows, ...]`.

    On a GPU arithmetic and messages are queued on a separate CUDA stream. There is no deadlock, even where the backend
    runs a rank's messages strictly one after the other: two ranks have their common messages in the same order, and no
    block waits for a later block.
    """
    before = torch.empty_like(state, memory_format=torch.contiguous_format)
    if not state.is_cuda:
        _walk(exchange, transition, state, before, reverse)
        return lambda: before
    stream = _stream(state.device)
    stream.wait_stream(torch.cuda.current_stream(state.device))
    with torch.cuda.stream(stream):
        _walk(exchange, transition, state, before, reverse)
    return partial(_joined, before, stream, (transition, state))


def _joined(before: Tensor, stream: torch.cuda.Stream, _read: tuple[Tensor | None, ...]) -> Tensor:
    """Returns `before`, after the current stream has been told to wait for `stream`, which writes it.

    The argument `_read` keeps the tensors that `stream` reads alive until then: their memory belongs to the current
    stream, which would use it again. `Tensor.record_stream` would not do, because it refuses expanded tensors such as
    S4's transitions. An exchange that is dropped before anyone waits for it gives the memory back too early.
    """
    torch.cuda.current_stream(before.device).wait_stream(stream)
    return before


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The device's CUDA stream for ring exchanges."""
    return torch.cuda.Stream(device)


def _walk(exchange: StateExchange, transition: Tensor | None, state: Tensor, before: Tensor, reverse: bool) -> None:
    """Receives, computes and sends on one block of a state's columns after the other, and writes `before`.

    The next rank can so begin as soon as the first block arrives. Pieces of this rank that follow each other directly
    are walked through without a message between them.
    """
    line, step = exchange.line, -1 if reverse else 1
    order, rank, sent = line.order, line.rank, list[tuple[Any, Tensor]]()
    by_column = transition is not None and not exchange.matrix and transition.shape[-1] == state.shape[-1]
    states, starts = state.chunk(RING_BLOCKS, -1), before.chunk(RING_BLOCKS, -1)
    transitions = (
        transition.chunk(RING_BLOCKS, -1) if transition is not None and by_column else [transition] * len(states)
    )
    for run in _runs(order.pieces(rank)[::step], step):
        source, target = (
            order.owner(piece)[0] if 0 <= piece < order.count else None for piece in (run[0] - step, run[-1] + step)
        )
        ready: list[Tensor] = []
        for a, e, start in zip(transitions, states, starts, strict=True):
            carried = None if source is None else _receive(e[0], source, line)
            for piece in run:
                place = order.owner(piece)[1]
                if carried is None:
                    start[place] = 0
                    carried = e[place]
                else:
                    start[place] = carried
                    carried = exchange.step(e[place], None if a is None else a[place], start[place])
            if target is not None and carried is not None:
                ready.append(carried)
            if source != target:
                sent += [_send(x, target, line) for x in ready if target is not None]
                ready = []
        # With zigzag, source and target can be one rank, which sends all its blocks before it receives the first. So
        # this rank receives them all before it sends.
        sent += [_send(x, target, line) for x in ready if target is not None]
    for work, _ in sent:
        work.wait()


def _runs(pieces: Sequence[int], step: int) -> list[list[int]]:
    """Groups pieces into runs, in which each piece is the one before plus `step`."""
    runs: list[list[int]] = []
    for piece in pieces:
        if runs and runs[-1][-1] + step == piece:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _send(x: Tensor, rank: int, line: SequenceGroup) -> tuple[Any, Tensor]:
    """Starts to send x to `rank` of the group; returns the handle, and the buffer, which must live until the wait."""
    assert line.group is not None
    buffer = _real(x).to(line.dtype).contiguous()
    return dist.isend(buffer, dist.get_global_rank(line.group, rank), group=line.group), buffer


def _receive(like: Tensor, rank: int, line: SequenceGroup) -> Tensor:
    """Receives a tensor of the shape of `like` from `rank` of the group; complex if `like` is."""
    assert line.group is not None
    buffer = torch.empty(_real(like).shape, dtype=line.dtype, device=like.device)
    dist.recv(buffer, dist.get_global_rank(line.group, rank), group=line.group)
    return torch.view_as_complex(buffer.float()) if like.is_complex() else buffer


def _real(x: Tensor) -> Tensor:
    """A complex tensor as real numbers `[..., 2]`; a real tensor as given."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
