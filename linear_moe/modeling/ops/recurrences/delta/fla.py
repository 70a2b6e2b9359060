"""The delta family on CUDA: the kernels of flash-linear-attention, imported at the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.modeling.ops.backends import import_fla, pad_keys, tiled
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE

MAX_KEY_DIM = 256
CHUNK = 64  # tokens of a chunk, which the kernels prescribe


def unsupported(q: Tensor, v: Tensor) -> str | None:
    """Returns the reason why the kernels cannot take these inputs; None: they can."""
    if v.dtype not in (torch.bfloat16, torch.float16):
        return f"the delta kernels take bfloat16 or float16, got {v.dtype}"
    if q.shape[-1] > MAX_KEY_DIM:
        return f"the delta kernels take K up to {MAX_KEY_DIM}, got {q.shape[-1]}"
    return None


def prepared(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, bounded: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns q, k and g for the kernels: q and k in v's dtype, key channels padded to their tiles, g at least -80."""
    size = tiled(q.shape[-1])
    q, k = (pad_keys(x.to(v.dtype), -1, size) for x in (q, k))
    if g is not None:
        g = g if bounded else g.float().clamp(min=MIN_GATE)
        g = pad_keys(g, -1, size) if g.ndim == 4 else g
    return q, k, g


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
    """See `recurrences.delta.delta`. Products are in v's dtype, and gates below -80 count as -80."""
    keys = q.shape[-1]
    q, k, g = prepared(q, k, v, g, bounded)
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "beta": beta,
        "scale": scale,
        "initial_state": None if initial_state is None else pad_keys(initial_state, 2, q.shape[-1]),
        "output_final_state": True,
        "cu_seqlens": cu_seqlens,
    }
    if g is None:
        o, state = import_fla("ops.delta_rule").chunk_delta_rule(**inputs)
    elif g.ndim == 4:
        o, state = import_fla("ops.kda").chunk_kda(g=g, **inputs)
    else:
        o, state = import_fla("ops.gated_delta_rule").chunk_gated_delta_rule(g=g, **inputs)
    return o.to(v.dtype), state[:, :, :keys]
