"""Summaries of pieces for the scans of single channels, and gradients of their initial states.

On CUDA, a Triton kernel computes both in closed form; elsewhere both come from running the op.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops import sequence
from linear_moe.modeling.ops.kernels import has_triton

Op = Callable[..., tuple[Tensor, Tensor]]
"""An implementation of `linear_scan` or `selective_scan`."""


def linear(pieces: sequence.Pieces, op: Op, x: Tensor, g: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs `linear_scan` on pieces of sequences, by the implementation `op`."""

    def summary(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if on_kernel(x):
            left, state = _weighted_sum(x, None, g, None)
            return left.squeeze(-1), state.squeeze(-1)
        _, final = op(x, g, initial_state=torch.zeros_like(x[:, 0]).float(), cu_seqlens=None)
        return g.float().sum(1).exp(), final

    def gradient(x: Tensor, g: Tensor, d_h: Tensor) -> Tensor:
        if on_kernel(d_h):
            return _weighted_sum(d_h, None, g, None, backwards=True)[1].squeeze(-1)
        start = torch.zeros_like(x[:, 0]).float()
        return sequence.start_gradient(lambda state: op(x, g, initial_state=state, cu_seqlens=None), start, d_h)

    def run(initial_state: Tensor) -> tuple[Tensor, Tensor]:
        return op(x, g, initial_state=initial_state, cu_seqlens=cu_seqlens)

    return pieces.through(run, (summary, x, g), (gradient, x, g))


def selective(
    pieces: sequence.Pieces,
    op: Op,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs `selective_scan` on pieces of sequences, by the implementation `op`."""
    fixed = A.detach()

    def summary(u: Tensor, dt: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        if on_kernel(u):
            return _weighted_sum(u, B, dt, fixed, factor=True)
        start = fixed.new_zeros(len(u), *fixed.shape)
        _, final = op(u, dt, fixed, B, torch.zeros_like(B), initial_state=start, cu_seqlens=None)
        return (dt.float().sum(1)[..., None] * fixed).exp(), final

    def gradient(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, d_y: Tensor) -> Tensor:
        if on_kernel(d_y):
            return _weighted_sum(d_y, C, dt, fixed, backwards=True)[1]
        start = fixed.new_zeros(len(u), *fixed.shape)
        return sequence.start_gradient(
            lambda state: op(u, dt, fixed, B, C, initial_state=state, cu_seqlens=None), start, d_y
        )

    def run(initial_state: Tensor) -> tuple[Tensor, Tensor]:
        return op(u, dt, A, B, C, initial_state=initial_state, cu_seqlens=cu_seqlens)

    return pieces.through(run, (summary, u, dt, B), (gradient, u, dt, B, C))


def on_kernel(x: Tensor) -> bool:
    """Whether the Triton kernel sums, by the rule of `choose` for "auto": for 16-bit tensors on CUDA."""
    return x.is_cuda and x.element_size() == 2 and has_triton()


def _weighted_sum(x: Tensor, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Calls `summary_triton.weighted_sum` on the device of `x`."""
    kernels = importlib.import_module("linear_moe.modeling.ops.recurrences.scan.summary_triton")
    with torch.cuda.device_of(x):
        left_and_sum: tuple[Tensor, Tensor] = kernels.weighted_sum(x, *inputs, **options)
    return left_and_sum
