"""Steps of decoding, by one token, for the scans.

The inputs are those of the ops with T = 1. The state advances IN PLACE. There are no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def linear_step(x: Tensor, g: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advances `state [B, D]` IN PLACE; returns `h [B, 1, D]` in x's dtype, and `state` itself."""
    state.mul_(g[:, 0].float().exp()).add_(x[:, 0])
    return state.unsqueeze(1).to(x.dtype, copy=True), state


@torch.no_grad()
def selective_step(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advances `state [B, D, S]` IN PLACE; returns `y [B, 1, D]` in u's dtype, and `state` itself."""
    dt = dt[:, 0].float()
    state.mul_((dt[..., None] * A).exp()).addcmul_((dt * u[:, 0])[..., None], B[:, 0, None].float())
    return (state @ C[:, 0, :, None].float()).mT.to(u.dtype), state


@torch.no_grad()
def diagonal_step(u: Tensor, log_a: Tensor, c: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """Advances `state [B, D, S, 2]` IN PLACE; returns `y [B, 1, D]` in u's dtype, and `state` itself."""
    g, theta = log_a.unbind(-1)
    complex_state = torch.view_as_complex(state)
    complex_state.mul_(torch.polar(g.exp(), theta))
    state[..., 0].add_(u[:, 0, :, None])
    y = (complex_state * torch.view_as_complex(c.contiguous())).sum(-1).real
    return y.unsqueeze(1).to(u.dtype), state
