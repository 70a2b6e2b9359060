"""Implementations of the scans on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.modeling.ops.kernels import stand_in, stood_in
from linear_moe.modeling.ops.recurrences.scan import chunk


def linear_scan(
    x: Tensor, g: Tensor, *, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.linear_scan`. Our own Triton kernels compute the scan in fp32.

    flash-linear-attention 0.6.0's `chunk_hgrn` cannot serve. In every block it reads what other threads wrote in the
    block before, without a barrier between, and on Hopper its outputs are wrong, by 9 % over 1500 tokens.
    """
    if stood_in():
        sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        h, final = torch.zeros_like(x), x.new_zeros(sequences, x.shape[-1], dtype=torch.float32)
        return stand_in((h, final), kept_linear(h, g), (x, g, initial_state))
    from linear_moe.modeling.ops.recurrences.scan.linear_triton import linear_scan as kernels

    return kernels(x, g, initial_state, cu_seqlens)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `recurrences.scan.selective_scan`. Our own Triton kernels compute the scan in fp32."""
    if stood_in():
        inputs = [x.contiguous() for x in (u, dt, A.float(), B, C)]
        outputs = torch.zeros_like(u, memory_format=torch.contiguous_format), torch.zeros_like(initial_state)
        return stand_in(outputs, kept_selective(*inputs), (*inputs, initial_state))
    from linear_moe.modeling.ops.recurrences.scan.selective_triton import selective_scan as kernels

    return kernels(u, dt, A, B, C, initial_state, cu_seqlens)


def kept_linear(h: Tensor, g: Tensor) -> list[Tensor]:
    """Tensors that the linear scan's kernel keeps: its output and the gate."""
    return [h, g]


def kept_selective(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
    """Tensors that the selective scan's kernel keeps of whole rows: its inputs and states before blocks of tokens."""
    return [u, dt, A, B, C, A.new_empty(len(u) * -(-u.shape[1] // chunk.BLOCK), *A.shape)]


# The PyTorch version is a few batched matmuls, which need no kernel of our own on a GPU.
diagonal_scan = chunk.diagonal_scan
