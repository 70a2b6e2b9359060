"""The delta family on CUDA: the kernels of flash-linear-attention, imported at the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.modeling.ops.decay.gpu import MIN_GATE
from linear_moe.modeling.ops.dispatch import fla, pad_keys, tiled

MAX_KEY_DIM = 256


def unsupported(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these inputs; None: they can."""
    if v.dtype not in (torch.bfloat16, torch.float16):
        return f"the delta kernels take bfloat16 or float16, got {v.dtype}"
    if q.shape[-1] > MAX_KEY_DIM:
        return f"the delta kernels take K up to {MAX_KEY_DIM}, got {q.shape[-1]}"
    return None


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    bounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `linear_moe.modeling.ops.delta.delta`. Products in v's dtype; gates below -80 count as -80."""
    keys, size = q.shape[-1], tiled(q.shape[-1])
    inputs = {
        "q": pad_keys(q.to(v.dtype), -1, size),
        "k": pad_keys(k.to(v.dtype), -1, size),
        "v": v,
        "beta": beta,
        "scale": scale,
        "initial_state": None if initial_state is None else pad_keys(initial_state, 2, size),
        "output_final_state": True,
        "cu_seqlens": cu_seqlens,
    }
    if g is None:
        o, state = fla("ops.delta_rule").chunk_delta_rule(**inputs)
    else:
        g = g if bounded else g.float().clamp(min=MIN_GATE)
        if g.ndim == 4:
            o, state = fla("ops.kda").chunk_kda(g=pad_keys(g, -1, size), **inputs)
        else:
            o, state = fla("ops.gated_delta_rule").chunk_gated_delta_rule(g=g, **inputs)
    return o.to(v.dtype), state[:, :, :keys]
