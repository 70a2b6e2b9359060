"""The scans on CUDA."""

from __future__ import annotations

from torch import Tensor

from linear_moe.modeling.ops.dispatch import fla
from linear_moe.modeling.ops.scan import chunk


def linear_scan(
    x: Tensor, g: Tensor, *, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `linear_moe.modeling.ops.scan.linear_scan`; flash-linear-attention's kernels, arithmetic in fp32.

    They are given neither an initial state nor documents: they have no gradient of the one, and their chunked form
    does not take the others. Both are in the first tokens' inputs and gates. Without an initial state, as in training,
    the final one is the last output, rounded to x's dtype.
    """
    inputs, gates = chunk.restart(x if initial_state is None else x.float(), g.float(), initial_state, cu_seqlens)
    h, _ = fla("ops.hgrn").chunk_hgrn(inputs, gates)
    return h.to(x.dtype), chunk.last(h, initial_state, cu_seqlens).float()


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `linear_moe.modeling.ops.scan.selective_scan`; our own Triton kernels, arithmetic in fp32."""
    from linear_moe.modeling.ops.scan.triton_kernels import selective_scan as kernels

    return kernels(u, dt, A, B, C, initial_state, cu_seqlens)


# A few batched matmuls, which is what a GPU does best.
diagonal_scan = chunk.diagonal_scan
