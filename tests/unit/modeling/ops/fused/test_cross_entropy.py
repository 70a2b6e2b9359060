"""Tests of cross-entropy against PyTorch's own, with chunks and blocks of several sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.fused import cross_entropy as module
from linear_moe.modeling.ops.fused import linear_cross_entropy as linear
from tests.tolerances import BF16, FP32, assert_close


@pytest.mark.parametrize("elements", [1, 300, 10**6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_equals_pytorch(dtype: torch.dtype, tolerance: float, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    x, weight = torch.randn(17, 8), torch.randn(100, 8)
    labels, grad = torch.randint(100, (17,)), torch.rand(17)
    results = []
    for loss in (module.cross_entropy, lambda z, y: F.cross_entropy(z.float(), y, reduction="none")):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        out = loss(3 * F.linear(*leaves), labels)
        results.append([out, *torch.autograd.grad((out * grad).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("elements", [1, 17 * 256, 10**6])  # makes three blocks of the vocabulary, two, one
@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_in_blocks(
    dtype: torch.dtype, tolerance: float, shares: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks give PyTorch's losses and gradients, also for two shares that merge log-normalisers and labels' logits."""
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "BLOCK_ROWS", 128)
    monkeypatch.setattr(linear, "BLOCK_ELEMENTS", elements)
    x, weight = torch.randn(17, 8).to(dtype), (3 * torch.randn(600, 8)).to(dtype)
    labels, grad = torch.randint(600, (17,)), torch.rand(17)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    theirs = F.cross_entropy(F.linear(*leaves), labels, reduction="none")
    expected = [theirs, *torch.autograd.grad((theirs * grad).sum(), leaves)]

    size = 600 // shares
    logits = (x @ weight.T).float()
    normaliser = logits.logsumexp(-1)
    target = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    seen, dx, dweights = [], torch.zeros(17, 8, dtype=torch.float64), []

    def merge(own_normaliser: Tensor, own_target: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((own_normaliser, own_target))
        return normaliser, target

    for first in range(0, 600, size):
        leaves = [x.clone().requires_grad_(), weight[first : first + size].clone().requires_grad_()]
        options = {"first": first, "merge": merge} if shares > 1 else {}
        ours = linear.linear_cross_entropy(*leaves, labels, **options)
        part, dweight = torch.autograd.grad((ours * grad).sum(), leaves)
        assert (ours.dtype, part.dtype, dweight.dtype) == (torch.float32, dtype, dtype)
        assert_close(ours, expected[0], tolerance)
        dx += part
        dweights.append(dweight)
    assert_close(dx, expected[1], tolerance)
    assert_close(torch.cat(dweights), expected[2], tolerance)
    if shares > 1:
        assert_close(torch.stack([z for z, _ in seen]).logsumexp(0), normaliser, FP32)
        assert_close(torch.stack([t for _, t in seen]).sum(0), target, FP32)


def test_one_backward_pass_only() -> None:
    loss = module.cross_entropy(torch.randn(3, 5, requires_grad=True) * 1, torch.tensor([0, 1, 2])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward pass"):
        loss.backward()
