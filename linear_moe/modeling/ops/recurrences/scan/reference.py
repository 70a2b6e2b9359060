"""The definitions of the scans, token by token in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.packing import by_token, separately


def _run(
    tokens: Any, inputs: list[Tensor], state: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    inputs = [x.float() for x in inputs]
    o, state = tokens(state, *inputs) if cu_seqlens is None else separately(tokens, inputs, state, cu_seqlens)
    return o.to(dtype), state


def linear_scan(
    x: Tensor, g: Tensor, *, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.linear_scan`."""

    def tokens(state: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for x_t, g_t in by_token(x, g):
            state = g_t.exp() * state + x_t
            outputs.append(state)
        return torch.stack(outputs, dim=1), state

    if initial_state is None:
        sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = x.new_zeros(sequences, x.shape[-1], dtype=torch.float32)
    return _run(tokens, [x, g], initial_state, cu_seqlens, x.dtype)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.selective_scan`."""

    def tokens(state: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for u_t, dt_t, B_t, C_t in by_token(u, dt, B, C):
            update = (dt_t * u_t)[..., None] * B_t[:, None, :]
            state = (dt_t[..., None] * A).exp() * state + update
            outputs.append((state * C_t[:, None, :]).sum(-1))
        return torch.stack(outputs, dim=1), state

    return _run(tokens, [u, dt, B, C], initial_state, cu_seqlens, u.dtype)


def diagonal_scan(
    u: Tensor, log_a: Tensor, c: Tensor, *, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.diagonal_scan`."""
    g, theta = log_a.unbind(-1)
    a_re, a_im = g.exp() * theta.cos(), g.exp() * theta.sin()
    c_re, c_im = c.unbind(-1)

    def tokens(state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        re, im = state.unbind(-1)
        for (u_t,) in by_token(u):
            re, im = a_re * re - a_im * im + u_t[..., None], a_re * im + a_im * re
            outputs.append((c_re * re - c_im * im).sum(-1))
        return torch.stack(outputs, dim=1), torch.stack([re, im], dim=-1)

    return _run(tokens, [u], initial_state, cu_seqlens, u.dtype)
