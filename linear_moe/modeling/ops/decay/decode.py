"""One token of the decay family, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Advances `state [B, H, K, V]` (fp32) IN PLACE by one token; inputs as `decay` with T = 1, no gradients.

    Returns:
        `o [B, 1, H, V]` in v's dtype, and `state` itself.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if g is not None:
        gate = (g if g.ndim == 1 else g[:, 0]).float().exp()
        state.mul_(gate[..., None] if g.ndim == 4 else gate[..., None, None])
    state.addcmul_(k[:, 0, :, :, None].float(), v[:, 0, :, None, :].float())
    o = (q[:, 0, :, None, :].float() * scale) @ state  # [B, H, 1, V]
    return o.transpose(1, 2).to(v.dtype), state
