"""Cross-entropy on CUDA in two Triton kernels: the logits are read once forward, read and overwritten once backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns that a program takes at once: 32 elements for each thread of 4 warps
WARPS = 4


@triton.jit
def _forward(logits, labels, loss, normaliser, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    top = float("-inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(logits + offsets, mask=offsets < columns, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), 0)
        top = new_top
    z = top + tl.log(total)
    tl.store(normaliser + row, z)
    tl.store(loss + row, z - tl.load(logits + tl.load(labels + row)).to(tl.float32))


@triton.jit
def _backward(logits, labels, normaliser, grad, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label, z, scale = tl.load(labels + row), tl.load(normaliser + row), tl.load(grad + row)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    x = tl.load(logits + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    p = (tl.exp(x - z) - (offsets == label).to(tl.float32)) * scale
    tl.store(logits + offsets, p.to(logits.dtype.element_ty), mask=inside)


def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss and the log-normaliser, `[N]` fp32, of `logits [N, V]`, rows contiguous, and `labels [N]`."""
    loss, normaliser = (torch.empty(len(labels), dtype=torch.float32, device=logits.device) for _ in range(2))
    if len(labels):
        columns, stride = logits.shape[1], logits.stride(0)
        _forward[(len(labels),)](logits, labels, loss, normaliser, columns, stride, BLOCK, num_warps=WARPS)
    return loss, normaliser


def backward(logits: Tensor, labels: Tensor, normaliser: Tensor, grad: Tensor) -> None:
    """Overwrites `logits` with the gradient `(softmax - onehot) * grad`; a label outside of [0, V) has no column."""
    if len(labels):
        columns, stride = logits.shape[1], logits.stride(0)
        grid = (len(labels), triton.cdiv(columns, BLOCK))
        _backward[grid](logits, labels, normaliser, grad.contiguous(), columns, stride, BLOCK, num_warps=WARPS)
