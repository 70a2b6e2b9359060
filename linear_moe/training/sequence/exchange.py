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
BLOCKS = 4  # of a state, that a ring passes on one by one


@dataclass(frozen=True)
class Line:
    """The ranks that share out sequences.

    Attributes:
        group: their process group; None: this process alone.
        strategy: of STRATEGIES.
    """

    order: Order
    rank: int
    group: dist.ProcessGroup | None = None
    strategy: str = "all_gather"


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


class _Before(torch.autograd.Function):
    """By piece of this rank: transition `[P, rows, ...]`, state `[P, rows, ...]` -> the states before."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, state: Tensor, line: Line, matrix: bool) -> Tensor:  # type: ignore[override]
        scan = _ring if line.strategy == "ring" else _gathered
        before, kept = scan(line, transition, state, _times(matrix), reverse=False)
        ctx.save_for_backward(transition, before, kept)
        ctx.line, ctx.matrix = line, matrix
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        transition, before, kept = ctx.saved_tensors
        adjoint, times = (lambda a: a.mT if ctx.matrix else a.conj()), _times(ctx.matrix)
        if kept is not None:
            after, _ = _gathered(ctx.line, None, gradient, times, reverse=True, transitions=adjoint(kept))
        else:
            after, _ = _ring(ctx.line, adjoint(transition), gradient, times, reverse=True)
        d_transition = None
        if ctx.needs_input_grad[0]:
            outer = after @ before.mT if ctx.matrix else (after * before.conj()).sum_to_size(transition.shape)
            d_transition = outer
        return d_transition, after, None, None


Times = Callable[[Tensor, Tensor], Tensor]


def _times(matrix: bool) -> Times:
    return torch.matmul if matrix else torch.mul


def _gathered(
    line: Line,
    transition: Tensor | None,
    state: Tensor,
    times: Times,
    reverse: bool,
    transitions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan of what all ranks have, and all transitions `[pieces, rows, ...]`, known already or gathered too."""
    order = line.order
    steps = range(order.count)
    owners = [order.owner(piece) for piece in steps]
    if transitions is None:
        assert transition is not None
        parts = [transition, state]
        found, states = (torch.stack([x[r, j] for r, j in owners]) for x in _all_gather(parts, line))
        transitions = found
    else:
        (gathered,) = _all_gather([state], line)
        states = torch.stack([gathered[r, j] for r, j in owners])
    carried, before = torch.zeros_like(states[0]), [states[0]] * order.count
    for i in reversed(steps) if reverse else steps:
        before[i] = carried
        carried = torch.add(states[i], times(transitions[i], carried))
    return torch.stack([before[i] for i in order.pieces(line.rank)]), transitions


def _all_gather(parts: Sequence[Tensor], line: Line) -> list[Tensor]:
    """Tensors of this rank in one message -> of all ranks, `[ranks, ...]` each."""
    if line.group is None:
        return [part.unsqueeze(0) for part in parts]
    flat = [_real(part).flatten() for part in parts]
    own = torch.cat(flat)
    everywhere = own.new_empty(line.order.size * len(own))
    dist.all_gather_into_tensor(everywhere, own, group=line.group)
    found = everywhere.view(line.order.size, -1).split([len(x) for x in flat], 1)
    return [_like(x, (line.order.size, *part.shape), part) for x, part in zip(found, parts, strict=True)]


def _ring(line: Line, transition: Tensor, state: Tensor, times: Times, reverse: bool) -> tuple[Tensor, None]:
    """The scan as a walk from piece to piece; see `_gathered`."""
    order, rank = line.order, line.rank
    last, step = (0, -1) if reverse else (order.count - 1, 1)
    mine = list(enumerate(order.pieces(rank)))
    blocks = min(BLOCKS, state.shape[-1])
    before, inside = torch.empty_like(state), list[Tensor]()
    sent: list[tuple[Any, Tensor]] = []
    for place, piece in reversed(mine) if reverse else mine:
        own_transitions = _blocks(transition[place], state.shape[-1], blocks, times is torch.matmul)
        own_states, starts = state[place].chunk(blocks, -1), before[place].chunk(blocks, -1)
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
    return before, None


def _blocks(transition: Tensor, width: int, blocks: int, matrix: bool) -> Sequence[Tensor]:
    """The transition of each block of columns."""
    whole = matrix or transition.shape[-1] != width
    return (
        [transition] * len(transition.new_empty(width, device="meta").chunk(blocks))
        if whole
        else transition.chunk(blocks, -1)
    )


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


def _like(flat: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.view_as_complex(flat.reshape(*shape, 2)) if like.is_complex() else flat.reshape(shape)


class AllTokens(torch.autograd.Function):
    """`AllTokens.apply(x, line)`: this rank's pieces `[P, ...]` -> all, `[pieces, ...]`, in order of time. Collective.

    The gradient of a piece is the sum of all ranks'.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:  # type: ignore[override]
        ctx.line = line
        (everywhere,) = _all_gather([x], line)
        return torch.stack([everywhere[line.order.owner(piece)] for piece in range(line.order.count)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        line: Line = ctx.line
        order = line.order
        by_rank = torch.stack([gradient[list(order.pieces(rank))] for rank in range(order.size)])
        if line.group is None:
            return by_rank[0], None
        own = torch.empty_like(by_rank[0])
        dist.reduce_scatter_tensor(own, by_rank.flatten(0, 1), group=line.group)
        return own, None
