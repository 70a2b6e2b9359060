"""Several writes of the delta rule per token: DeltaProduct (arXiv 2502.10297)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import check_inputs, choose, decodes, pad_keys, requested, run_fla
from linear_moe.modeling.ops.packing import by_token, separately, start_state
from linear_moe.modeling.ops.recurrences.delta import chunk, fla
from linear_moe.modeling.ops.recurrences.delta.decode import step as delta_step
from linear_moe.modeling.ops.recurrences.delta.summary import through


def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bounded: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the delta rule with n writes per token (DeltaProduct, arXiv 2502.10297).

    S_t0 = exp(g_t) S_{t-1},  S_ti = S_t(i-1) + beta_ti k_ti (v_ti - k_ti^T S_t(i-1))^T for i = 1..n,
    S_t = S_tn,  o_t = scale * S_t^T q_t.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, n, H, K]`, v: `[B, T, n, H, V]`, beta: `[B, T, n, H]`: the writes of a token in their order.
        g: `[B, T, H]` log-decay, at most 0; None: no decay.
        scale, initial_state, cu_seqlens, bounded, backend: as for `recurrences.delta.delta`; offsets count tokens, not
            writes.

    Returns:
        `o [B, T, H, V]` in v's dtype and the final state `[N, H, K, V]` in fp32; both differentiable in every input.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit; ImportError: "gpu" without its packages.
    """
    if k.ndim != 5 or v.ndim != 5 or k.shape[2] == 0 or v.shape[2] != k.shape[2]:
        raise ValueError(f"k and v must be [B, T, n, H, K] and [B, T, n, H, V], got {[*k.shape]} and {[*v.shape]}")
    per_head, writes = tuple(q.shape[:3]), (*q.shape[:2], k.shape[2], q.shape[2])
    gates = {"beta": (beta, (writes,)), "g": (g, (per_head,))}
    check_inputs(q, k[:, :, 0], v[:, :, 0], gates, initial_state, cu_seqlens)
    scale, backend = q.shape[-1] ** -0.5 if scale is None else scale, requested(backend)
    if backend == "auto" and decodes(q.shape[1], initial_state, cu_seqlens):
        assert initial_state is not None
        return step(q, k, v, beta, g, state=initial_state, scale=scale)
    implementations = IMPLEMENTATIONS | {"gpu": partial(_gpu, bounded=bounded)}
    implementation = choose(backend, implementations, v, fla.unsupported(q, v))
    if (pieces := sequence.current(initial_state)) is not None:
        options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "bounded": bounded}
        kernels = implementation is implementations["gpu"]
        return through(pieces, implementation, q, k, v, beta, g, kernels=kernels, expand=_one_by_one, **options)
    return implementation(q, k, v, beta, g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in fp32."""
    state = start_state(q, v[:, :, 0], initial_state, cu_seqlens)
    inputs: list[Any] = [None if x is None else x.float() for x in (q.float() * scale, k, v, beta, g)]
    o, state = _tokens(state, *inputs) if cu_seqlens is None else separately(_tokens, inputs, state, cu_seqlens)
    return o.to(v.dtype), state


def _tokens(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs = []
    for q_t, k_t, v_t, beta_t, g_t in by_token(q, k, v, beta, g):
        if g_t is not None:
            state = g_t[..., None, None].exp() * state
        for key, value, strength in by_token(k_t, v_t, beta_t[..., None]):
            write = strength * (value - torch.einsum("bhk,bhkv->bhv", key, state))
            state = state + key[..., None] * write[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    return torch.stack(outputs, dim=1), state


def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs the delta rule on the sequence of all writes: see `_one_by_one`."""
    n = k.shape[2]
    offsets = None if cu_seqlens is None else cu_seqlens * n
    writes = _one_by_one(q, k, v, beta, g)
    o, state = chunk.delta(*writes, scale=scale, initial_state=initial_state, cu_seqlens=offsets)
    return o.unflatten(1, (-1, n))[:, :, -1], state


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Returns inputs of `delta` in which every write is a token: g at a token's first write, q at its last, else 0."""
    n = k.shape[2]
    q = F.pad(q[:, :, None], (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
    g = None if g is None else F.pad(g[:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)
    return q, k.flatten(1, 2), v.flatten(1, 2), beta.flatten(1, 2), g


def _gpu(
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
    """Runs flash-linear-attention's kernels. Products are in v's dtype, and gates below -80 count as -80."""
    n, keys = k.shape[2], q.shape[-1]
    q, k, g = fla.prepared(q, k, v, g, bounded)
    o, state = run_fla(
        "ops.gated_delta_product",
        "chunk_gated_delta_product",
        fla.kept,
        q,
        k=k.flatten(1, 2),
        v=v.flatten(1, 2),
        g=g,
        beta=beta.flatten(1, 2),
        num_householder=n,
        scale=scale,
        initial_state=None if initial_state is None else pad_keys(initial_state, 2, q.shape[-1]),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return o.to(v.dtype), state[:, :, :keys]


def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, *, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Advances `state [B, H, K, V]` (fp32) IN PLACE by one token; inputs as for `delta_product`, T = 1, no gradients.

    Returns:
        `o [B, 1, H, V]` in v's dtype, and `state` itself.
    """
    o = q
    for i in range(k.shape[2]):
        gate = g if i == 0 else None
        o, state = delta_step(q, k[:, :, i], v[:, :, i], beta[:, :, i], gate, state=state, scale=scale)
    return o, state


IMPLEMENTATIONS = {"reference": _reference, "chunk": _chunk, "gpu": _gpu}
