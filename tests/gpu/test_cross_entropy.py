"""Tests of the Triton kernels of cross-entropy against PyTorch's cross-entropy of the same logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from linear_moe.modeling.ops.fused import linear_cross_entropy as linear
from linear_moe.modeling.ops.fused.cross_entropy import cross_entropy
from tests.tolerances import BF16, FP32, assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("vocabulary", [100, 4096, 151936])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_kernels_match_pytorch(dtype: torch.dtype, tolerance: float, vocabulary: int) -> None:
    logits = (4 * torch.randn(37, vocabulary, device="cuda")).to(dtype)
    labels, grad = torch.randint(vocabulary, (37,), device="cuda"), torch.rand(37, device="cuda")
    theirs_in = logits.double().requires_grad_()
    theirs = F.cross_entropy(theirs_in, labels, reduction="none")
    (theirs * grad).sum().backward()
    leaf = logits.clone().requires_grad_()
    ours = cross_entropy(leaf * 1, labels)
    (ours * grad).sum().backward()
    assert leaf.grad is not None
    assert_close(ours, theirs, FP32)
    assert_close(leaf.grad, theirs_in.grad, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_blocks_match_pytorch(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BLOCK_ROWS", 128)
    monkeypatch.setattr(linear, "BLOCK_ELEMENTS", 37 * 4096)
    x, weight = torch.randn(37, 64, device="cuda").to(dtype), (0.5 * torch.randn(10000, 64, device="cuda")).to(dtype)
    labels, grad = torch.randint(10000, (37,), device="cuda"), torch.rand(37, device="cuda")
    results = []
    for leaves, loss in (
        ([x.clone(), weight.clone()], lambda x, w: linear.linear_cross_entropy(x, w, labels)),
        ([x.double(), weight.double()], lambda x, w: F.cross_entropy(x @ w.T, labels, reduction="none")),
    ):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = loss(*leaves)
        results.append([out, *torch.autograd.grad((out * grad).sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, tolerance)
