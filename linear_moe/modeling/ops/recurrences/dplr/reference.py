"""The definition of the diagonal plus rank one family, token by token in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.packing import by_token, separately, start_state


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `recurrences.dplr.dplr`."""
    state = start_state(q, v, initial_state, cu_seqlens)
    inputs: list[Any] = [x.float() for x in (q.float() * scale, k, v, a, b, g)]
    o, state = _tokens(state, *inputs) if cu_seqlens is None else separately(_tokens, inputs, state, cu_seqlens)
    return o.to(v.dtype), state


def _tokens(state: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for q_t, k_t, v_t, a_t, b_t, g_t in by_token(q, k, v, a, b, g):
        read = torch.einsum("bhk,bhkv->bhv", a_t, state)
        state = g_t[..., None].exp() * state + b_t[..., None] * read[..., None, :]
        state = state + k_t[..., None] * v_t[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    return torch.stack(outputs, dim=1), state
