"""Mamba's selective scan in two Triton kernels, in fp32.

A program takes one document and a few channels through time, BLOCK tokens at once: an associative scan within a block,
the state in registers between blocks. The forward kernel stores the states before every block, and the backward kernel
computes the states within blocks again. The gradients of B and C are sums over channels: each program writes its part.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.recurrences.scan.chunk import BLOCK

TILE = 8192  # elements of a block's states, 32 for each thread of 8 warps
WARPS = 8


@triton.jit
def _combine(decay_1, value_1, decay_2, value_2):
    return decay_1 * decay_2, decay_2 * value_1 + value_2


@triton.jit
def _document(cu_seqlens, blocks, T, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Returns first token and end of this program's document, and the number of blocks in the documents before it."""
    n = tl.program_id(1).to(tl.int64)
    if PACKED:
        return tl.load(cu_seqlens + n), tl.load(cu_seqlens + n + 1), tl.load(blocks + n)
    else:
        return n * T, n * T + T, n * tl.cdiv(T, BLOCK)


@triton.jit
def _decays(dt, A):
    """Returns the decays `[t, d, s]` of `dt [t, d]` and `A [d, s]`."""
    return tl.exp(dt[:, :, None] * A[None, :, :])


@triton.jit
def _updates(dt, u, B):
    """Returns the updates of the state, `[t, d, s]`, by `dt, u [t, d]` and `B [t, s]`."""
    return (dt * u)[:, :, None] * B[:, None, :]


@triton.jit
def _forward(
    u, dt, A, B, C, initial_state, y, final_state, saved, cu_seqlens, blocks, T, D, S,
    BLOCK: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    start, end, block = _document(cu_seqlens, blocks, T, BLOCK, PACKED)
    t = tl.arange(0, BLOCK)
    d, s = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BS)
    inside = (d < D)[:, None] & (s < S)[None, :]
    place = d[:, None] * S + s[None, :]  # offsets within [D, S]
    document = tl.program_id(1).to(tl.int64) * D * S
    rates = tl.load(A + place, mask=inside, other=0.0)
    h = tl.load(initial_state + document + place, mask=inside, other=0.0)
    for first in range(start, end, BLOCK):
        tl.store(saved + block * D * S + place, h, mask=inside)
        block += 1
        tokens = first + t
        by_channel = tokens[:, None] * D + d[None, :]
        by_state = tokens[:, None] * S + s[None, :]
        channels = (tokens < end)[:, None] & (d < D)[None, :]
        states_ = (tokens < end)[:, None] & (s < S)[None, :]
        # behind the end dt is 0: no decay, no update
        steps = tl.load(dt + by_channel, mask=channels, other=0.0).to(tl.float32)
        inputs = tl.load(u + by_channel, mask=channels, other=0.0).to(tl.float32)
        writes = tl.load(B + by_state, mask=states_, other=0.0).to(tl.float32)
        reads = tl.load(C + by_state, mask=states_, other=0.0).to(tl.float32)
        updates = _updates(steps, inputs, writes)
        kept, states = tl.associative_scan((_decays(steps, rates), updates), 0, _combine)
        states += kept * h[None, :, :]
        tl.store(y + by_channel, tl.sum(states * reads[:, None, :], axis=2), mask=channels)
        h = tl.sum(tl.where((t == BLOCK - 1)[:, None, None], states, 0.0), axis=0)
    tl.store(final_state + document + place, h, mask=inside)


