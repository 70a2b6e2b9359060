"""Sums over tokens of outer products of channels, each state decaying at a rate of its own, in a Triton kernel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16  # tokens of a tile
CHANNELS = 32  # channels of a tile, with up to 16 states each
PROGRAMS = 1056  # programs wanted at once: eight for each multiprocessor of an H100
FLOOR = tl.constexpr(-100.0)  # lower bound of log-decays; exp(-100), 4e-44 in fp32, is practically 0
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _parts(
    x, y, step, rate, part, total, T, D, S, tokens, FACTOR: tl.constexpr, BACKWARDS: tl.constexpr, CHUNK: tl.constexpr,
    BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Stores the sums over P parts of the tokens, `part [N, P, D, S]`, and the sums of steps, `total [N, P, D]`."""
    piece, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, states = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BS)
    inside = (channel < D)[:, None] & (states < S)[None, :]
    rates = tl.full((BD, BS), LOG2_E, tl.float32)
    if rate is not None:
        rates = tl.load(rate + channel[:, None] * S + states[None, :], mask=inside, other=0.0) * LOG2_E
    state, steps = tl.zeros((BD, BS), tl.float32), tl.zeros((BD,), tl.float32)
    begin, end = piece * tokens, tl.minimum(piece * tokens + tokens, T)
    for i in range(0, tl.cdiv(end - begin, CHUNK)):
        t = begin + (tl.cdiv(end - begin, CHUNK) - 1 - i if BACKWARDS else i) * CHUNK + tl.arange(0, CHUNK)
        at = row * T + t
        here = (t < end)[:, None] & (channel < D)[None, :]
        value = tl.load(x + at[:, None] * D + channel[None, :], mask=here, other=0.0).to(tl.float32)
        own = tl.load(step + at[:, None] * D + channel[None, :], mask=here, other=0.0).to(tl.float32)
        if FACTOR:
            value *= own
        if rate is None:
            own = tl.maximum(own, FLOOR)  # differences of infinite sums would be NaN
        sums, all_steps = tl.cumsum(own, 0), tl.sum(own, 0)
        left = sums if BACKWARDS else all_steps[None, :] - sums
        added = tl.exp2(rates[None, :, :] * left[:, :, None]) * value[:, :, None]
        if y is not None:
            there = (t < end)[:, None] & (states < S)[None, :]
            added *= tl.load(y + at[:, None] * S + states[None, :], mask=there, other=0.0).to(tl.float32)[:, None, :]
        state = state * tl.exp2(rates * all_steps[:, None]) + tl.sum(added, 0)
        steps += all_steps
    place = row * tl.num_programs(1) + piece
    tl.store(part + (place * D + channel[:, None]) * S + states[None, :], state, mask=inside)
    tl.store(total + place * D + channel, steps, mask=channel < D)


def weighted_sum(
    x: Tensor, y: Tensor | None, step: Tensor, rate: Tensor | None, *, factor: bool = False, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """Computes the sum over t of `x_t y_t exp(rate * s_t)`, s_t the sum of the steps behind t (backwards: up to t).

    Args:
        x: `[N, T, D]`.
        y: `[N, T, S]`; None: S = 1 and y = 1.
        step: `[N, T, D]`.
        rate: `[D, S]` fp32; None: S = 1 and rate = 1.
        factor: whether x is multiplied by the steps.
        backwards: whether s_t sums the steps up to t, its own included.

    Returns:
        The decay over all tokens, and the sum: `[N, D, S]` fp32 each.
    """
    (rows, length, channels), states = x.shape, 1 if rate is None else rate.shape[1]
    x, step = x.contiguous(), step.contiguous()
    y, rate = (None if t is None else t.contiguous() for t in (y, rate))
    block = triton.next_power_of_2(states)
    wide = max(16, CHANNELS * 16 // max(block, 4))
    blocks, chunks = triton.cdiv(channels, wide), triton.cdiv(length, CHUNK)
    tokens = triton.cdiv(chunks, min(chunks, max(1, PROGRAMS // (rows * blocks)))) * CHUNK
    parts = triton.cdiv(length, tokens)
    part = torch.empty(rows, parts, channels, states, dtype=torch.float32, device=x.device)
    total = torch.empty(rows, parts, channels, dtype=torch.float32, device=x.device)
    _parts[(blocks, parts, rows)](
        x, y, step, rate, part, total, length, channels, states, tokens, FACTOR=factor, BACKWARDS=backwards,
        CHUNK=CHUNK, BD=wide, BS=block, num_warps=4,
    )  # fmt: skip
    one = total.new_ones(()) if rate is None else rate
    total = total if backwards else total.flip(1)
    sums = F.pad(total.cumsum(1), (0, 0, 1, 0))  # of the parts before (or behind) each, and of all
    kept = (sums[:, :-1, :, None] * one).exp()
    return (sums[:, -1, :, None] * one).exp(), (part * (kept if backwards else kept.flip(1))).sum(1)
