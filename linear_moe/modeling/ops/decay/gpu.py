"""The decay family on CUDA: the kernels of flash-linear-attention, imported at the first call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from linear_moe.modeling.ops.dispatch import fla, pad_keys, tiled

# The kernels subtract cumulative sums of gates, which ruins small gates after huge ones; exp(-80) is nothing already.
MIN_GATE = -80.0


def unsupported(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these inputs; None: they can."""
    return None


def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `linear_moe.modeling.ops.decay.decay`. Products in v's dtype (fp32: in tf32); gates below -80 are -80."""
    keys, size = q.shape[-1], tiled(q.shape[-1])
    inputs: dict[str, Any] = {
        "q": pad_keys(q.to(v.dtype), -1, size),
        "k": pad_keys(k.to(v.dtype), -1, size),
        "v": v,
        "scale": scale,
        "initial_state": None if initial_state is None else pad_keys(initial_state, 2, size),
        "output_final_state": True,
        "cu_seqlens": cu_seqlens,
    }
    if g is not None:
        inputs["g"] = g.float().clamp(min=MIN_GATE)
    if g is not None and g.ndim == 4:
        inputs["g"] = pad_keys(inputs["g"], -1, size)
        o, state = fla("ops.gla").chunk_gla(**inputs)
    else:
        if g is not None and g.ndim == 1:
            # the kernels know constants, but not their gradient
            gate = inputs.pop("g")
            inputs |= {"g": gate.expand(q.shape[:3])} if gate.requires_grad else {"g_gamma": gate}
        o, state = fla("ops.simple_gla").chunk_simple_gla(**inputs)
    return o.to(v.dtype), state[:, :, :keys]
