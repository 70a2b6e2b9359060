"""The decay family on CUDA: the kernels of flash-linear-attention, imported at the first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.backends import pad_keys, run_fla, tiled

# The kernels subtract cumulative sums of gates, which ruins small gates after huge ones. exp(-80) is practically 0, so
# gates are clamped there.
MIN_GATE = -80.0
CHUNK = 64  # tokens, the kernels' own


def unsupported(gv: Tensor | None, bonus: Tensor | None) -> str | None:
    """Returns the reason why the kernels cannot take these inputs; None: they can."""
    return "there is no kernel for gv and bonus together" if gv is not None and bonus is not None else None


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    bonus: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    bounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `recurrences.decay.decay`. Products are in v's dtype (tf32 for fp32), and gates below -80 count as -80.

    With gv, the kernel goes token by token, in fp32: no chunkwise kernel for gv has initial states and gradients.
    """
    keys, size = q.shape[-1], tiled(q.shape[-1])
    values = v.shape[-1]
    width = values if values % 2 == 0 else -(-values // 16) * 16  # backward kernels refuse odd V
    g, gv = (x if x is None or bounded else x.float().clamp(min=MIN_GATE) for x in (g, gv))
    inputs: dict[str, Any] = {
        "k": pad_keys(k.to(v.dtype), -1, size),
        "v": pad_keys(v, -1, width),
        "scale": scale,
        "initial_state": None if initial_state is None else pad_keys(pad_keys(initial_state, 2, size), 3, width),
        "output_final_state": True,
        "cu_seqlens": cu_seqlens,
    }
    q = pad_keys(q.to(v.dtype), -1, size)
    if gv is not None:
        if g is not None and g.ndim < 4:
            gv, g = gv + g[..., None], None
        gk = None if g is None else pad_keys(g, -1, size)
        inputs |= {"gk": gk, "gv": pad_keys(gv, -1, width)}
        o, state = run_fla("ops.gla", "fused_recurrent_gla", kept_by_token, q, **inputs)
    elif bonus is not None:
        w = pad_keys(_by_channel(g, k), -1, size)
        inputs |= {"w": w, "u": pad_keys(bonus.float(), -1, size)}
        o, state = run_fla("ops.rwkv6", "chunk_rwkv6", kept_bonus, q, **inputs)
    elif g is not None and g.ndim == 4:
        o, state = run_fla("ops.gla", "chunk_gla", kept_by_channel, q, g=pad_keys(g, -1, size), **inputs)
    elif g is not None and g.ndim == 1 and _constant(g, q, cu_seqlens):
        o, state = run_fla("ops.simple_gla", "chunk_simple_gla", kept_by_head, q, g_gamma=g, **inputs)
    else:
        g = g.expand(q.shape[:3]) if g is not None and g.ndim == 1 else g
        o, state = run_fla("ops.simple_gla", "chunk_simple_gla", kept_by_head, q, g=g, **inputs)
    return o[..., :values].to(v.dtype), state[:, :, :keys, :values]


def kept_by_head(q: Tensor, *, k: Tensor, v: Tensor, g: Tensor | None = None, **_: Any) -> list[Tensor]:
    """Tensors that `chunk_simple_gla` keeps: q, k, v and the gate's running sums."""
    return [q, k, v] if g is None else [q, k, v, torch.empty_like(g)]


def kept_by_channel(q: Tensor, *, k: Tensor, v: Tensor, g: Tensor, **_: Any) -> list[Tensor]:
    """Tensors that `chunk_gla` keeps: q, k, v, an fp32 gate's running sums, and in fp32 the scores within chunks."""
    return [q, k, v, torch.empty_like(g), q.new_empty(*q.shape[:3], CHUNK, dtype=torch.float32)]


def kept_bonus(q: Tensor, *, k: Tensor, v: Tensor, w: Tensor, u: Tensor, **_: Any) -> list[Tensor]:
    """Tensors that `chunk_rwkv6` keeps: q, k, v, the gate, the bonus and the scores within chunks in fp32."""
    return [q, k, v, w, u, q.new_empty(*q.shape[:3], CHUNK, dtype=torch.float32)]


def kept_by_token(q: Tensor, *, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor, **_: Any) -> list[Tensor | None]:
    """Tensors that `fused_recurrent_gla` keeps: q, k, v, the gates and its output in fp32."""
    return [q, k, v, gk, gv, torch.empty_like(v, dtype=torch.float32)]


def _constant(g: Tensor, q: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether the kernels' special form for constant gates `g [H]` can be used.

    This form gives g no gradient. Behind the end of a chunk that is not full it multiplies zeros by exp(-63 g), which
    overflows, and gives NaN, for g below -88 / 63. So it is used only where all chunks of 64 tokens are full.
    """
    return not g.requires_grad and cu_seqlens is None and q.shape[1] % 64 == 0


def _by_channel(g: Tensor | None, k: Tensor) -> Tensor:
    """Expands g, of any form, to `[B, T, H, K]`."""
    if g is None:
        return torch.zeros_like(k, dtype=torch.float32)
    return g if g.ndim == 4 else g[..., None].expand(k.shape)
