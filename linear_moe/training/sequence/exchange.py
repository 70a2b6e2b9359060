"""The states before every piece, from the summaries of all: S_before(i + 1) = A_i S_before(i) + E_i, over ranks.

Two strategies give the same numbers. `all_gather`: one collective of all summaries, then every rank scans them by
itself; a rank receives as much as there are pieces. `ring`: states go from piece to piece, in blocks so that ranks work
at the same time; what a rank sends and receives does not depend on the number of ranks, and transitions stay at home.

The backward pass is the same scan from the end: with d the gradients of the states before, G_i = d_(i+1) + A_(i+1)^H
G_(i+1) are those of E_i, and G_i S_before(i)^H those of A_i.

An exchange begins in one place and is waited for in another. What an op does in between runs beside it, in the backward
pass too: autograd runs nodes in the reverse of the order in which they were made, so the gradients leave where the
states were waited for, and are waited for where the states left.
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

from linear_moe.layout.sequence import RING_BLOCKS, PieceOrder
from linear_moe.modeling.deferred import fill_gap
from linear_moe.modeling.ops.autograd import Function

STRATEGIES = ("all_gather", "ring")


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share out sequences.

    Attributes:
        group: their process group; None: this process alone.
        strategy: of STRATEGIES.
        attention: of `attention.STRATEGIES`.
        dtype: in which states and transitions travel; they are fp32 before and after.
    """

    order: PieceOrder
    rank: int
    group: dist.ProcessGroup | None = None
    strategy: str = "all_gather"
    attention: str = "all_gather"
    dtype: torch.dtype = torch.float32


def states_before(transition: Tensor | None, state: Tensor, line: SequenceGroup, matrix: bool) -> Tensor:
    """An `StateExchange` that is waited for at once."""
    return StateExchange(line, matrix).begin(transition, state)()


Finish = Callable[[], Tensor]
"""Waits for an exchange: the states before (after, where it ran from the end) this rank's pieces `[P, rows, ...]`."""


class StateExchange:
    """One exchange, which `begin` sends and what it returns waits for. Collective, as are the gradients.

    Begun again, where activations are computed again, it sends nothing: it knows the states, and keeps all that its
    backward pass needs.
    """

    def __init__(self, line: SequenceGroup, matrix: bool = False):
        """`matrix`: transitions are matrices, else elementwise."""
        self.line, self.matrix = line, matrix
        # A transition near 1 loses what it forgets in 16 bits, and after many pieces that is much. Less 1 it does not:
        # sum_m (1 - A_m) prod_(l > m) A_l is at most 1, so the error does not grow with the pieces.
        self.less_one = line.strategy == "all_gather" and line.dtype != torch.float32
        self.finish: Finish | None = None  # of what is on its way, forwards or backwards
        self.kept: Tensor | None = None  # transitions that the backward pass needs
        self.before: Tensor | None = None  # what the exchange found

    def begin(self, transition: Tensor | None, state: Tensor) -> Callable[[], Tensor]:
        """Send this rank's summaries.

        Args:
            transition: `[S, ...]`, see `ops.sequence.Summary`; 0 where what is before does not go on behind. None:
                nowhere does it.
            state: `[S, ...]` fp32 or complex; S: rows, and within a row its pieces in order of time.

        Returns:
            what waits for the states before each of this rank's segments `[S, ...]`, differentiable.
        """
        rows = (None if x is None else x.unflatten(0, (-1, self.line.order.per_rank)) for x in (transition, state))
        started: Tensor = _Start.apply(*(None if x is None else x.transpose(0, 1) for x in rows), self)

        def wait() -> Tensor:
            before: Tensor = _Wait.apply(started, self)
            return before.transpose(0, 1).flatten(0, 1)

        return wait

    def arrived(self) -> Tensor:
        assert self.finish is not None, "an exchange is waited for once, after it began"
        finish, self.finish = self.finish, None  # with it go its buffers
        fill_gap()
        return finish()

    def one(self, like: Tensor) -> Tensor | int:
        return torch.eye(like.shape[-1], device=like.device) if self.matrix else 1

    def step(self, state: Tensor, transition: Tensor | None, carried: Tensor) -> Tensor:
        """`transition carried + state`."""
        if transition is None:
            return state
        if self.less_one:
            state = state + carried
        if not self.matrix:
            return torch.addcmul(state, transition, carried)
        state3, transition3, carried3 = (x.flatten(0, -3) for x in (state, transition, carried))
        return torch.baddbmm(state3, transition3, carried3).view(state.shape)

    def adjoint(self, x: Tensor) -> Tensor:
        return x.mT if self.matrix else x.conj()


