"""The definition of the diagonal plus rank one family, token by token in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.packing import separately, start_state


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
    """See `linear_moe.modeling.ops.dplr.dplr`."""
    state = start_state(q, v, initial_state, cu_seqlens)
    inputs: list[Any] = [x.float() for x in (q.float() * scale, k, v, a, b, g)]
    o, state = _tokens(state, *inputs) if cu_seqlens is None else separately(_tokens, inputs, state, cu_seqlens)
    return o.to(v.dtype), state


def _tokens(state: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
        state = g[:, t, :, :, None].exp() * state + b[:, t, :, :, None] * read[:, :, None, :]
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state
