"""A step of decoding, by one token, for the diagonal plus rank one family."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, *, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Advances `state [B, H, K, V]` (fp32) IN PLACE by one token; inputs are those of `dplr` with T = 1, no gradients.

    Returns:
        `o [B, 1, H, V]` in v's dtype, and `state` itself.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, a, b, g = (x[:, 0, :, :, None].float() for x in (q, k, a, b, g))
    read = a.mT @ state  # [B, H, 1, V]
    state.mul_(g.exp()).addcmul_(b, read).addcmul_(k, v[:, 0, :, None, :].float())
    o = (q.mT * scale) @ state
    return o.transpose(1, 2).to(v.dtype), state
