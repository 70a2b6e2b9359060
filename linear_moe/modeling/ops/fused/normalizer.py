"""The normaliser of linear attention (arXiv 2006.16236): outputs are weighted means of values, not sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.backends import pad_keys, requested
from linear_moe.modeling.ops.kernels import fused, has_triton, stand_in, stood_in

NAMES = ("state", "normalizer")
KERNEL_CHUNK = 64  # tokens of which our kernels keep the sum of the keys


def normalized(
    op: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float,
    scale: float,
    states: dict[str, Tensor],
    cu_seqlens: Tensor | None,
    features: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns normalised outputs `o_t = S_t^T q_t / (z_t^T q_t + eps)`, and the final states.

    S is the state of `op`, and z the state that `op` has if all values are 1. The denominators come from a second call
    of the op, in which v is one column of ones: so the op takes care of packing, initial states and decoding. A column
    appended to v would copy v and o, leave their rows unaligned and round V = 64 or 128 up to twice as many columns of
    the GPU kernels' tiles. A running sum of k would be K fp32 numbers a head and token to write and to read, several
    times the bytes that the recurrence itself moves. For 16-bit tensors on CUDA without initial states, Triton kernels
    compute the denominators instead, with one running sum for each chunk of tokens.

    Args:
        op: `decay`, or an op with its signature.
        q, k, v, scale, cu_seqlens: the arguments of the op. The features q and k should not be negative.
        eps: added to the denominators.
        states: initial states, "state" `[N, H, K, V]` and "normalizer" `[N, H, K, 1]`; empty: zeros.
        features: K of the states, if q and k are padded with zeros behind K features.

    Returns:
        `o [B, T, H, V]` and the final states by name.
    """
    size = q.shape[-1]
    starts = [None if (s := states.get(name)) is None else pad_keys(s, 2, size) for name in NAMES]
    kernels = not states and sequence.current() is None and _has_kernels(q, k, v)
    if kernels and stood_in():
        q, k = q.contiguous(), k.contiguous()
        sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
        total = q.new_zeros(*q.shape[:3], 1, dtype=torch.float32)
        final = q.new_zeros(sequences, *q.shape[2:], 1, dtype=torch.float32)
        q, k, total, sums = stand_in((q.view_as(q), k.view_as(k), total, final), kept(q, k), (q, k))
    elif kernels:
        from linear_moe.modeling.ops.fused.normalizer_triton import totals

        q, k, total, sums = totals(q, k, scale, cu_seqlens)
    o, state = op(q, k, v, scale=scale, initial_state=starts[0], cu_seqlens=cu_seqlens)
    if not kernels:
        ones = v.new_ones(1).expand(*v.shape[:-1], 1)
        total, sums = op(q, k, ones, scale=scale, initial_state=starts[1], cu_seqlens=cu_seqlens)
    if features is not None and features < size:
        state, sums = state[:, :, :features], sums[:, :, :features]
    y = fused(divide, "normalizer_triton", o, total, eps=eps) if kernels else divide(o, total, eps=eps)
    return y, {"state": state, "normalizer": sums}


def kept(q: Tensor, k: Tensor) -> list[Tensor]:
    """Tensors that the kernels of `totals` keep: q, k and the sums of keys until the end of every chunk in fp32."""
    return [q, k, q.new_empty(len(q), -(-q.shape[1] // KERNEL_CHUNK), *q.shape[2:], dtype=torch.float32)]


def divide(o: Tensor, total: Tensor, *, eps: float) -> Tensor:
    """Divides `o [B, T, H, V]` by `total + eps`, `[B, T, H, 1]`; the quotient has o's dtype."""
    return (o / (total + eps)).to(o.dtype)


def _has_kernels(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the denominators have kernels, which is where the op's GPU kernels, for 16-bit tensors, run too."""
    there = stood_in() or (v.is_cuda and has_triton())
    of_one_kind = v.element_size() == 2 and q.dtype == k.dtype == v.dtype
    return there and of_one_kind and requested("auto") in ("auto", "gpu")
