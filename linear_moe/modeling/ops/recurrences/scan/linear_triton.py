"""`linear_scan` in Triton, parallel over time, in fp32.

Each row of a tile walks along a run of tokens with the state of each channel in registers, twice. The first walk starts
from zero and gives the state that the run adds and the share of an earlier state that the run keeps; `_carry` turns
these into the states between runs. The second walk starts from the state before the run. The backward pass does the
same from the end. All rows are one sequence that forgets everything where a document begins, which the kernels see from
the documents' numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.modeling.ops.autograd import Function

RUN = 64  # tokens of a run
UNROLL = tl.constexpr(4)  # steps whose loads are in flight together; divides RUN
TILE = 512  # elements of a tile, 4 for each thread of 4 warps
COLUMNS = 128  # channels of a tile at most
CARRIED = 64  # runs that `_carry` takes at once, in 16 channels


@triton.jit
def _combine(kept_1, state_1, kept_2, state_2):
    return kept_1 * kept_2, kept_2 * state_1 + state_2


@triton.jit
def _document(documents, token, tokens, length):
    """Returns the number of each token's document (or row); -1 before the first token and behind the last one."""
    inside = (token >= 0) & (token < tokens)
    if documents is None:
        return tl.where(inside, token // length, -1)
    else:
        return tl.load(documents + token, mask=inside, other=-1)


@triton.jit
def _at(document, channel, dim):
    """Returns the offsets of the states of documents, or of runs, `[ROWS, COLUMNS]`."""
    return document.to(tl.int64)[:, None] * dim + channel[None, :]


@triton.jit
def _load(x, token, tokens, stride, channel, dim):
    """Loads the rows of tokens, zeros outside."""
    here = ((token >= 0) & (token < tokens))[:, None] & (channel < dim)[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * stride + channel[None, :], mask=here, other=0.0)


@triton.jit
def _load_4(x, token, step: tl.constexpr, tokens, stride, channel, dim):
    """Loads the rows of four tokens before anything is stored: no load is moved ahead of a store."""
    return (
        _load(x, token, tokens, stride, channel, dim),
        _load(x, token + step, tokens, stride, channel, dim),
        _load(x, token + 2 * step, tokens, stride, channel, dim),
        _load(x, token + 3 * step, tokens, stride, channel, dim),
    )


@triton.jit
def _document_4(documents, token, step: tl.constexpr, tokens, length):
    """Returns `_document` of four tokens, loaded like `_load_4`."""
    return (
        _document(documents, token, tokens, length),
        _document(documents, token + step, tokens, length),
        _document(documents, token + 2 * step, tokens, length),
        _document(documents, token + 3 * step, tokens, length),
    )


@triton.jit
def _carry(states, kept, count, dim, BACKWARDS: tl.constexpr, RUNS: tl.constexpr, COLUMNS: tl.constexpr):
    """Replaces the state that every run adds, `states [count, dim]`, by the state after it (BACKWARDS: before it)."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, RUNS)
    state = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, count, RUNS):
        run = start + i
        here = (run < count)[:, None] & (channel < dim)[None, :]
        if BACKWARDS:
            run = count - 1 - run
        at = run.to(tl.int64)[:, None] * dim + channel[None, :]
        share = tl.load(kept + at, mask=here, other=1.0)
        added = tl.load(states + at, mask=here, other=0.0)
        share, reached = tl.associative_scan((share, added), 0, _combine)
        reached += share * state[None, :]
        tl.store(states + at, reached, mask=here)
        state = tl.sum(tl.where((i == RUNS - 1)[:, None], reached, 0.0), axis=0)


@triton.jit
def _forward(
    x, g, initial, documents, states, kept, h, final, tokens, length, dim, stride_x, stride_g, FINISH: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (channel < dim)[None, :]
    start = run * RUN
    between = _at(run, channel, dim)
    if FINISH:
        state = tl.load(states + between - dim, mask=((run > 0) & (start < tokens))[:, None] & inside, other=0.0)
    else:
        state = tl.zeros((ROWS, COLUMNS), tl.float32)
        share = state + 1
    before = _document(documents, start - 1, tokens, length)
    now = _document(documents, start, tokens, length)
    for step in range(0, RUN, UNROLL):
        xs = _load_4(x, start + step, 1, tokens, stride_x, channel, dim)
        gs = _load_4(g, start + step, 1, tokens, stride_g, channel, dim)
        afters = _document_4(documents, start + step + 1, 1, tokens, length)
        for i in tl.static_range(UNROLL):
            token = start + step + i
            added = xs[i].to(tl.float32)
            decay = tl.exp(gs[i].to(tl.float32))
            first = ((now != before) & (token < tokens))[:, None]
            if initial is not None:
                added += decay * tl.load(initial + _at(now, channel, dim), mask=first & inside, other=0.0)
            decay = tl.where(first, 0.0, decay)
            state = decay * state + added
            if FINISH:
                here = (token < tokens)[:, None] & inside
                to = h + token.to(tl.int64)[:, None] * dim + channel[None, :]
                tl.store(to, state.to(h.dtype.element_ty), mask=here)
                tl.store(final + _at(now, channel, dim), state, mask=here & (afters[i] != now)[:, None])
            else:
                share *= decay
            before = now
            now = afters[i]
    if not FINISH:
        tl.store(states + between, state, mask=(start < tokens)[:, None] & inside)
        tl.store(kept + between, share, mask=(start < tokens)[:, None] & inside)


@triton.jit
def _backward(
    dh, dfinal, h, g, initial, documents, states, kept, dx, dg, dinitial, tokens, length, dim, stride_dh, stride_g,
    FINISH: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (channel < dim)[None, :]
    start = run * RUN
    between = _at(run, channel, dim)
    if FINISH:  # the gradient of the state at the run's end, from the tokens behind the run
        state = tl.load(states + between + dim, mask=(start + RUN < tokens)[:, None] & inside, other=0.0)
    else:
        state = tl.zeros((ROWS, COLUMNS), tl.float32)
        share = state + 1
    after = _document(documents, start + RUN, tokens, length)
    now = _document(documents, start + RUN - 1, tokens, length)
    for step in range(0, RUN, UNROLL):
        end = start + RUN - 1 - step
        ds = _load_4(dh, end, -1, tokens, stride_dh, channel, dim)
        gs = _load_4(g, end, -1, tokens, stride_g, channel, dim)
        befores = _document_4(documents, end - 1, -1, tokens, length)
        if FINISH:
            hs = _load_4(h, end - 1, -1, tokens, dim, channel, dim)
        for i in tl.static_range(UNROLL):
            token = end - i
            here = (token < tokens)[:, None] & inside
            first = here & (now != befores[i])[:, None]
            place = _at(now, channel, dim)
            grad = ds[i].to(tl.float32) + state
            decay = tl.exp(gs[i].to(tl.float32))
            if dfinal is not None:
                grad += tl.load(dfinal + place, mask=here & (now != after)[:, None], other=0.0)
            state = decay * grad
            if FINISH:
                at = token.to(tl.int64)[:, None] * dim + channel[None, :]
                previous = tl.where(first, 0.0, hs[i].to(tl.float32))
                if initial is not None:
                    previous += tl.load(initial + place, mask=first, other=0.0)
                    tl.store(dinitial + place, state, mask=first)
                tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=here)
                tl.store(dg + at, (state * previous).to(dg.dtype.element_ty), mask=here)
            else:
                share *= tl.where(first, 0.0, decay)
            state = tl.where(first, 0.0, state)
            after = now
            now = befores[i]
    if not FINISH:
        tl.store(states + between, state, mask=(start < tokens)[:, None] & inside)
        tl.store(kept + between, share, mask=(start < tokens)[:, None] & inside)


def _flat(x: Tensor) -> Tensor:
    """Flattens `x [B, T, D]` to `[B T, D]` with contiguous channels, without a copy where strides allow."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _run(kernel: Any, like: Tensor, *inputs: Any, backwards: bool) -> None:
    """Runs `kernel` on all runs from zero, `_carry` from run to run, and `kernel` again from the states between runs.

    Args:
        like: `[B T, D]`, for sizes and device.
        inputs: the kernel's arguments before, and those after, the states between runs.
    """
    tokens, dim = like.shape
    runs, columns = triton.cdiv(tokens, RUN), min(COLUMNS, triton.next_power_of_2(dim))
    states, kept = torch.empty(2, runs, dim, dtype=torch.float32, device=like.device)
    rows = TILE // columns
    grid = (triton.cdiv(dim, columns), triton.cdiv(runs, rows))
    tile = {"RUN": RUN, "ROWS": rows, "COLUMNS": columns, "num_warps": 4}
    before, after = inputs
    if runs > 1:
        kernel[grid](*before, states, kept, *after, FINISH=False, **tile)
        _carry[(triton.cdiv(dim, 16),)](
            states, kept, runs, dim, BACKWARDS=backwards, RUNS=CARRIED, COLUMNS=16, num_warps=4
        )
    kernel[grid](*before, states, kept, *after, FINISH=True, **tile)


def forward(
    x: Tensor, g: Tensor, initial_state: Tensor | None, documents: Tensor | None, sequences: int
) -> tuple[Tensor, Tensor]:
    """Scans `x, g [B, T, D]`: `h [B, T, D]` in x's dtype and the final state `[sequences, D]` in fp32.

    Args:
        documents: `[B T]` int32, the number of each token's document; None: rows are documents.
    """
    batch, length, dim = x.shape
    inputs, gates = _flat(x), _flat(g)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if initial_state is None:  # `final` starts as the state that empty documents end with
        final = x.new_zeros(sequences, dim, dtype=torch.float32)
    else:
        initial_state = initial_state.contiguous()
        final = initial_state.clone()
    sizes = (batch * length, length, dim, inputs.stride(0), gates.stride(0))
    _run(_forward, inputs, (inputs, gates, initial_state, documents), (h, final, *sizes), backwards=False)
    return h, final


def backward(
    dh: Tensor, dfinal: Tensor | None, h: Tensor, g: Tensor, initial_state: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of x, g and the initial state."""
    batch, length, dim = h.shape
    grads, gates = _flat(dh), _flat(g)
    dx, dg = torch.empty_like(h), torch.empty(g.shape, dtype=g.dtype, device=g.device)
    dfinal = None if dfinal is None else dfinal.contiguous()
    dinitial = None
    if initial_state is not None:  # an empty document's gradient is that of its final state
        initial_state = initial_state.contiguous()
        dinitial = torch.zeros_like(initial_state) if dfinal is None else dfinal.clone()
    sizes = (batch * length, length, dim, grads.stride(0), gates.stride(0))
    before = (grads, dfinal, h, gates, initial_state, documents)
    _run(_backward, grads, before, (dx, dg, dinitial, *sizes), backwards=True)
    return dx, dg, dinitial


class _LinearScan(Function):
    """The autograd function of `linear_scan`.

    It saves the gate and the output, which takes the place of the states in the backward pass: in bf16, the rounding of
    the output enters the gradient of the gate.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, g: Tensor, initial_state: Tensor | None, documents: Tensor | None, sequences: int
    ) -> tuple[Tensor, Tensor]:
        h, final = forward(x, g, initial_state, documents, sequences)
        ctx.save_for_backward(h, g, initial_state, documents)
        ctx.set_materialize_grads(False)
        return h, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        h, g, initial_state, documents = ctx.saved_tensors
        dh = torch.zeros_like(h) if dh is None else dh
        return *backward(dh, dfinal, h, g, initial_state, documents), None, None


def linear_scan(x: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.linear_scan`."""
    documents, sequences = None, len(x)
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[1], device=x.device)
        documents = torch.searchsorted(cu_seqlens, tokens, right=True, out_int32=True) - 1
        sequences = len(cu_seqlens) - 1
    with torch.cuda.device_of(x):  # Triton launches on the current device; autograd sets it in backward
        return _LinearScan.apply(x, g, initial_state, documents, sequences)
