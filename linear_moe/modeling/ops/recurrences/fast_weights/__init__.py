"""Memories whose weights are trained by gradient descent on the tokens: TTT-Linear and Titans.

Both ops take gradients at the weights from which a mini-batch (or chunk) of tokens starts, and count mini-batches from
each document's start. A pass may end inside a mini-batch: the final states hold all that the next token needs to
continue the mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import check_inputs, choose, decodes, requested
from linear_moe.modeling.ops.recurrences.fast_weights import chunk, decode, reference

__all__ = ["IMPLEMENTATIONS", "TITANS", "titans", "ttt"]

IMPLEMENTATIONS = {"reference": reference.ttt, "chunk": chunk.ttt}
TITANS = {"reference": reference.titans, "chunk": chunk.titans}

TTT_UNSUPPORTED = (
    "flash-linear-attention's TTT kernel has a learning rate per reading instead of per written token, adds the "
    "memory's output to itself instead of to the query, and has no backward pass for packed documents"
)
TITANS_UNSUPPORTED = "flash-linear-attention has no kernel for Titans"

States = tuple[Tensor, ...]


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    initial_state: Tensor,
    gradient: Tensor | None = None,
    place: Tensor | None = None,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, States]:
    """TTT-Linear (arXiv 2407.04620): the memory f(x) = x + LN(x W + b) is trained to map k to v.

    In a mini-batch of C tokens that starts from weights W and A = 0, token i writes A and reads the output o:

        A_i = A_{i-1} + rate_i d/dW |f_W(k_i) - v_i|^2 / 2,    o_i = f(q_i) with the weights W - scale_i A_i

    After the mini-batch's last token, W becomes W - scale_{C-1} A. The last row of W is b, the weights of a feature
    that is always 1.

    Args:
        q, k, v: `[B, T, H, D]`.
        rate: `[B, T, H]` inner learning rate of each written token.
        scale: `[C]`, factor of the step by place in the mini-batch (published: 1 / (i + 1) plus a learned change); its
            length is the size of mini-batches.
        weight, bias: `[H, D]`, of the inner LayerNorm.
        initial_state: W, `[N, H, D + 1, D]` fp32; N is B, or the number of documents.
        gradient, place: A, `[B, H, D + 1, D]` fp32, and the place of the first token in its mini-batch, `[B]` int64, to
            continue inside a mini-batch. Both are given, or neither: then the first token starts a mini-batch.
        eps: epsilon of the inner LayerNorm.
        cu_seqlens: `[documents + 1]` int64 offsets of packed documents, B = 1, without `place`; documents may be empty.
        backend: "reference", "chunk" (on any device) or "auto". With T = 1, `place` and gradients disabled, "auto" is
            one step of decoding, which UPDATES the states IN PLACE and returns them; otherwise it is "chunk".

    Returns:
        `o [B, T, H, D]` in v's dtype, and (W, A) after the last token, in fp32; all differentiable in every input. For
        pieces of sequences (`ops.sequence`), the tuple of states is empty.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit.
    """
    _check(q, k, v, {"rate": rate}, initial_state, 1, {"gradient": gradient}, place, cu_seqlens)
    shape = tuple(q.shape[2:])
    if v.shape != q.shape or weight.shape != shape or bias.shape != shape or scale.ndim != 1 or not len(scale):
        raise ValueError(
            f"q and v must be [B, T, H, D], weight and bias [H, D], scale [C], got {tuple(q.shape)}, {tuple(v.shape)}, "
            f"{tuple(weight.shape)}, {tuple(bias.shape)}, {tuple(scale.shape)}"
        )
    inputs, backend = (q, k, v, rate), requested(backend)
    if gradient is not None and place is not None and backend == "auto" and decodes(q.shape[1], gradient, cu_seqlens):
        return decode.ttt(*inputs, scale, weight, bias, state=initial_state, gradient=gradient, place=place, eps=eps)
    implementation = partial(choose(backend, IMPLEMENTATIONS, v, TTT_UNSUPPORTED), eps=eps)
    if (pieces := sequence.current(gradient)) is not None:

        def run(
            x: States, start: Tensor, carried: Tensor | None, skip: int, offsets: Tensor | None, *shared: Tensor
        ) -> tuple[Tensor, Tensor]:
            states = (start, None) if carried is None else carried.chunk(2, 2)
            options: Any = dict(zip(("scale", "weight", "bias"), shared, strict=True))
            o, finals = implementation(*x, *states, skip=skip % len(scale), cu_seqlens=offsets, **options)
            return o, torch.cat(finals, 2)

        return pieces.carry(run, inputs, initial_state, (scale, weight, bias), count=2), ()
    function = partial(implementation, scale=scale, weight=weight, bias=bias, cu_seqlens=cu_seqlens)
    return _by_place(function, inputs, (initial_state, gradient), place)


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    keep: Tensor,
    momentum: Tensor,
    *,
    chunk_size: int,
    initial_state: Tensor,
    surprise: Tensor | None = None,
    start: Tensor | None = None,
    place: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, States]:
    """Titans' neural memory (arXiv 2501.00663), a matrix M, trained with momentum and forgetting to map k to v.

        S_t = exp(momentum_t) S_{t-1} - rate_t d/dM |M^T k_t - v_t|^2 at M_c,    M_t = exp(keep_t) M_{t-1} + S_t,
        o_t = M_t^T q_t

    where M_c is the memory before the first token of the chunk of t (section 3.2). For chunk_size 1, M_c is M_{t-1}.

    Args:
        q, k: `[B, T, H, K]`; v: `[B, T, H, V]`.
        rate: `[B, T, H]`, theta of the paper.
        keep, momentum: `[B, T, H]` logarithms, at most 0 (minus infinity too), of the paper's 1 - alpha and eta.
        chunk_size: number of tokens that share the memory at which gradients are taken.
        initial_state: M, `[N, H, K, V]` fp32; N is B, or the number of documents.
        surprise, start, place: S and the first token's M_c, `[B, H, K, V]` fp32, and the first token's place in its
            chunk, `[B]` int64, to continue inside a chunk. All are given, or none: then S = 0, and the first token
            starts a chunk.
        cu_seqlens, backend: as for `ttt`.

    Returns:
        `o [B, T, H, V]` in v's dtype, and (M, S, M_c of the next token) in fp32; all differentiable in every input. For
        pieces of sequences (`ops.sequence`), the tuple of states is empty.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    gates, states = {"rate": rate, "keep": keep, "momentum": momentum}, {"surprise": surprise, "start": start}
    _check(q, k, v, gates, initial_state, 0, states, place, cu_seqlens)
    inputs, backend = (q, k, v, rate, keep, momentum), requested(backend)
    implementation = partial(choose(backend, TITANS, v, TITANS_UNSUPPORTED), chunk_size=chunk_size)
    if (pieces := sequence.current(start)) is not None:

        def run(
            x: States, start: Tensor, carried: Tensor | None, skip: int, offsets: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            states = (start, torch.zeros_like(start), start) if carried is None else carried.chunk(3, 2)
            o, finals = implementation(*x, *states, skip=skip % chunk_size, cu_seqlens=offsets)
            return o, torch.cat(finals, 2)

        def summary(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, skip: int) -> tuple[Tensor, Tensor]:
            """Computes the `Summary` of M, S and M_c, stacked; all errors are taken at M_c, so the map is affine."""

            def columns(k: Tensor, v: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
                return run((k, k, v, *gates), initial_state, initial_state, skip, None)

            return sequence.affine(columns, k, v, count=3)

        return pieces.carry(run, inputs, initial_state, (), count=3, summary=summary), ()
    if surprise is None or start is None or place is None:
        surprise, start = torch.zeros_like(initial_state), initial_state
    elif backend == "auto" and decodes(q.shape[1], start, cu_seqlens):
        return decode.titans(
            *inputs, chunk_size=chunk_size, state=initial_state, surprise=surprise, start=start, place=place
        )
    return _by_place(partial(implementation, cu_seqlens=cu_seqlens), inputs, (initial_state, surprise, start), place)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor],
    initial_state: Tensor,
    extra_rows: int,
    carried: dict[str, Tensor | None],
    place: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises ValueError for inputs of `ttt` or `titans` whose shapes, dtypes or combination do not fit."""
    check_inputs(q, k, v, {name: (gate, (tuple(q.shape[:3]),)) for name, gate in gates.items()}, None, cu_seqlens)
    batch, _, heads, key_dim = q.shape
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (sequences, heads, key_dim + extra_rows, v.shape[-1])
    for name, state in {"initial_state": initial_state, **carried}.items():
        if state is not None and (tuple(state.shape) != shape or state.dtype != torch.float32):
            raise ValueError(f"{name} must be float32 {shape}, got {state.dtype} {tuple(state.shape)}")
    given = [state is not None for state in (*carried.values(), place)]
    if any(given) and (not all(given) or cu_seqlens is not None):
        raise ValueError(f"{', '.join(carried)} and place go together, and without cu_seqlens")
    if place is not None and (place.shape != (batch,) or place.dtype != torch.int64):
        raise ValueError(f"place must be int64 [B] = {(batch,)}, got {place.dtype} {tuple(place.shape)}")


def _by_place(
    function: Callable[..., tuple[Tensor, States]],
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor | None, ...],
    place: Tensor | None,
) -> tuple[Tensor, States]:
    """Runs `function` on all rows at once if they begin at the same place in their mini-batches, else one by one."""
    places = [0] if place is None else place.tolist()
    if len(set(places)) == 1:
        return function(*inputs, *states, skip=places[0])
    rows = []
    for i, skip in enumerate(places):
        own = (None if x is None else x[i : i + 1] for x in (*inputs, *states))
        rows.append(function(*own, skip=skip))
    outputs, finals = zip(*rows, strict=True)
    return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
