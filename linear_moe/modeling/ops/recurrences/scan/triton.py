"""Implementations of the scans on CUDA."""

from __future__ import annotations

from torch import Tensor

from linear_moe.modeling.ops.recurrences.scan import chunk


def linear_scan(
    x: Tensor, g: Tensor, *, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.linear_scan`. Our own Triton kernels compute the scan in fp32.

    flash-linear-attention 0.6.0's `chunk_hgrn` cannot serve. In every block it reads what other threads wrote in the
    block before, without a barrier between, and on Hopper its outputs are wrong, by 9 % over 1500 tokens.
    """
    from linear_moe.modeling.ops.recurrences.scan.linear_triton import linear_scan as kernels

    return kernels(x, g, initial_state, cu_seqlens)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.selective_scan`. Our own Triton kernels compute the scan in fp32."""
    from linear_moe.modeling.ops.recurrences.scan.selective_triton import selective_scan as kernels

    return kernels(u, dt, A, B, C, initial_state, cu_seqlens)


# The PyTorch version is a few batched matmuls, which need no kernel of our own on a GPU.
diagonal_scan = chunk.diagonal_scan
