"""What a stretch of tokens does to the state of the decay family, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linear_moe.modeling.ops.sequence import remaining


def summary(k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None) -> tuple[Tensor, Tensor]:
    """Inputs as of `decay`, `g` not constant -> transition `[N, H, K or 1, V or 1]` and state `[N, H, K, V]`, fp32.

    The backward pass keeps the inputs only: in fp32 and decayed they are several times as large.
    """
    if not torch.is_grad_enabled():
        return _summary(k, v, g, gv)
    result: tuple[Tensor, Tensor] = checkpoint(_summary, k, v, g, gv, use_reentrant=False, preserve_rng_state=False)
    return result


def _summary(k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None) -> tuple[Tensor, Tensor]:
    k, v = k.float(), v.float()
    transition = k.new_ones(k.shape[0], k.shape[2], 1, 1)
    if g is not None:
        left, kept = remaining(g if g.ndim == 4 else g[..., None])
        k, transition = k * left, transition * kept[..., None]
    if gv is not None:
        left, kept = remaining(gv)
        v, transition = v * left, transition * kept[..., None, :]
    return transition, torch.einsum("nthk,nthv->nhkv", k, v)
