"""The definition of the delta family, token by token in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.packing import by_token, separately, start_state


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `recurrences.delta.delta`."""
    state = start_state(q, v, initial_state, cu_seqlens)
    inputs: list[Any] = [None if x is None else x.float() for x in (q.float() * scale, k, v, beta, g)]
    o, state = _tokens(state, *inputs) if cu_seqlens is None else separately(_tokens, inputs, state, cu_seqlens)
    return o.to(v.dtype), state


def _tokens(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs = []
    for q_t, k_t, v_t, beta_t, g_t in by_token(q, k, v, beta, g):
        if g_t is not None:
            gate = g_t if g_t.ndim == 3 else g_t[..., None]  # [B, H, K] or [B, H, 1]
            state = gate.exp()[..., None] * state
        read = torch.einsum("bhk,bhkv->bhv", k_t, state)
        write = beta_t[..., None] * (v_t - read)
        state = state + k_t[..., None] * write[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    return torch.stack(outputs, dim=1), state
