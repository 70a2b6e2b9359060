"""The interface through which ops work on pieces of sequences, whose other pieces may be on other ranks.

An op that carries something from token to token asks the pieces of the running forward pass for what precedes its own
tokens: a recurrence for the state, a convolution or token shift for inputs, softmax attention for keys and values.
Mixers take no part in this. Pieces exist only in training with parallel.sequence or parallel.sequence_pieces above 1;
elsewhere an op's tokens are whole sequences.
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
"""Function `summary(*inputs) -> (transition, state)` of rows of tokens `[N, T, ...]`: the rows take a state S to
transition S + state. The transition has as many dimensions as the state and is multiplied element by element (both may
be complex), or it is a matrix `[N, ..., K, K]`, multiplied from the left to a state `[N, ..., K, V]`. A transition of
None means that nothing of S is left after the rows."""


Run = Callable[..., tuple[Tensor, Tensor]]
"""Function `run(inputs, start, carried, skip, cu_seqlens, *shared) -> (outputs, states)` that runs a recurrence on
inputs `[N, T, ...]`, from `start` or, if `carried` is given, from the state `carried` that the `skip` earlier tokens of
the sequence have left. It returns the outputs and the states after the last tokens (see `Pieces.carry`)."""

FromState = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function `run(initial_state) -> (o, final_state)`: an op on the local sequences, whose other inputs are fixed."""

Gradient = Callable[..., Tensor]
"""Function `gradient(*inputs, d_o) -> d_state`: the part of the gradient of rows' initial states that comes from the
gradient `d_o [N, T, ...]` of the rows' own outputs, without the part that comes from tokens behind the rows."""

Expand = Callable[..., tuple[Tensor, Tensor]]
"""Function `expand(*shared) -> (k [B, S, G, D], v [B, S, G, V])` of tensors `[B, S, ...]`, each token by itself."""


