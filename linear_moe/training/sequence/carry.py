"""Recurrences that can stop and go on anywhere inside a sequence, with a state carried from piece to piece.

Where a piece is an affine map of the carried state, all pieces get their initial states at once, from an exchange of
summaries. Otherwise every piece waits for the piece before: activations are still shared out over the ranks, but the
ranks compute one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.sequence import Run, Summary, once
from linear_moe.training.sequence.cut import Cut
from linear_moe.training.sequence.exchange import SequenceGroup, StateExchange


@dataclass(frozen=True)
class Stretch:
    """Segments that one call of the recurrence runs: the segments of one piece in all rows, or a packed segment.

    Attributes:
        inputs: `[rows, T, ...]`.
        start: `[sequences, ...]`, initial states of the sequences that begin in this stretch.
        starts: tokens at which sequences begin, the first at 0.
        passed: tokens of the first sequence that lie in earlier pieces; 0: the first sequence begins here.
    """

    inputs: list[Tensor]
    start: Tensor
    starts: tuple[int, ...]
    passed: int

    def begun(self, run: Run, shared: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Runs the sequences that begin in this stretch.

        Returns:
            outputs, and the final state of the last sequence (of every row, if not packed). None: no sequence begins
            in this stretch.
        """
        first = int(self.passed > 0)
        if first == len(self.starts):
            return None
        begin, end = self.starts[first], self.inputs[0].shape[1]
        packed = len(self.starts) > first + 1
        # A tensor on the CPU, whatever device the inputs are on.
        offsets = torch.tensor([n - begin for n in (*self.starts[first:], end)]) if packed else None
        outputs, states = run([x[:, begin:] for x in self.inputs], self.start[first:], None, 0, offsets, *shared)
        return outputs, states[-1:] if packed else states

    def continued(self) -> list[Tensor]:
        """Inputs of the first sequence, which began in an earlier piece."""
        return [x[:, : self.starts[1]] for x in self.inputs] if len(self.starts) > 1 else self.inputs


def stretches(cut: Cut, place: int, inputs: Sequence[Tensor], start: Tensor) -> Iterator[Stretch]:
    """Yields the stretches of piece number `place` of this rank: one of all rows, or one for every packed row."""
    per_rank, length = cut.order.per_rank, cut.length
    passed = [piece * length - begin for begin, (_, piece) in zip(cut.begins, cut.places, strict=True)]
    if not cut.packed:
        rows = slice(place, None, per_rank)
        yield Stretch([x[rows] for x in inputs], start[rows], (0,), passed[place])
        return
    for s in range(place, len(cut.starts), per_rank):
        first = sum(len(starts) for starts in cut.starts[:s])
        own = start[first : first + len(cut.starts[s])]
        yield Stretch([x[:, s * length : (s + 1) * length] for x in inputs], own, cut.starts[s], passed[s])


