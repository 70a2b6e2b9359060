"""Against PyTorch's own cross-entropy, with chunks of several sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from linear_moe.modeling.ops import cross_entropy as module
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


def test_one_backward_pass_only() -> None:
    loss = module.cross_entropy(torch.randn(3, 5, requires_grad=True) * 1, torch.tensor([0, 1, 2])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward pass"):
        loss.backward()
