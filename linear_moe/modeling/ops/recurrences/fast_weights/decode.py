"""Steps of decoding, by one token, for trained memories."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.recurrences.fast_weights.reference import apply, inner_gradient, with_one

States = tuple[Tensor, ...]


@torch.no_grad()
def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    state: Tensor,
    gradient: Tensor,
    place: Tensor,
    eps: float,
) -> tuple[Tensor, States]:
    """Advances W = `state` and A = `gradient` (`[B, H, D + 1, D]` fp32) IN PLACE by one token.

    The rows may be at different places in their mini-batches, `place [B]`. The other inputs are those of
    `recurrences.fast_weights.ttt` with T = 1. There are no gradients.

    Returns:
        `o [B, 1, H, D]` in v's dtype, and the states themselves.
    """
    query, key, value, rate = (x[:, 0].float() for x in (q, k, v, rate))
    inner = inner_gradient(apply(key, state), key, value, weight.float(), bias.float(), eps)
    gradient.addcmul_(with_one(key)[..., None], (rate[..., None] * inner)[..., None, :])
    factor = scale[place].float()[:, None, None]
    z = apply(query, state) - factor * apply(query, gradient)
    o = query + F.layer_norm(z, z.shape[-1:], eps=eps) * weight.float() + bias.float()
    ends = (place == len(scale) - 1)[:, None, None, None]
    state.addcmul_(gradient, ends * factor[..., None], value=-1)
    gradient.mul_(~ends)
    return o[:, None].to(v.dtype), (state, gradient)


@torch.no_grad()
def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    keep: Tensor,
    momentum: Tensor,
    *,
    chunk_size: int,
    state: Tensor,
    surprise: Tensor,
    start: Tensor,
    place: Tensor,
) -> tuple[Tensor, States]:
    """Advances M = `state`, S = `surprise` and M_c = `start` (`[B, H, K, V]` fp32) IN PLACE by one token.

    The rows may be at different places in their chunks, `place [B]`. The other inputs are those of
    `recurrences.fast_weights.titans` with T = 1. There are no gradients.

    Returns:
        `o [B, 1, H, V]` in v's dtype, and the states themselves.
    """
    key, value, query = (x[:, 0, :, None].float() for x in (k, v, q))  # [B, H, 1, D]
    rate, keep, momentum = (x[:, 0, :, None, None].float() for x in (rate, keep, momentum))
    error = key @ start - value
    surprise.mul_(momentum.exp()).addcmul_(key.mT, rate * error, value=-2)
    state.mul_(keep.exp()).add_(surprise)
    ends = ((place + 1) % chunk_size == 0)[:, None, None, None]
    start.copy_(torch.where(ends, state, start))
    return (query @ state).transpose(1, 2).to(v.dtype), (state, surprise, start)
