"""A step of decoding, by one token, for the decay family."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gv: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    state: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advances `state [B, H, K, V]` (fp32) IN PLACE by one token; inputs are those of `decay` with T = 1, no gradients.

    Returns:
        `o [B, 1, H, V]` in v's dtype, and `state` itself.
    """
    scale, dtype = q.shape[-1] ** -0.5 if scale is None else scale, v.dtype
    q, k, v = (x[:, 0, :, None].float() for x in (q, k, v))  # [B, H, 1, D]
    q = q * scale
    o = None if bonus is None else q @ state + (q * bonus.float()[:, None] * k).sum(-1, keepdim=True) * v
    if g is not None:
        gate = (g if g.ndim == 1 else g[:, 0]).float().exp()
        state.mul_(gate[..., None] if g.ndim == 4 else gate[..., None, None])
    if gv is not None:
        state.mul_(gv[:, 0, :, None].float().exp())
    state.addcmul_(k.mT, v)
    o = q @ state if o is None else o
    return o.transpose(1, 2).to(dtype), state
