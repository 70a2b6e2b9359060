"""Gated slot attention: two recurrences of the decay family with a softmax over slots between them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import check_inputs, choose, decodes, import_fla, pad_keys, requested, tiled
from linear_moe.modeling.ops.kernels import stand_in, stood_in
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.ops.recurrences.decay.fla import CHUNK, MIN_GATE
from linear_moe.modeling.ops.recurrences.decay.summary import differentiable

States = tuple[Tensor, Tensor]


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_states: States | None = None,
    cu_seqlens: Tensor | None = None,
    bounded: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gated slot attention (arXiv 2409.07146): softmax attention over M slots of keys and values.

    Every slot has a decay and a write strength of its own:

    K_t = K_{t-1} diag(exp(g_t)) + k_t s_t^T,  V_t = diag(exp(g_t)) V_{t-1} + s_t v_t^T,
    o_t = V_t^T softmax(scale * K_t^T q_t).

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        s: `[B, T, H, M]`, the strength with which the token is written to each slot; published: 1 - exp(g).
        g: `[B, T, H, M]` log-decay of slots, at most 0.
        scale: K**-0.5 unless given.
        initial_states: of keys `[N, H, K, M]` and of values `[N, H, M, V]`, fp32, zeros unless given.
        cu_seqlens, bounded, backend: as for `decay`; decoding updates both states in place.

    Returns:
        `o [B, T, H, V]` in v's dtype and both final states, differentiable in every input.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit; ImportError: "gpu" without its packages.
    """
    keys, values = initial_states or (None, None)
    check_inputs(q, k, s, {"g": (g, (tuple(s.shape),))}, keys, cu_seqlens)
    check_inputs(s, s, v, {}, values, cu_seqlens)
    scale, backend = q.shape[-1] ** -0.5 if scale is None else scale, requested(backend)
    pieces = sequence.current(keys)
    if pieces is None and backend == "auto" and decodes(q.shape[1], keys, cu_seqlens):
        return _two_passes(q, k, v, s, g, scale, initial_states, cu_seqlens, bounded, backend)
    implementations: dict[str, Any] = {
        name: partial(_two_passes, backend=name) for name in ("reference", "chunk", "gpu")
    }
    # The fused kernel takes no padded slots, which its softmax would see, and no odd number of value channels.
    if s.shape[-1] == tiled(s.shape[-1]) and v.shape[-1] % 2 == 0:
        implementations["gpu"] = _kernel
    implementation = choose(backend, implementations, v, None)
    if pieces is not None:  # neither pass writes a state from the other's outputs: both are known in advance
        initial_states = pieces.states(differentiable, k, s, None, g), pieces.states(differentiable, s, v, g, None)
    with sequence.pieces_of(None):
        return implementation(q, k, v, s, g, scale, initial_states, cu_seqlens, bounded)


def _two_passes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    scale: float,
    states: States | None,
    cu_seqlens: Tensor | None,
    bounded: bool,
    backend: str,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Computes gated slot attention by two calls of `decay`: over the keys, and over the values."""
    keys, values = states or (None, None)
    options: Any = {"cu_seqlens": cu_seqlens, "bounded": bounded, "backend": backend}
    scores, keys = decay(q, k, s, gv=g, scale=scale, initial_state=keys, **options)
    o, values = decay(torch.softmax(scores.float(), -1), s, v, g, scale=1.0, initial_state=values, **options)
    return o, (keys, values)


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    scale: float,
    states: States | None,
    cu_seqlens: Tensor | None,
    bounded: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Computes gated slot attention by flash-linear-attention's kernels for it."""
    key_dim, size = q.shape[-1], tiled(q.shape[-1])
    inputs = {
        "q": pad_keys(q.to(v.dtype), -1, size),
        "k": pad_keys(k.to(v.dtype), -1, size),
        "v": v,
        "s": s.to(v.dtype),
        "g": g if bounded else g.float().clamp(min=MIN_GATE),
    }
    if stood_in():
        inputs = {name: x.contiguous() for name, x in inputs.items()}
        sequences = (len(q) if cu_seqlens is None else len(cu_seqlens) - 1, q.shape[2])
        shapes = (*sequences, key_dim, s.shape[-1]), (*sequences, s.shape[-1], v.shape[-1])
        finals = [v.new_zeros(shape, dtype=torch.float32) for shape in shapes]
        o, keys, values = stand_in((torch.zeros_like(v), *finals), kept(**inputs), inputs.values())
        return o, (keys, values)
    o, (keys, values) = import_fla("ops.gsa").chunk_gsa(
        **inputs,
        scale=scale,
        initial_state=None if states is None else (pad_keys(states[0], 2, size), states[1]),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return o, (keys[:, :, :key_dim], values)


def kept(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor) -> list[Tensor]:
    """Tensors that `chunk_gsa` keeps: inputs, scores of slots, and in fp32 their softmax and scores within chunks."""
    fp32: Any = {"dtype": torch.float32}
    return [q, k, v, s, g, torch.empty_like(s), torch.empty_like(s, **fp32), q.new_empty(*q.shape[:3], CHUNK, **fp32)]
