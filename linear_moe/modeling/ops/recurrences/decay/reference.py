"""The definition of the decay family, token by token in fp32."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.packing import by_token, separately, start_state


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    bonus: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `recurrences.decay.decay`."""
    state = start_state(q, v, initial_state, cu_seqlens)
    if g is not None and g.ndim == 1:
        g = g.expand(q.shape[:3])
    inputs: list[Any] = [None if x is None else x.float() for x in (q.float() * scale, k, v, g, gv)]
    tokens = partial(_tokens, None if bonus is None else bonus.float()[..., None])
    o, state = tokens(state, *inputs) if cu_seqlens is None else separately(tokens, inputs, state, cu_seqlens)
    return o.to(v.dtype), state


def _tokens(
    bonus: Tensor | None, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None
) -> tuple[Tensor, Tensor]:
    outputs = []
    for q_t, k_t, v_t, g_t, gv_t in by_token(q, k, v, g, gv):
        before = state
        if g_t is not None:
            gate = g_t if g_t.ndim == 3 else g_t[..., None]  # [B, H, K] or [B, H, 1]
            state = gate.exp()[..., None] * state
        if gv_t is not None:
            state = state * gv_t[..., None, :].exp()
        update = k_t[..., None] * v_t[..., None, :]
        state = state + update
        read = state if bonus is None else before + bonus * update
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, read))
    return torch.stack(outputs, dim=1), state
