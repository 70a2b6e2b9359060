"""The definition of trained memories, token by token in fp32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.packing import by_token, separately

States = tuple[Tensor, ...]


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    state: Tensor,
    gradient: Tensor | None,
    *,
    skip: int,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, States]:
    """See `recurrences.fast_weights.ttt`; `skip` is the first token's place in its mini-batch."""
    w, b, size = weight.float(), bias.float(), len(scale)

    def token(t: int, states: States, q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> tuple[Tensor, States]:
        state, gradient = states
        place = (skip + t) % size
        inner = inner_gradient(apply(k, state), k, v, w, b, eps)
        gradient = gradient + with_one(k)[..., None] * (rate[..., None] * inner)[..., None, :]
        now = state - scale[place] * gradient
        o = q + F.layer_norm(apply(q, now), q.shape[-1:], eps=eps) * w + b
        return o, (now, torch.zeros_like(gradient)) if place == size - 1 else (state, gradient)

    initial = (state, torch.zeros_like(state) if gradient is None else gradient)
    o, states = _run(token, initial, (q, k, v, rate), cu_seqlens)
    return o.to(v.dtype), states


def with_one(x: Tensor) -> Tensor:
    """Appends a feature that is 1, the factor of the memory's bias, to `x [..., D]`."""
    return F.pad(x, (0, 1), value=1.0)


def apply(x: Tensor, state: Tensor) -> Tensor:
    """Applies the memories' weights and biases, `state [B, H, D + 1, D]`, to `x [B, H, D]`."""
    return (with_one(x)[..., None, :] @ state).squeeze(-2)


def inner_gradient(z: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns the gradient of |k + LN(z) - v|^2 / 2 with respect to z, over the last dimension."""
    centred = z - z.mean(-1, keepdim=True)
    inverse_std = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = centred * inverse_std
    d_normed = weight * (k + normed * weight + bias - v)
    along = (d_normed * normed).mean(-1, keepdim=True)
    return inverse_std * (d_normed - d_normed.mean(-1, keepdim=True) - normed * along)


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    keep: Tensor,
    momentum: Tensor,
    state: Tensor,
    surprise: Tensor,
    start: Tensor,
    *,
    skip: int,
    chunk_size: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, States]:
    """See `recurrences.fast_weights.titans`; `skip` is the first token's place in its chunk."""

    def token(t: int, states: States, *inputs: Tensor) -> tuple[Tensor, States]:
        (state, surprise, start), (q, k, v, rate, keep, momentum) = states, inputs
        error = torch.einsum("bhk,bhkv->bhv", k, start) - v
        step = 2 * rate[..., None, None] * k[..., None] * error[..., None, :]
        surprise = momentum.exp()[..., None, None] * surprise - step
        state = keep.exp()[..., None, None] * state + surprise
        ends = (skip + t + 1) % chunk_size == 0
        return torch.einsum("bhk,bhkv->bhv", q, state), (state, surprise, state if ends else start)

    o, states = _run(token, (state, surprise, start), (q, k, v, rate, keep, momentum), cu_seqlens)
    return o.to(v.dtype), states


def _tokens(token: Callable[..., tuple[Tensor, States]], states: States, *inputs: Tensor) -> tuple[Tensor, States]:
    """Runs `token(t, states, *inputs at t) -> (output, states)` from t = 0."""
    outputs = []
    for t, of_token in enumerate(by_token(*inputs)):
        o, states = token(t, states, *of_token)
        outputs.append(o)
    return torch.stack(outputs, dim=1), states


def _run(
    token: Callable[..., tuple[Tensor, States]], states: States, inputs: States, cu_seqlens: Tensor | None
) -> tuple[Tensor, States]:
    """Runs `_tokens` on all rows, or on every packed document alone, in fp32."""
    tokens, inputs = partial(_tokens, token), tuple(x.float() for x in inputs)
    return tokens(states, *inputs) if cu_seqlens is None else separately(tokens, inputs, states, cu_seqlens)
