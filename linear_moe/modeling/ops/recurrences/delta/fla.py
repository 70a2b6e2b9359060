"""The delta family on CUDA: the kernels of flash-linear-attention, imported at the first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.backends import pad_keys, run_fla, tiled
from linear_moe.modeling.ops.recurrences.decay.fla import CHUNK, MIN_GATE

MAX_KEY_DIM = 256


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
    inputs: dict[str, Any] = {
        "k": k,
        "v": v,
        "beta": beta,
        "scale": scale,
        "initial_state": None if initial_state is None else pad_keys(initial_state, 2, q.shape[-1]),
        "output_final_state": True,
        "cu_seqlens": cu_seqlens,
    }
    if g is None:
        o, state = run_fla("ops.delta_rule", "chunk_delta_rule", kept, q, **inputs)
    elif g.ndim == 4:
        o, state = run_fla("ops.kda", "chunk_kda", kept_by_channel, q, g=g, **inputs)
    else:
        o, state = run_fla("ops.gated_delta_rule", "chunk_gated_delta_rule", kept, q, g=g, **inputs)
    return o.to(v.dtype), state[:, :, :keys]


def kept(q: Tensor, *, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, **_: Any) -> list[Tensor]:
    """Tensors that `chunk_delta_rule` and `chunk_gated_delta_rule` keep.

    These are q, k, v, beta, the gate's running sums and the inverse within chunks, CHUNK numbers a token (with several
    writes a token: a write) and head.
    """
    sums = [] if g is None else [torch.empty_like(beta, dtype=g.dtype)]
    return [q, k, v, beta, *sums, k.new_empty(*beta.shape, CHUNK)]


def kept_by_channel(q: Tensor, *, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, **_: Any) -> list[Tensor]:
    """Tensors that `chunk_kda` keeps: q, k, v, beta, the gate, its running sums, scores and inverse within chunks."""
    return [q, k, v, beta, g, torch.empty_like(g), *(k.new_empty(*beta.shape, CHUNK) for _ in range(2))]
