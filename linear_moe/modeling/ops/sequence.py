"""What an op does where its tokens are pieces of longer sequences, whose other pieces other processes hold.

Ops that carry something from token to token ask the pieces of the running forward pass for what comes before theirs:
recurrences for the state, convolutions and token shifts for inputs, softmax attention for keys and values. Mixers know
nothing of it. Where there are no pieces, which is everywhere but in training with parallel.sequence or .sequence_pieces
above 1, nothing asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Summary = Callable[..., tuple[Tensor | None, Tensor]]
"""`summary(*inputs) -> (transition, state)` of rows `[N, T, ...]`: after them, a state that was S before is transition
S + state. The transition has as many dimensions as the state and is multiplied element by element (both may be
complex), or it is a matrix `[N, ..., K, K]` for a state `[N, ..., K, V]`, multiplied from the left. None: nothing of S
is left."""


Run = Callable[..., tuple[Tensor, Tensor]]
"""`run(inputs, start, carried, skip, cu_seqlens, *shared) -> (outputs, states)` of a recurrence on `[N, T, ...]`: from
`start`, or from the state `carried` that `skip` tokens have left, to that after the last token, `[N, H, K, V]`."""

FromState = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`run(initial_state) -> (o, final_state)`: an op on local sequences, everything else given."""

Gradient = Callable[..., Tensor]
"""`gradient(*inputs, d_o) -> d_state`: of rows' initial states, from the gradient of their outputs `[N, T, ...]` alone.
What follows the rows is not in it."""

Expand = Callable[..., tuple[Tensor, Tensor]]
"""`expand(*shared) -> (k [B, S, G, D], v [B, S, G, V])` of tensors `[B, S, ...]`, each token by itself."""


