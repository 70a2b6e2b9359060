"""Token shift: interpolations between every token and the one before it (RWKV), in one pass on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.fused.short_conv import tokens_before
from linear_moe.modeling.ops.kernels import fused
from linear_moe.modeling.ops.packing import documents

MOST = 6  # interpolations that one call of the kernels computes at most


def shift_mix(
    x: Tensor,
    share: Tensor,
    more: Tensor | None = None,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Returns `y_i[t] = x[t] + (x[t - 1] - x[t]) * (share_i + more_i[t])` for i = 1..n.

    The token before the first one of a row or document is its state, or zeros. Every step is rounded to x's dtype, as
    in the published layers: the first outputs of an RWKV-6 head can be near 0, and the head's norm then amplifies any
    difference in rounding. Triton kernels on CUDA; only the inputs are saved for backward.

    Args:
        x: `[B, T, C]`.
        share: `[n, C]`, n up to 6, the share of the token before, for all tokens alike.
        more: `[n, B, T, C]`, an addition to the share for every token; None: zeros.
        state: `[N, C]`, the token before each row, or before each packed document.
        cu_seqlens: `[documents + 1]` int64 offsets of packed documents, B = 1; documents may be empty.

    Returns:
        n tensors `[B, T, C]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    count, width = share.shape
    if width != x.shape[-1] or not 1 <= count <= MOST:
        raise ValueError(f"share must be [at most {MOST}, {x.shape[-1]}], got {tuple(share.shape)}")
    if more is not None and tuple(more.shape) != (count, *x.shape):
        raise ValueError(f"more must be {(count, *x.shape)}, got {tuple(more.shape)}")
    if sequence.current(state) is not None:
        ((x, before),) = tokens_before([x], 1)
        state = before.squeeze(1)
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if state is not None and tuple(state.shape) != (sequences, width):
        raise ValueError(f"state must be {(sequences, width)}, got {tuple(state.shape)}")
    document = None if cu_seqlens is None else documents(cu_seqlens, x.shape[1])
    first = None if cu_seqlens is None else cu_seqlens[document].int()
    document = None if state is None or document is None else document.int()
    return fused(definition, "shift_mix_triton", x, share, more, state, first, document)


def definition(
    x: Tensor,
    share: Tensor,
    more: Tensor | None,
    state: Tensor | None,
    first: Tensor | None,
    document: Tensor | None,
) -> tuple[Tensor, ...]:
    """See `shift_mix`.

    Args:
        first: `[T]`, the first token of each token's document; None: every row is one document.
        document: `[T]`, the number of each token's document; None: rows, or no state.
    """
    if first is not None:
        begins = (first == torch.arange(len(first), device=x.device))[:, None]
        states = x.new_zeros(())
        if state is not None:
            assert document is not None
            states = state.to(x.dtype).index_select(0, document)
        before = torch.where(begins, states, x.roll(1, dims=1))
    else:
        start = torch.zeros_like(x[:, :1]) if state is None else state.to(x.dtype).unsqueeze(1)
        before = torch.cat([start, x[:, :-1]], dim=1)
    change, weights = before - x, share.to(x.dtype)[:, None, None]
    if more is not None:
        weights = weights + more.to(x.dtype)
    return tuple(x + change * w for w in weights)