@triton.jit
def _backward(
    u, dt, A, B, C, saved, dy, dfinal, du, ddt, dA, dB, dC, dinitial, cu_seqlens, blocks, total, T, D, S,
    BLOCK: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    start, end, block = _document(cu_seqlens, blocks, T, BLOCK, PACKED)
    t = tl.arange(0, BLOCK)
    d, s = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BS)
    inside = (d < D)[:, None] & (s < S)[None, :]
    place = d[:, None] * S + s[None, :]
    document = tl.program_id(1).to(tl.int64) * D * S
    rates = tl.load(A + place, mask=inside, other=0.0)
    carried = tl.load(dfinal + document + place, mask=inside, other=0.0)  # gradient of the state after the block
    drates = tl.zeros((BD, BS), tl.float32)
    part = tl.program_id(0).to(tl.int64) * total * S
    count = tl.cdiv(end - start, BLOCK)
    for i in range(0, count):
        j = count - 1 - i
        tokens = start + j * BLOCK + t
        by_channel = tokens[:, None] * D + d[None, :]
        by_state = tokens[:, None] * S + s[None, :]
        channels = (tokens < end)[:, None] & (d < D)[None, :]
        states_ = (tokens < end)[:, None] & (s < S)[None, :]
        steps = tl.load(dt + by_channel, mask=channels, other=0.0).to(tl.float32)
        inputs = tl.load(u + by_channel, mask=channels, other=0.0).to(tl.float32)
        writes = tl.load(B + by_state, mask=states_, other=0.0).to(tl.float32)
        reads = tl.load(C + by_state, mask=states_, other=0.0).to(tl.float32)
        grad = tl.load(dy + by_channel, mask=channels, other=0.0).to(tl.float32)
        before = tl.load(saved + (block + j) * D * S + place, mask=inside, other=0.0)
        # a_t h_{t-1} is scanned by itself, from the updates of the tokens before: computed as h_t minus a large update,
        # it would have no digits left
        within = (t > 0)[:, None]
        last_steps = tl.load(dt + by_channel - D, mask=channels & within, other=0.0).to(tl.float32)
        last_inputs = tl.load(u + by_channel - D, mask=channels & within, other=0.0).to(tl.float32)
        last_writes = tl.load(B + by_state - S, mask=states_ & within, other=0.0).to(tl.float32)
        decays = _decays(steps, rates)
        arriving = decays * _updates(last_steps, last_inputs, last_writes)
        kept, decayed = tl.associative_scan((decays, arriving), 0, _combine)
        decayed += kept * before[None, :, :]
        dread = tl.sum((decayed + _updates(steps, inputs, writes)) * grad[:, :, None], axis=1)
        tl.store(dC + part + by_state, dread.to(dC.dtype.element_ty), mask=states_)
        # dh_t = C_t dy_t + a_{t+1} dh_{t+1}, where the gradient from behind the block enters at the block's last token
        behind = ((t + 1 < BLOCK) & (tokens + 1 < end))[:, None] & (d < D)[None, :]
        next_steps = tl.load(dt + by_channel + D, mask=behind, other=0.0).to(tl.float32)
        direct = grad[:, :, None] * reads[:, None, :]
        kept, dh = tl.associative_scan((_decays(next_steps, rates), direct), 0, _combine, reverse=True)
        dh += kept * carried[None, :, :]
        carried = tl.sum(tl.where((t == 0)[:, None, None], decays * dh, 0.0), axis=0)
        dwrite = tl.sum(dh * (steps * inputs)[:, :, None], axis=1)
        tl.store(dB + part + by_state, dwrite.to(dB.dtype.element_ty), mask=states_)
        dproduct = tl.sum(dh * writes[:, None, :], axis=2)  # gradient of dt u
        dexponent = dh * decayed  # gradient of dt A
        drates += tl.sum(dexponent * steps[:, :, None], axis=0)
        dsteps = dproduct * inputs + tl.sum(dexponent * rates[None, :, :], axis=2)
        tl.store(du + by_channel, dproduct * steps, mask=channels)
        tl.store(ddt + by_channel, dsteps, mask=channels)
    tl.store(dinitial + document + place, carried, mask=inside)
    tl.store(dA + document + place, drates, mask=inside)


class _SelectiveScan(Function):
    """The autograd function of `selective_scan`."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        initial_state: Tensor,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        u, dt, A, B, C, initial_state = (x.contiguous() for x in (u, dt, A, B, C, initial_state))
        (batch, length, dim), size = u.shape, A.shape[1]
        blocks, count = None, batch * triton.cdiv(length, BLOCK)
        if cu_seqlens is not None:
            count = length // BLOCK + len(initial_state)  # an upper bound, known without the device
            blocks = cu_seqlens.diff().add(BLOCK - 1).floor_divide(BLOCK).cumsum(0).roll(1)
            blocks[0] = 0
        y, final = torch.empty_like(u), torch.empty_like(initial_state)
        saved = initial_state.new_empty(count, dim, size)
        grid, tile = _tiles(dim, size, len(initial_state))
        _forward[grid](u, dt, A, B, C, initial_state, y, final, saved, cu_seqlens, blocks, length, dim, size,
                       PACKED=cu_seqlens is not None, **tile)  # fmt: skip
        ctx.save_for_backward(u, dt, A, B, C, saved, cu_seqlens, blocks)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, saved, cu_seqlens, blocks = ctx.saved_tensors
        (batch, length, dim), size = u.shape, A.shape[1]
        dy, dfinal = dy.contiguous(), dfinal.contiguous()
        du, ddt, dinitial = torch.empty_like(u), torch.empty_like(dt), torch.empty_like(dfinal)
        grid, tile = _tiles(dim, size, len(dfinal))
        dA = A.new_empty(len(dfinal), dim, size)
        # with 16 states each is as large as u: they are not fp32, whose digits the rounding of their sum would lose
        dB, dC = (x.new_empty(grid[0], *x.shape) for x in (B, C))
        _backward[grid](u, dt, A, B, C, saved, dy, dfinal, du, ddt, dA, dB, dC, dinitial, cu_seqlens, blocks,
                        batch * length, length, dim, size, PACKED=cu_seqlens is not None, **tile)  # fmt: skip
        return du, ddt, dA.sum(0), *(x.sum(0, dtype=torch.float32).to(x.dtype) for x in (dB, dC)), dinitial, None


def _tiles(dim: int, size: int, sequences: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Returns the grid, and the sizes of a program's tile."""
    states = triton.next_power_of_2(size)
    channels = max(1, min(triton.next_power_of_2(dim), TILE // BLOCK // states))
    return (triton.cdiv(dim, channels), sequences), {"BLOCK": BLOCK, "BD": channels, "BS": states, "num_warps": WARPS}


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.selective_scan`."""
    with torch.cuda.device_of(u):  # Triton launches on the current device; autograd sets it in backward
        return _SelectiveScan.apply(u, dt, A.float(), B, C, initial_state, cu_seqlens)
