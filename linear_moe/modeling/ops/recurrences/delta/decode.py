"""A step of decoding, by one token, for the delta family."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, *, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Advances `state [B, H, K, V]` (fp32) IN PLACE by one token; inputs are those of `delta` with T = 1, no gradients.

    Returns:
        `o [B, 1, H, V]` in v's dtype, and `state` itself.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if g is not None:
        gate = g[:, 0].float().exp()
        state.mul_(gate[..., None] if g.ndim == 4 else gate[..., None, None])
    key = k[:, 0, :, :, None].float()
    write = beta[:, 0, :, None, None].float() * (v[:, 0, :, None, :].float() - key.mT @ state)
    state.addcmul_(key, write)
    o = (q[:, 0, :, None, :].float() * scale) @ state  # [B, H, 1, V]
    return o.transpose(1, 2).to(v.dtype), state
