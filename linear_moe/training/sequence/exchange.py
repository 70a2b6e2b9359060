"""The states before every piece, from the summaries of all: S_before(i + 1) = A_i S_before(i) + E_i, over ranks.

Two strategies give the same numbers. `all_gather`: one collective of all summaries, then every rank scans them by
itself; a rank receives as much as there are pieces. `ring`: states go from piece to piece, in blocks so that ranks work
at the same time; what a rank sends and receives does not depend on the number of ranks, and transitions stay at home.

The backward pass is the same scan from the end: with d the gradients of the states before, G_i = d_(i+1) + A_(i+1)^H
G_(i+1) are those of E_i, and G_i S_before(i)^H those of A_i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.training.sequence.layout import Order

STRATEGIES = ("all_gather", "ring")
BLOCKS = 4  # of a state's columns, that a ring passes on one by one


@dataclass(frozen=True)
class Line:
    """The ranks that share out sequences.

    Attributes:
        group: their process group; None: this process alone.
        strategy: of STRATEGIES.
        attention: of `attention.STRATEGIES`.
    """

    order: Order
    rank: int
    group: dist.ProcessGroup | None = None
    strategy: str = "all_gather"
    attention: str = "all_gather"


def states_before(transition: Tensor, state: Tensor, line: Line, matrix: bool) -> Tensor:
    """Summaries of this rank's segments -> the states before each. Collective, as is the gradient.

    Args:
        transition: `[S, ...]`, see `ops.sequence.Summary`; 0 where what is before does not go on behind.
        state: `[S, ...]`; S: rows, and within a row its pieces in order of time.
        matrix: the transition is one, else elementwise.
    """
    per_rank = line.order.per_rank
    pieces = (x.unflatten(0, (-1, per_rank)).transpose(0, 1) for x in (transition, state))
    before: Tensor = _Before.apply(*pieces, line, matrix)
    return before.transpose(0, 1).flatten(0, 1)


Times = Callable[[Tensor, Tensor], Tensor]


class _Before(torch.autograd.Function):
    """By piece of this rank: transition `[P, rows, ...]`, state `[P, rows, ...]` -> the states before."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, state: Tensor, line: Line, matrix: bool) -> Tensor:  # type: ignore[override]
        times: Times = torch.matmul if matrix else torch.mul
        everyones = None
        if line.strategy == "ring":
            before = _ring(line, transition, state, times, reverse=False)
        else:
            everyones, states = _all_pieces([transition, state], line)
            before = _scan(line, everyones, states, times, reverse=False)
        ctx.save_for_backward(transition, before, everyones)
        ctx.line, ctx.times = line, times
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        transition, before, everyones = ctx.saved_tensors
        line, times, matrix = ctx.line, ctx.times, ctx.times is torch.matmul

        def adjoint(x: Tensor) -> Tensor:
            return x.mT if matrix else x.conj()

        if everyones is None:
            after = _ring(line, adjoint(transition), gradient, times, reverse=True)
        else:
            (gradients,) = _all_pieces([gradient], line)
            after = _scan(line, adjoint(everyones), gradients, times, reverse=True)
        if not ctx.needs_input_grad[0]:
            return None, after, None, None
        d_transition = times(after, adjoint(before))
        return d_transition if matrix else d_transition.sum_to_size(transition.shape), after, None, None


def _scan(line: Line, transitions: Tensor, states: Tensor, times: Times, reverse: bool) -> Tensor:
    """Of all pieces `[pieces, rows, ...]` -> the states before this rank's (reverse: after) `[P, rows, ...]`."""
    steps = range(line.order.count)
    carried, found = torch.zeros_like(states[0]), [states[0]] * line.order.count
    for i in reversed(steps) if reverse else steps:
        found[i] = carried
        carried = torch.add(states[i], times(transitions[i], carried))
    return torch.stack([found[i] for i in line.order.pieces(line.rank)])


def _all_pieces(parts: Sequence[Tensor], line: Line) -> list[Tensor]:
    """`[P, ...]` of this rank, in one message -> of all ranks `[pieces, ...]`, in order of time."""
    order = line.order
    owners = [order.owner(piece) for piece in range(order.count)]
    if line.group is None:
        assert order.size == 1
        return list(parts)
    flat = [_real(part).flatten() for part in parts]
    own = torch.cat(flat)
    everywhere = own.new_empty(order.size * len(own))
    dist.all_gather_into_tensor(everywhere, own, group=line.group)
    gathered = everywhere.view(order.size, -1).split([len(x) for x in flat], 1)
    found = []
    for x, part in zip(gathered, parts, strict=True):
        shape = (order.size, *_real(part).shape)
        by_piece = torch.stack([x.reshape(shape)[owner] for owner in owners])
        found.append(torch.view_as_complex(by_piece) if part.is_complex() else by_piece)
    return found


def _ring(line: Line, transition: Tensor, state: Tensor, times: Times, reverse: bool) -> Tensor:
    """`_scan` as a walk from piece to piece, each rank with its own transitions and states `[P, rows, ...]`."""
    order, rank = line.order, line.rank
    last, step = (0, -1) if reverse else (order.count - 1, 1)
    mine = list(enumerate(order.pieces(rank)))
    before, inside = torch.empty_like(state), list[Tensor]()
    sent: list[tuple[Any, Tensor]] = []
    for place, piece in reversed(mine) if reverse else mine:
        own_states, starts = state[place].chunk(BLOCKS, -1), before[place].chunk(BLOCKS, -1)
        by_column = times is torch.mul and transition.shape[-1] == state.shape[-1]
        own_transitions = transition[place].chunk(BLOCKS, -1) if by_column else [transition[place]] * len(starts)
        first = piece == (order.count - 1 if reverse else 0)
        source = None if first else order.owner(piece - step)[0]
        target = None if piece == last else order.owner(piece + step)[0]
        left, inside = inside, []
        for n, (a, e, start) in enumerate(zip(own_transitions, own_states, starts, strict=True)):
            if source is None:
                start.zero_()
            else:
                start.copy_(left[n] if source == rank else _receive(e, source, line))
            if target is None:
                continue
            carried = torch.add(e, times(a, start))
            if target == rank:
                inside.append(carried)
            else:
                sent.append(_send(carried, target, line))
    for work, _ in sent:
        work.wait()
    return before


def _send(x: Tensor, rank: int, line: Line) -> tuple[Any, Tensor]:
    """The running send, and the buffer that must live as long."""
    assert line.group is not None
    buffer = _real(x).contiguous()
    return dist.isend(buffer, dist.get_global_rank(line.group, rank), group=line.group), buffer


def _receive(like: Tensor, rank: int, line: Line) -> Tensor:
    assert line.group is not None
    buffer = torch.empty_like(_real(like), memory_format=torch.contiguous_format)
    dist.recv(buffer, dist.get_global_rank(line.group, rank), group=line.group)
    return torch.view_as_complex(buffer) if like.is_complex() else buffer


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