class Pieces(Protocol):
    """The pieces of sequences that a process holds, as ops see them; `training/sequence` implements this protocol.

    A sequence is a row of the micro-batch, or one of its packed documents. A local sequence is the part of one that
    lies in one local piece. "All" refers to the processes that share out the sequences.

    Attributes:
        numbers: `[N]` int64, for each local sequence the number, among all sequences, of the one that it is part of.
        sequences: number of all sequences.
        tokens: number of all tokens, without padding.
    """

    sequences: int
    tokens: int

    @property
    def numbers(self) -> Tensor: ...

    @property
    def length(self) -> int:
        """Number of tokens of a piece, with padding."""
        ...

    @property
    def packed(self) -> bool:
        """Whether a piece may hold several sequences (packed documents); otherwise each local row is one piece."""
        ...

    def states(self, summary: Summary, *inputs: Tensor | None, matrix: bool = False) -> Tensor:
        """Returns the initial state of every local sequence, `[N, ...]`, from the summaries of the pieces before it.

        The result is differentiable. Collective: every process must make this call, in the same order.

        Args:
            summary: the `Summary` of local tokens.
            inputs: the arguments of `summary`, `[B, T, ...]` of the local tokens, or None.
            matrix: whether the transitions of `summary` are matrices.
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
        """Returns the outputs of a recurrence that can be continued from any token of a sequence, differentiable.

        Collective: every process must make this call, in the same order.

        Args:
            run: the recurrence.
            inputs: `[B, T, ...]` of the local tokens.
            start: `[N, H, K, V]`, the state from which a local sequence starts if its first token is the whole
                sequence's.
            shared: other tensors that the recurrence depends on, the same in all pieces.
            count: number of tensors of the size of `start` that a state stacks: `[N, H, count * K, V]`.
            summary: `summary(*inputs, skip=)` if the recurrence is affine in its state. None: it is not, and the pieces
                are computed one after the other.
        """
        ...

    def all_tokens(self, x: Tensor) -> Tensor:
        """Gathers `x [B * T, ...]` of the local tokens to that of all tokens, row by row in order of time.

        The result has no gradients. Collective: every process must make this call, in the same order.
        """
        ...

    def own_tokens(self, x: Tensor) -> Tensor:
        """Returns the local tokens' share of `x`, which is ordered as the result of `all_tokens`."""
        ...

    def through(
        self, run: FromState, summary: tuple[Any, ...], gradient: tuple[Any, ...], matrix: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns the result of `run` from the initial states that `states` would give.

        No backward pass goes through the summary. The pieces behind depend on a piece only through the final state of
        its last sequence, so the gradient of this final state is all that they contribute to the op's own backward
        pass. They can send it back as soon as every piece has computed its `gradient`. This costs less than a backward
        pass of the summary in addition to the op's. Collective: every process must make this call, in the same order.

        Args:
            run: the op on the local sequences.
            summary: a `Summary`, followed by its inputs `[B, T, ...]` or None.
            gradient: a `Gradient`, followed by its inputs except `d_o`; these are kept for the backward pass.
            matrix: whether the transitions of `summary` are matrices.
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
        """Returns the causal softmax attention `[B, T, H, V]` of the local queries, differentiable.

        Collective: every process must make this call, in the same order.

        Args:
            q: `[B, T, H, D]`, the local queries.
            shared: tensors `[B, T, ...]` of the local tokens from which keys and values are computed. The processes
                exchange these.
            expand: computes keys and values from `shared`.
            parameters: the parameters that `expand` uses.
            scale, window: see `ops.attention.softmax.softmax_attention`.
        """
        ...


_pieces: ContextVar[Pieces | None] = ContextVar("pieces", default=None)


@contextmanager
def pieces_of(pieces: Pieces | None) -> Iterator[None]:
    """Declares that, within the context, the tokens of ops are those of `pieces`; None: they are whole sequences."""
    token = _pieces.set(pieces)
    try:
        yield
    finally:
        _pieces.reset(token)


_once: ContextVar[Callable[[Callable[[], Any]], Any]] = ContextVar("once", default=lambda function: function())


@contextmanager
def once_by(function: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Makes `once` go through `function` within the context."""
    token = _once.set(function)
    try:
        yield
    finally:
        _once.reset(token)


def once(function: Callable[[], T]) -> T:
    """Returns `function()`, or, where activations are computed again, the result of the first computation's call."""
    result: T = _once.get()(function)
    return result


def current(initial_state: Tensor | None = None) -> Pieces | None:
    """Returns the pieces that the calling op has to work on; None: its tokens are whole sequences.

    Args:
        initial_state: the initial state that the op was given.

    Raises:
        ValueError: the op was given an initial state, as in decoding, although pieces get theirs from earlier pieces.
    """
    pieces = _pieces.get()
    if pieces is not None and initial_state is not None:
        raise ValueError(
            "pieces of sequences (parallel.sequence or parallel.sequence_pieces above 1) take no initial state: they "
            "get it from the pieces before them"
        )
    return pieces


def affine(
    op: Callable[..., tuple[Tensor, Tensor]], k: Tensor, v: Tensor, *inputs: Any, count: int = 1
) -> tuple[Tensor, Tensor]:
    """Computes the summary of an op whose state `[N, H, K, V]` is multiplied by a matrix from the left.

    One run of the op gives both: the state has V columns that start from zero and get the values, and K more columns
    that start from the identity and get values of zero. The latter end as the transition.

    Args:
        op: `op(k, v, *inputs, initial_state=...) -> (_, final_state)`.
        k: `[N, T, ..., H, K]`.
        v: `[N, T, ..., H, V]`.
        inputs: further arguments of `op`.
        count: number of matrices of K rows that the state stacks.

    Returns:
        Transition `[N, H, count * K, count * K]` and state `[N, H, count * K, V]`.
    """
    rows, heads, keys, values = k.shape[0], k.shape[-2], count * k.shape[-1], v.shape[-1]
    start = torch.eye(keys, values + keys, device=v.device).roll(values, -1).expand(rows, heads, -1, -1)
    columns = torch.cat([v, v.new_zeros(*v.shape[:-1], keys)], -1)
    _, final = op(k, columns, *inputs, initial_state=start.contiguous())
    state, transition = final.split([values, keys], -1)
    return transition, state


def start_gradient(run: FromState, start: Tensor, d_o: Tensor) -> Tensor:
    """Computes the `Gradient` of any op by running it once, with autograd.

    Args:
        run: the op as a function of its initial state.
        start: an initial state of zeros.
        d_o: the gradient of the op's outputs.
    """
    with torch.enable_grad():
        start = start.requires_grad_()
        o, _ = run(start)
    (d_start,) = torch.autograd.grad(o, start, d_o)
    return d_start


def gradient_by_running(op: Callable[..., Any], scale: float, *inputs: Any) -> Tensor:
    """Computes the `Gradient` of `op(q, k, v, ..., scale=, initial_state=, cu_seqlens=)` by running it once.

    Args:
        op: an op with a state `[N, H, K, V]`.
        inputs: q, k, v and the op's further inputs, then the gradient of its outputs.
    """
    *given, d_o = inputs
    q, v = given[0], given[2]
    start = q.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[-1], dtype=torch.float32)
    run = partial(op, *given, scale=scale, cu_seqlens=None)
    return start_gradient(lambda state: run(initial_state=state), start, d_o)


def remaining(g: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the factors by which the log-decays `g [N, T, ...]` shrink earlier contents until the end of the rows.

    The first result `[N, T, ...]` is the factor of each token's write, the second `[N, ...]` that of a state from
    before the rows; fp32. The logarithms are summed from the end, without differences of sums, so the factors are exact
    for any g <= 0, minus infinity too.
    """
    sums = g.float().flip(1).cumsum(1).flip(1)
    after = torch.cat([sums[:, 1:], torch.zeros_like(sums[:, :1])], 1)
    return after.exp(), sums[:, 0].exp()