class _Start(Function):
    """By piece of this rank: transition `[P, rows, ...]`, state `[P, rows, ...]` -> what `_Wait` waits for.

    The tensor between the two is empty: it says which comes first. What travels is in the exchange. So is what the
    backward pass needs, which is little: recomputation, which drops what autograd saves, shall not need it once more.
    """

    @staticmethod
    def forward(ctx: Any, transition: Tensor | None, state: Tensor, exchange: StateExchange) -> Tensor:
        ctx.exchange, ctx.shape = exchange, None if transition is None else transition.shape
        if exchange.before is None:
            if exchange.line.strategy == "ring":
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
    """See `_Start`: -> the states before `[P, rows, ...]`."""

    @staticmethod
    def forward(ctx: Any, started: Tensor, exchange: StateExchange) -> Tensor:
        ctx.exchange = exchange
        if exchange.before is None:
            exchange.before = exchange.arrived()
        return exchange.before.detach()  # autograd ties what is returned to the graph, which the exchange must not be

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        exchange: StateExchange = ctx.exchange
        assert exchange.before is not None, "an exchange has one backward pass"
        if exchange.line.strategy == "ring":
            transition = None if exchange.kept is None else exchange.adjoint(exchange.kept)
            exchange.finish = _ring(exchange, transition, gradient, reverse=True)
        else:
            exchange.finish = _gather_gradients(exchange, gradient)
        return gradient.new_empty(0), None


def _gather(exchange: StateExchange, transition: Tensor | None, state: Tensor) -> Finish:
    """All summaries in one message; the scan is this rank's own. Transitions of the pieces behind are kept."""
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
    line, kept, arrived = exchange.line, exchange.kept, _from_all([gradient], exchange.line)

    def finish() -> Tensor:
        (gradients,) = arrived()
        behind = () if kept is None else enumerate(kept.unbind(), min(line.order.pieces(line.rank)) + 1)
        transitions = {piece: exchange.adjoint(x) for piece, x in behind}
        return _scan(exchange, transitions, gradients, range(line.order.count - 1, -1, -1))

    return finish


def _scan(exchange: StateExchange, transitions: dict[int, Tensor], states: list[Tensor], pieces: range) -> Tensor:
    """Of all pieces in order `[rows, ...]`, as far as this rank needs -> what comes to its own `[P, rows, ...]`.

    `transitions`: empty if nothing goes on through a piece.
    """
    own = exchange.line.order.pieces(exchange.line.rank)
    found, carried = dict[int, Tensor](), None
    for piece in pieces:
        if piece in own:
            found[piece] = torch.zeros_like(states[piece]) if carried is None else carried
            if len(found) == len(own):
                break
        carried = states[piece] if carried is None else exchange.step(states[piece], transitions.get(piece), carried)
    return torch.stack([found[piece] for piece in own])


def _from_all(parts: Sequence[Tensor], line: SequenceGroup) -> Callable[[], list[list[Tensor]]]:
    """Send `[P, ...]` of this rank, in one message -> a function that waits for all ranks' pieces, in order of time.

    What it gives, in fp32 or complex, are views of one buffer.
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
        found = []
        for x, shape, is_complex in zip(everyones.float().split(sizes, 1), shapes, complex_parts, strict=True):
            x = x.unflatten(1, shape)
            by_rank = (torch.view_as_complex(x) if is_complex else x).unbind()
            found.append([by_rank[n] for n in _in_time(order)])
        return found

    return finish


@cache
def _in_time(order: PieceOrder) -> tuple[int, ...]:
    """Of each piece, its place among those of all ranks."""
    owners = (order.owner(piece) for piece in range(order.count))
    return tuple(rank * order.per_rank + place for rank, place in owners)


def _ring(exchange: StateExchange, transition: Tensor | None, state: Tensor, reverse: bool) -> Finish:
    """`_scan` as a walk from piece to piece, each rank with its own transitions and states `[P, rows, ...]`.

    On a GPU it is queued on a stream of its own. The messages of any two ranks are in the same order on both, and no
    block waits for a later one: so nothing locks up, not even where a rank's messages go strictly one after the other.
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

    The tensors that `stream` reads are arguments so that they live until then: their memory belongs to the current
    stream, which would use it again. `Tensor.record_stream` would not do, because it refuses expanded tensors such as
    S4's transitions. An exchange that is dropped before anyone waits for it gives the memory back too early.
    """
    torch.cuda.current_stream(before.device).wait_stream(stream)
    return before


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _walk(exchange: StateExchange, transition: Tensor | None, state: Tensor, before: Tensor, reverse: bool) -> None:
    """Block by block through own pieces that follow each other, so that the next rank waits for one block only."""
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
        # Where zigzag turns round, the neighbour sends all blocks before it receives one.
        sent += [_send(x, target, line) for x in ready if target is not None]
    for work, _ in sent:
        work.wait()


def _runs(pieces: Sequence[int], step: int) -> list[list[int]]:
    """Those that follow each other together."""
    found: list[list[int]] = []
    for piece in pieces:
        if found and found[-1][-1] + step == piece:
            found[-1].append(piece)
        else:
            found.append([piece])
    return found


def _send(x: Tensor, rank: int, line: SequenceGroup) -> tuple[Any, Tensor]:
    """The running send, and the buffer that must live as long."""
    assert line.group is not None
    buffer = _real(x).to(line.dtype).contiguous()
    return dist.isend(buffer, dist.get_global_rank(line.group, rank), group=line.group), buffer


def _receive(like: Tensor, rank: int, line: SequenceGroup) -> Tensor:
    assert line.group is not None
    buffer = torch.empty(_real(like).shape, dtype=line.dtype, device=like.device)
    dist.recv(buffer, dist.get_global_rank(line.group, rank), group=line.group)
    return torch.view_as_complex(buffer.float()) if like.is_complex() else buffer


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
