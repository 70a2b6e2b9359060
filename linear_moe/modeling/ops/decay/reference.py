"""The definition of the decay family, token by token in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.packing import separately, start_state


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `linear_moe.modeling.ops.decay.decay`."""
    state = start_state(q, v, initial_state, cu_seqlens)
    if g is not None and g.ndim == 1:
        g = g.expand(q.shape[:3])
    inputs: list[Any] = [None if x is None else x.float() for x in (q.float() * scale, k, v, g)]
    o, state = _tokens(state, *inputs) if cu_seqlens is None else separately(_tokens, inputs, state, cu_seqlens)
    return o.to(v.dtype), state


def _tokens(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            gate = g[:, t] if g.ndim == 4 else g[:, t, :, None]  # [B, H, K] or [B, H, 1]
            state = gate.exp()[..., None] * state
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state
