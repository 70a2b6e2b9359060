"""`shift_mix` in two Triton kernels: every input is read about once and every output and gradient written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 64  # tokens and channels of a tile: 16 elements for each thread of 4 warps


@triton.jit
def _has_before(first, token, tokens, length):
    """Whether each token has a token before it in its row or document, `[ROWS]`."""
    if first is None:
        return (token < tokens) & (token % length > 0)
    else:
        return (token < tokens) & (tl.load(first + token, mask=token < tokens, other=0) < token)


@triton.jit
def _round(value, like):
    """Rounds a value to the dtype that the pointer `like` points to, and casts it back to fp32."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _state(state, document, token, tokens, length, channels, channel, follows):
    """Returns pointers to the states of the tokens' rows or documents, and which tokens have that state before them."""
    if document is None:
        sequence = token // length
    else:
        sequence = tl.load(document + token, mask=token < tokens, other=0)
    begins = (token < tokens)[:, None] & (channel < channels) & (follows == 0)
    return state + sequence.to(tl.int64)[:, None] * channels + channel, begins


@triton.jit
def _forward(
    x, share, more, state, first, document, y, tokens, length, channels, stride, stride_i, stride_more,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    row, inside = token.to(tl.int64)[:, None], (token < tokens)[:, None] & (channel < channels)
    follows = _has_before(first, token, tokens, length)[:, None] & (channel < channels)
    now = tl.load(x + row * stride + channel, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(x + (row - 1) * stride + channel, mask=follows, other=0.0).to(tl.float32)
    if state is not None:
        place, begins = _state(state, document, token, tokens, length, channels, channel, follows)
        before += _round(tl.load(place, mask=begins, other=0.0).to(tl.float32), x)
    change = _round(before - now, x)
    if more is not None:
        source = more + row * stride_more + channel  # advances step by step: i * stride_i may overflow
    for i in tl.static_range(COUNT):
        w = tl.load(share + i * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
        if more is not None:
            w = _round(w + tl.load(source, mask=inside, other=0.0).to(tl.float32), x)
            source += stride_i
        to = y + (row + i * tokens) * channels + channel
        tl.store(to, (now + _round(change * w, x)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    d0, d1, d2, d3, d4, d5, x, share, more, state, first, document, dx, dshare, dmore, dstate, tokens, length,
    channels, stride, stride_i, stride_more, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    row, inside = token.to(tl.int64)[:, None], (token < tokens)[:, None] & (channel < channels)
    follows = _has_before(first, token, tokens, length)[:, None] & (channel < channels)
    followed = _has_before(first, token + 1, tokens, length)[:, None] & (channel < channels)
    now = tl.load(x + row * stride + channel, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(x + (row - 1) * stride + channel, mask=follows, other=0.0).to(tl.float32)
    if state is not None:
        place, begins = _state(state, document, token, tokens, length, channels, channel, follows)
        before += _round(tl.load(place, mask=begins, other=0.0).to(tl.float32), x)
    change = _round(before - now, x)
    total, first_total = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    if more is not None:
        source = more + row * stride_more + channel
    for i in tl.static_range(COUNT):
        if i == 0:
            dy = d0
        elif i == 1:
            dy = d1
        elif i == 2:
            dy = d2
        elif i == 3:
            dy = d3
        elif i == 4:
            dy = d4
        else:
            dy = d5
        here = dy + row * channels + channel
        d = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        after = tl.load(here + channels, mask=followed, other=0.0).to(tl.float32)
        w = tl.load(share + i * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
        w_after = w
        if more is not None:
            w_after = _round(w + tl.load(source + stride_more, mask=followed, other=0.0).to(tl.float32), x)
            w = _round(w + tl.load(source, mask=inside, other=0.0).to(tl.float32), x)
            source += stride_i
        total += d * (1 - w) + after * w_after
        first_total += d * w
        dw = d * change
        if more is not None:
            to = dmore + (row + i * tokens) * channels + channel
            tl.store(to, dw.to(dmore.dtype.element_ty), mask=inside)
        partial = dshare + (tl.program_id(0).to(tl.int64) * COUNT + i) * channels + channel
        tl.store(partial, tl.sum(dw, 0)[None, :], mask=channel < channels)
    tl.store(dx + row * channels + channel, total.to(dx.dtype.element_ty), mask=inside)
    if state is not None:
        place, begins = _state(dstate, document, token, tokens, length, channels, channel, follows)
        tl.store(place, first_total.to(dstate.dtype.element_ty), mask=begins)


def _strides(more: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Returns `more [n, B, T, C]` as `[n, B T, C]` with contiguous channels, and its strides along n and tokens."""
    if more is None:
        return None, 0, 0
    flat = more.flatten(1, 2)
    flat = flat if flat.stride(2) == 1 else flat.contiguous()
    return flat, flat.stride(0), flat.stride(1)


def forward(
    x: Tensor,
    share: Tensor,
    more: Tensor | None,
    state: Tensor | None,
    first: Tensor | None,
    document: Tensor | None,
) -> tuple[Tensor, ...]:
    """See `shift_mix.definition`."""
    batch, length, channels = x.shape
    flat, tokens, (more, stride_i, stride_more) = x.reshape(-1, channels).contiguous(), batch * length, _strides(more)
    y = torch.empty(len(share), *x.shape, dtype=x.dtype, device=x.device)
    _forward[(triton.cdiv(tokens, ROWS), triton.cdiv(channels, COLUMNS))](
        flat, share.contiguous(), more, None if state is None else state.contiguous(), first, document, y, tokens,
        length, channels, channels, stride_i, stride_more, len(share), ROWS, COLUMNS, num_warps=4,
    )  # fmt: skip
    return y.unbind()


def backward(
    grads: tuple[Tensor, ...],
    x: Tensor,
    share: Tensor,
    more: Tensor | None,
    state: Tensor | None,
    first: Tensor | None,
    document: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, share, more and state. Sums over tokens are in a fixed order."""
    batch, length, channels = x.shape
    flat, tokens, (source, stride_i, stride_more) = x.reshape(-1, channels).contiguous(), batch * length, _strides(more)
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(channels, COLUMNS))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dmore = None if more is None else torch.empty(more.shape, dtype=more.dtype, device=x.device)
    dshare = torch.empty(grid[0], len(share), channels, dtype=torch.float32, device=x.device)
    state = None if state is None else state.contiguous()
    dstate = None if state is None else torch.zeros_like(state)  # no token writes an empty document's
    pointers = [grad.contiguous() for grad in grads] + [grads[0]] * (6 - len(grads))
    _backward[grid](
        *pointers, flat, share.contiguous(), source, state, first, document, dx, dshare, dmore, dstate, tokens, length,
        channels, channels, stride_i, stride_more, len(share), ROWS, COLUMNS, num_warps=4,
    )  # fmt: skip
    return dx, dshare.sum(0).to(share.dtype), dmore, dstate, None, None
