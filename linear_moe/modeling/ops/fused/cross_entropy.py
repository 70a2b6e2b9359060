"""Cross-entropy over a large vocabulary without fp32 copies of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.ops.kernels import has_triton

CHUNK_ELEMENTS = 2**26  # logits that the PyTorch version holds in fp32: 256 MiB


def _chunks(logits: Tensor) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return [slice(i, i + rows) for i in range(0, logits.shape[0], rows)]


def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss and the log-normaliser, `[N]` fp32, of `logits [N, V]` and `labels [N]`."""
    loss, normaliser = (torch.empty(len(labels), dtype=torch.float32, device=logits.device) for _ in range(2))
    for rows in _chunks(logits):
        part = logits[rows].float()
        normaliser[rows] = part.logsumexp(-1)
        loss[rows] = normaliser[rows] - part.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
    return loss, normaliser


def backward(logits: Tensor, labels: Tensor, normaliser: Tensor, grad: Tensor) -> None:
    """Overwrites `logits` with the gradient `(softmax - onehot) * grad`; a label outside of [0, V) has no column."""
    columns = logits.shape[1]
    inside = (labels >= 0) & (labels < columns)
    labels = labels.clamp(0, columns - 1)
    for rows in _chunks(logits):
        p = (logits[rows].float() - normaliser[rows].unsqueeze(-1)).exp_()
        p.scatter_add_(-1, labels[rows].unsqueeze(-1), -inside[rows].unsqueeze(-1).to(p.dtype))
        logits[rows] = p.mul_(grad[rows].unsqueeze(-1)).to(logits.dtype)


class _CrossEntropy(Function):
    """Cross-entropy whose gradient overwrites the logits, so that no second tensor of their size is in memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.backend = None
        if logits.is_cuda and has_triton():
            from linear_moe.modeling.ops.fused import cross_entropy_triton

            ctx.backend = cross_entropy_triton
        with torch.cuda.device_of(logits):  # Triton launches on the current device; autograd sets it in backward
            loss, normaliser = (ctx.backend.forward if ctx.backend else forward)(logits, labels)
        ctx.save_for_backward(labels, normaliser)
        ctx.logits = logits.detach()
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        labels, normaliser = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        assert logits is not None, "the gradient has overwritten the logits: there is only one backward pass"
        (ctx.backend.backward if ctx.backend else backward)(logits, labels, normaliser, grad)
        return logits, None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns `log sum_j exp(logits_j) - logits_label`, `[N]` fp32, of `logits [N, V]` and `labels [N]` int64.

    The backward pass, if there is one, overwrites `logits` with their gradient: nothing else may use `logits` after it,
    and there is only one backward pass. Triton kernels compute both passes on CUDA, PyTorch elsewhere.
    """
    return _CrossEntropy.apply(logits, labels)