class Pieces(Protocol):
    """What ops know of `training/sequence`. Sequences are the rows of a forward pass, or its packed documents.

    Attributes:
        numbers: int64 `[N]`, which of all processes' sequences each local one is part of.
        sequences: how many these are.
        tokens: of all processes, without padding.
    """

    sequences: int
    tokens: int

    @property
    def numbers(self) -> Tensor: ...

    @property
    def length(self) -> int:
        """Tokens of a piece."""
        ...

    @property
    def packed(self) -> bool:
        """Whether pieces may hold several sequences; else they are the rows."""
        ...

    def states(self, summary: Summary, *inputs: Tensor | None, matrix: bool = False) -> Tensor:
        """The initial state of every local sequence `[N, ...]` from `summary` of inputs `[B, T, ...]`, differentiable.

        Collective: every process must call it, in the same order.
        """
        ...

    def carry(
        self,
        run: Run,
        inputs: Sequence[Tensor],
        start: Tensor,
        shared: Sequence[Tensor],
        count: int,
        summary: Summary | None = None,
    ) -> Tensor:
        """The outputs of a recurrence that may go on anywhere inside a sequence, differentiable. Collective.

        Args:
            run: the recurrence.
            inputs: `[B, T, ...]` of the local tokens.
            start: `[N, H, K, V]`, what every local sequence starts from if it begins here.
            shared: other tensors that it depends on, alike in all pieces.
            count: a state is as large as so many of `start` stacked, `[N, H, count * K, V]`.
            summary: `summary(*inputs, skip=)`, where the recurrence is affine in its state; None: it is not, and pieces
                are computed one after the other.
        """
        ...

    def all_tokens(self, x: Tensor) -> Tensor:
        """`x [B * T, ...]` of the local tokens -> of all, row by row in order of time; no gradients. Collective."""
        ...

    def own_tokens(self, x: Tensor) -> Tensor:
        """Undoes `all_tokens`."""
        ...

    def through(
        self, run: FromState, summary: tuple[Any, ...], gradient: tuple[Any, ...], matrix: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`run` from the initial states that `states` would give, without a gradient through the summary.

        The final state of a piece is that of its last sequence, whatever comes before: so its gradient, which is sent
        back by the pieces behind, is all that they have to say to the op's own backward pass. It is known once
        `gradient` of each piece is. Cheaper than a backward pass of the summary beside the op's. Collective.

        Args:
            summary: a `Summary`, and its inputs `[B, T, ...]` or None.
            gradient: a `Gradient`, and its inputs but the last, which are kept for the backward pass.
        """
        ...

    def attention(
        self,
        q: Tensor,
        shared: tuple[Tensor, ...],
        expand: Expand,
        parameters: Sequence[Tensor],
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Causal softmax attention `[B, T, H, V]` of local queries `[B, T, H, D]`, differentiable. Collective.

        Args:
            shared: what keys and values are made of, `[B, T, ...]` of the local tokens: what processes exchange.
            expand: makes them.
            parameters: those that `expand` uses.
            scale, window: see `ops.softmax.softmax_attention`.
        """
        ...


_pieces: ContextVar[Pieces | None] = ContextVar("pieces", default=None)


@contextmanager
def pieces_of(pieces: Pieces | None) -> Iterator[None]:
    """Within it, tokens are these pieces; with None, whole sequences."""
    token = _pieces.set(pieces)
    try:
        yield
    finally:
        _pieces.reset(token)


_once: ContextVar[Callable[[Callable[[], Any]], Any]] = ContextVar("once", default=lambda function: function())


@contextmanager
def once_by(function: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Within it, that is what `once` does."""
    token = _once.set(function)
    try:
        yield
    finally:
        _once.reset(token)


def once(function: Callable[[], T]) -> T:
    """`function()`, or what it was the first time, where activations are computed again."""
    found: T = _once.get()(function)
    return found


def current(initial_state: Tensor | None = None) -> Pieces | None:
    """The pieces that the op which asks must take care of; None: its tokens are whole sequences.

    Raises:
        ValueError: it was given an initial state, as when decoding: pieces have their own.
    """
    pieces = _pieces.get()
    if pieces is not None and initial_state is not None:
        raise ValueError(
            "pieces of sequences (parallel.sequence > 1) take no initial state: theirs is what comes before"
        )
    return pieces


def affine(
    op: Callable[..., tuple[Tensor, Tensor]], k: Tensor, v: Tensor, *inputs: Any, count: int = 1
) -> tuple[Tensor, Tensor]:
    """The summary of any op whose state `[N, H, K, V]` is multiplied by a matrix from the left, by running it once.

    Values and what becomes of an initial state are columns beside each other: those of the identity become the
    transition, if nothing is written to them.

    Args:
        op: `op(k, v, *inputs, initial_state=...) -> (_, final_state)`.
        k: `[N, T, ..., H, K]`.
        v: `[N, T, ..., H, V]`.
        count: matrices of K rows that the state stacks.
    """
    rows, heads, keys, values = k.shape[0], k.shape[-2], count * k.shape[-1], v.shape[-1]
    start = torch.eye(keys, values + keys, device=v.device).roll(values, -1).expand(rows, heads, -1, -1)
    columns = torch.cat([v, v.new_zeros(*v.shape[:-1], keys)], -1)
    _, final = op(k, columns, *inputs, initial_state=start.contiguous())
    state, transition = final.split([values, keys], -1)
    return transition, state


def start_gradient(run: FromState, start: Tensor, d_o: Tensor) -> Tensor:
    """The `Gradient` of any op, by running it once from `start`, zeros."""
    with torch.enable_grad():
        start = start.requires_grad_()
        o, _ = run(start)
    (found,) = torch.autograd.grad(o, start, d_o)
    return found


def gradient_by_running(op: Callable[..., Any], scale: float, *inputs: Any) -> Tensor:
    """The `Gradient` of `op(q, k, v, ..., scale=, initial_state=, cu_seqlens=)` with a state `[N, H, K, V]`."""
    *given, d_o = inputs
    q, v = given[0], given[2]
    start = q.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[-1], dtype=torch.float32)
    run = partial(op, *given, scale=scale, cu_seqlens=None)
    return start_gradient(lambda state: run(initial_state=state), start, d_o)


def remaining(g: Tensor) -> tuple[Tensor, Tensor]:
    """What the log-decays `g [N, T, ...]` leave: of each token's write at the end `[N, T, ...]`, of a state from before
    `[N, ...]`; fp32. Sums from the end, no differences: exact for any g <= 0, minus infinity too."""
    sums = g.float().flip(1).cumsum(1).flip(1)
    after = torch.cat([sums[:, 1:], torch.zeros_like(sums[:, :1])], 1)
    return after.exp(), sums[:, 0].exp()