class Place:
    """One of a rank's pieces, in all rows. Sequences that begin in the piece, and need no other piece, are run at once.

    Args:
        parts: the piece's stretches, in order of rows.
        run, shared: see `ops.sequence.Pieces.carry`.
    """

    def __init__(self, parts: Iterable[Stretch], run: Run, shared: Sequence[Tensor]):
        self.parts, self.run, self.shared = list(parts), run, shared
        self.begun = [part.begun(run, shared) for part in self.parts]

    def summary(self, summary: Summary) -> tuple[Tensor, Tensor]:
        """The piece's summary in every row: transitions and states `[rows, ...]`."""
        summaries = []
        for part, here in zip(self.parts, self.begun, strict=True):
            if here is None:
                summaries.append(summary(*part.inputs, skip=part.passed))
            else:
                heads, size = here[1].shape[1:3]
                summaries.append((here[1].new_zeros(len(here[1]), heads, size, size), here[1]))
        transitions, states = zip(*summaries, strict=True)
        return torch.cat(transitions), torch.cat(states)

    def finish(self, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and final states of all rows, from the states before the piece (None: it is the first of its row)."""
        outputs, states = [], []
        parts = [None] * len(self.parts) if before is None else before.split(len(before) // len(self.parts))
        for part, here, state in zip(self.parts, self.begun, parts, strict=True):
            own, final = [], None
            if part.passed:
                assert state is not None
                o, final = self.run(part.continued(), part.start[:1], state, part.passed, None, *self.shared)
                own.append(o)
            if here is not None:
                o, final = here
                own.append(o)
            assert final is not None
            # Slices without tokens make the outputs depend on `state` and `part.start`, so that both get a gradient, if
            # only zeros: all ranks must take part in the exchange's backward pass and in the parameters' reduction.
            unused = (x for x in (state, part.start) if x is not None)
            own.extend(x.transpose(1, 2)[: len(o), :0].to(o.dtype) for x in unused)
            outputs.append(torch.cat(own, 1))
            states.append(final)
        return torch.cat(outputs), torch.cat(states)


def carry(
    cut: Cut,
    line: SequenceGroup,
    run: Run,
    inputs: Sequence[Tensor],
    start: Tensor,
    shared: Sequence[Tensor],
    count: int,
    summary: Summary | None,
) -> Tensor:
    """Outputs of a recurrence over the rank's pieces, see `ops.sequence.Pieces.carry`. Collective."""
    given = len(inputs)

    def places(*tensors: Tensor) -> list[Place]:
        inputs, start, shared = tensors[:given], tensors[given], tensors[given + 1 :]
        return [Place(stretches(cut, n, inputs, start), run, shared) for n in range(cut.order.per_rank)]

    if summary is None:
        shape = (cut.rows, start.shape[1], count * start.shape[2], start.shape[3])
        outputs = _HandedOver.apply(places, line, shape, *inputs, start, *shared)
    else:
        own = places(*inputs, start, *shared)
        summaries = zip(*(place.summary(summary) for place in own), strict=True)
        transition, state = (torch.stack(x, 1).flatten(0, 1) for x in summaries)
        exchange = once(lambda: StateExchange(line, matrix=True))
        before = exchange.begin(transition, state)().unflatten(0, (cut.rows, -1)).unbind(1)
        outputs = torch.stack([place.finish(x)[0] for place, x in zip(own, before, strict=True)])
    return outputs.transpose(0, 1).reshape(*inputs[0].shape[:2], *outputs.shape[3:])


class _HandedOver(Function):
    """Outputs `[P, ...]` of this rank's pieces `places(*tensors)`, each from the final state of the piece before.

    The backward pass hands gradients of states from piece to piece in the reverse order. It computes the rank's pieces
    again, from the saved states before them: activation recomputation would not know of a graph kept in this function.
    """

    @staticmethod
    def forward(
        ctx: Any, places: Callable[..., list[Place]], line: SequenceGroup, shape: tuple[int, ...], *tensors: Tensor
    ) -> Tensor:
        outputs, before, inside = [], [], torch.empty(0)
        for place, piece in zip(places(*tensors), line.order.pieces(line.rank), strict=True):
            state = None if piece == 0 else _from(piece - 1, line, inside, shape, tensors[0].device)
            output, inside = place.finish(state)
            _to(piece + 1, line, inside)
            before.append(state)
            outputs.append(output)
        ctx.save_for_backward(*before, *tensors)
        ctx.line, ctx.places = line, places
        return torch.stack(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        line: SequenceGroup = ctx.line
        pieces, inside = line.order.pieces(line.rank), torch.empty(0)
        saved = ctx.saved_tensors  # read once: under activation recomputation a second read is an error
        starts = [None if x is None else x.detach().requires_grad_() for x in saved[: len(pieces)]]
        needed = ctx.needs_input_grad[3:]
        leaves = [x.detach().requires_grad_(need) for x, need in zip(saved[len(pieces) :], needed, strict=True)]
        with torch.enable_grad():
            ends = [place.finish(state) for place, state in zip(ctx.places(*leaves), starts, strict=True)]
        for (output, final), state, piece, d_output in reversed(list(zip(ends, starts, pieces, gradient, strict=True))):
            d_final = torch.zeros_like(final)
            if piece < line.order.count - 1:
                d_final = _from(piece + 1, line, inside, final.shape, final.device)
            torch.autograd.backward([output, final], [d_output, d_final])
            if state is not None:
                inside = state.grad
                _to(piece - 1, line, inside)
        return None, None, None, *(x.grad for x in leaves)


def _from(piece: int, line: SequenceGroup, inside: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """Receives the state of `piece` from the rank that owns this piece; `inside`, where the owner is this rank."""
    source = line.order.owner(piece)[0]
    if source == line.rank:
        return inside
    assert line.group is not None
    buffer = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    dist.recv(buffer, dist.get_global_rank(line.group, source), group=line.group)
    return buffer


def _to(piece: int, line: SequenceGroup, x: Tensor) -> None:
    """Sends the state `x` to the rank that owns `piece`, unless this is the owner or there is no such piece."""
    if 0 <= piece < line.order.count and (target := line.order.owner(piece)[0]) != line.rank:
        assert line.group is not None
        dist.send(x.contiguous(), dist.get_global_rank(line.group, target), group=line.group)
