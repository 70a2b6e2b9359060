"""The recurrences of weights over mini-batches, differentiated in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.walk import Spans, backwards, forwards


class TTT(Function):
    """The recurrence of TTT's weights over mini-batches.

    `TTT.apply(keys, errors, steps, square, starts, earlier, spans, eps) -> (before, inner, final)`

    W are the weights `[X, D + 1, D]` before a mini-batch, and n(z) is LayerNorm without weights. The gradient of the
    mini-batch's loss with respect to z = keys W is inner = n'(z)(errors + square n(z)). The weights after the
    mini-batch are W + steps inner, plus `earlier` after the first one.

    Args:
        keys: `[N, X, C, D + 1]`; errors: `[N, X, C, D]`; steps: `[N, X, D + 1, C]`; square: `[X, 1, D]`.
        starts: `[spans, X, D + 1, D]`, the weights before every span.
        earlier: `[X, D + 1, D]`, the change by tokens of the first mini-batch in an earlier pass, or None.
        spans: first mini-batch and end of every document, or of all rows together.
        eps: epsilon of n.

    Returns:
        W before every mini-batch `[N, X, D + 1, D]`, inner `[N, X, C, D]`, and W after every span, shaped as `starts`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keys: Tensor,
        errors: Tensor,
        steps: Tensor,
        square: Tensor,
        starts: Tensor,
        earlier: Tensor | None,
        spans: Spans,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        before, final, walk = forwards(starts, spans, len(keys))
        inner = []
        for (n, state, after), key, error, step in zip(walk, keys, errors, steps, strict=True):
            z = key @ state
            normed, mean, inverse_std = torch.native_layer_norm(z, z.shape[-1:], None, None, eps)
            inner.append(_norm_gradient(torch.addcmul(error, square, normed), z, mean, inverse_std))
            torch.baddbmm(state, step, inner[n], out=after)
            if n == 0 and earlier is not None:
                after.add_(earlier)
        inners = torch.stack(inner)
        ctx.save_for_backward(keys, errors, steps, square, before, inners)
        ctx.spans, ctx.eps, ctx.continues = spans, eps, earlier is not None
        return before, inners, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_inner: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        keys, errors, steps, square, before, inner = ctx.saved_tensors
        z = keys @ before
        normed, mean, inverse_std = torch.native_layer_norm(z, z.shape[-1:], None, None, ctx.eps)
        slope = torch.addcmul(errors, square, normed)
        # inner = inverse_std (slope - mean(slope) - normed mean(slope normed)), all of which depend on z
        along = inverse_std * (slope * normed).mean(-1, keepdim=True)
        onto = torch.stack([normed, inner], -1) / normed.shape[-1]
        rated_slope, rated_normed = inverse_std * slope, inverse_std * normed
        parts = [x.unbind() for x in (keys.mT, steps.mT, d_before, d_inner, z, mean, inverse_std)]
        norm_terms = [x.unbind() for x in (along, onto, rated_slope, rated_normed)]
        d_slopes: list[Tensor] = []
        d_zs: list[Tensor] = []
        d_after, d_starts, walk = backwards(d_final, ctx.spans, len(keys))
        for n, after, to in walk:
            key, step, d_state, d, *norm = (x[n] for x in parts)
            m, projection, s, x = (y[n] for y in norm_terms)
            d = torch.baddbmm(d, step, after)
            d_slopes.append(_norm_gradient(d, *norm))
            a, c = (d.unsqueeze(-2) @ projection).squeeze(-2).split(1, -1)
            d_normed = (square * d_slopes[-1]).addcmul_(m, d, value=-1).addcmul_(s, a, value=-1)
            d_zs.append(_norm_gradient(d_normed, *norm).addcmul_(x, c, value=-1))
            torch.add(d_state, after, out=to).baddbmm_(key, d_zs[-1])
        d_slope, d_z = (torch.stack(x[::-1]) for x in (d_slopes, d_zs))
        d_square = (d_slope * normed).sum((0, 2)).unsqueeze(1)
        d_earlier = d_after[0] if ctx.continues else None
        return d_z @ before.mT, d_slope, d_after @ inner.mT, d_square, d_starts, d_earlier, None, None


def _norm_gradient(d_normed: Tensor, z: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    """Returns the gradient of LayerNorm's input z: inverse_std (d - mean(d) - n(z) mean(d n(z))), d = `d_normed`."""
    return torch.ops.aten.native_layer_norm_backward(
        d_normed, z, z.shape[-1:], mean, inverse_std, None, None, [True, False, False]
    )[0]


class TitansState(Function):
    """The recurrence of Titans' memory and momentum over chunks.

    `TitansState.apply(keys, values, gates, steps, starts, at, spans) -> (before, errors, final)`

    S are the stacked states `[X, 2K, V]` before a chunk, and M are their first K rows, except that M is `at` in the
    first chunk if `at` is given. Then errors = keys M - values, and the states after the chunk are gates S + steps
    errors.

    Args:
        keys: `[N, X, C, K]`; values: `[N, X, C, V]`; gates: `[N, X, 2, 2]`; steps: `[N, X, 2K, C]`.
        starts: `[spans, X, 2K, V]`, the states before every span.
        at: `[X, K, V]` or None.
        spans: first chunk and end of every document, or of all rows together.

    Returns:
        S before every chunk `[N, X, 2K, V]`, errors `[N, X, C, V]`, and S after every span, shaped as `starts`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keys: Tensor,
        values: Tensor,
        gates: Tensor,
        steps: Tensor,
        starts: Tensor,
        at: Tensor | None,
        spans: Spans,
    ) -> tuple[Tensor, Tensor, Tensor]:
        before, final, walk = forwards(starts, spans, len(keys))
        errors, width, halves = [], keys.shape[-1], (len(starts[0]), 2, -1)
        for (n, state, after), key, value, gate, step in zip(walk, keys, values, gates, steps, strict=True):
            memory = state[:, :width] if n or at is None else at
            errors.append(torch.baddbmm(value, key, memory, beta=-1))
            torch.bmm(gate, state.view(halves), out=after.view(halves))
            after.baddbmm_(step, errors[n])
        stacked = torch.stack(errors)
        ctx.save_for_backward(keys, gates, steps, before, stacked, at)
        ctx.spans = spans
        return before, stacked, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_errors: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        keys, gates, steps, before, errors, at = ctx.saved_tensors
        d_after, d_starts, walk = backwards(d_final, ctx.spans, len(keys))
        width, halves = keys.shape[-1], (len(d_final[0]), 2, -1)
        parts = [x.unbind() for x in (keys.mT, gates.mT, steps.mT, d_before, d_errors)]
        error_gradients: list[Tensor] = []
        for n, after, to in walk:
            key, gate, step, d_state, d = (x[n] for x in parts)
            d = torch.baddbmm(d, step, after)
            error_gradients.append(d)
            torch.bmm(gate, after.view(halves), out=to.view(halves))
            to.add_(d_state)
            if n or at is None:
                to[:, :width].baddbmm_(key, d)
        d_values, memory = torch.stack(error_gradients[::-1]), before[:, :, :width]
        d_keys = d_values @ memory.mT
        d_at = None
        if at is not None:
            d_keys[0], d_at = d_values[0] @ at.mT, keys[0].mT @ d_values[0]
        d_gates = d_after.unflatten(2, (2, -1)).flatten(3) @ before.unflatten(2, (2, -1)).flatten(3).mT
        return d_keys, -d_values, d_gates, d_after @ errors.mT, d_starts, d_at, None
