"""The normaliser of linear attention (arXiv 2006.16236): outputs are weighted means of values, not sums."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from linear_moe.modeling.ops.dispatch import pad_keys

NAMES = ("state", "normalizer")


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
    """`o_t = q_t S_t / (q_t z_t + eps)`, with S the state of `op` and z the one it has for values of 1.

    The denominators are a second call of the op, with one column of ones for v: packing, initial states and decoding
    are the op's. A column appended to v would copy v and o, leave their rows unaligned and round V = 64 or 128 up to
    twice as many columns of the GPU kernels' tiles; a running sum of k would be K fp32 numbers a head and token to
    write and to read, several times the bytes that the recurrence itself moves.

    Args:
        op: `decay`, or one with its signature.
        q, k, v, scale, cu_seqlens: as the op's. The features should not be negative.
        states: "state" `[N, H, K, V]` and "normalizer" `[N, H, K, 1]`, or none: zeros.
        features: K of the states, where q and k have zeros behind that.

    Returns:
        `o [B, T, H, V]` and the final states by name.
    """
    ones, size = v.new_ones(1).expand(*v.shape[:-1], 1), q.shape[-1]
    before, sums = (None if (s := states.get(name)) is None else pad_keys(s, 2, size) for name in NAMES)
    o, state = op(q, k, v, scale=scale, initial_state=before, cu_seqlens=cu_seqlens)
    total, sums = op(q, k, ones, scale=scale, initial_state=sums, cu_seqlens=cu_seqlens)
    if features is not None and features < size:
        state, sums = state[:, :, :features], sums[:, :, :features]
    return o / (total + eps), {"state": state, "normalizer": sums}
