"""The diagonal plus rank one family on CUDA: the kernels of flash-linear-attention, imported at the first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.backends import pad_keys, run_fla, tiled
from linear_moe.modeling.ops.recurrences.delta.fla import MAX_KEY_DIM

# The kernel masks by multiplication with zero, also exp of sums of -g over chunks of 16 tokens or more: these must stay
# finite in fp32.
MIN_GATE = -5.0


def unsupported(q: Tensor, v: Tensor, min_gate: float | None) -> str | None:
    """Returns the reason why the kernels cannot take these inputs; None: they can."""
    if min_gate is None or min_gate < MIN_GATE:
        return f"there is no kernel for gates that may be below {MIN_GATE:g}: min_gate is {min_gate}"
    if v.dtype not in (torch.bfloat16, torch.float16):
        return f"the dplr kernels take bfloat16 or float16, got {v.dtype}"
    if q.shape[-1] > MAX_KEY_DIM:
        return f"the dplr kernels take K up to {MAX_KEY_DIM}, got {q.shape[-1]}"
    return None


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    min_gate: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See `recurrences.dplr.dplr`. Products are in v's dtype."""
    keys, size = q.shape[-1], tiled(q.shape[-1])
    q, k, a, b = (pad_keys(x.to(v.dtype), -1, size) for x in (q, k, a, b))
    o, state = run_fla(
        "ops.generalized_delta_rule",
        "chunk_dplr_delta_rule",
        kept,
        q,
        k=k,
        v=v,
        a=a,
        b=b,
        gk=pad_keys(g.float(), -1, size),
        scale=scale,
        initial_state=None if initial_state is None else pad_keys(initial_state, 2, size),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        lower_bound=min_gate,
    )
    return o.to(v.dtype), state[:, :, :keys]


def kept(q: Tensor, *, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gk: Tensor, **_: Any) -> list[Tensor]:
    """Tensors that `chunk_dplr_delta_rule` keeps: its inputs."""
    return [q, k, v, a, b, gk]
