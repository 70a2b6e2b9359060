"""Tests of the regrouping of tokens against a stable sort of each document."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from linear_moe.modeling.ops.fused.grouping import Grouping
from tests.tolerances import FP32, assert_close


@pytest.mark.parametrize("offsets", [None, [0, 0, 5, 6, 6, 20, 23, 23]])
def test_chosen_tokens_come_first_in_their_document(offsets: list[int] | None) -> None:
    rows = 3 if offsets is None else 1
    chosen = torch.rand(rows, 23, 4, generator=torch.Generator().manual_seed(0)) > 0.6
    chosen[..., 3] = True
    chosen[..., 2] = False
    grouping = Grouping(chosen, None if offsets is None else torch.tensor(offsets))
    x = torch.arange(1.0, rows * 23 + 1).view(rows, 23, 1, 1, 1).expand(-1, -1, 2, -1, 3).clone().requires_grad_()
    regrouped = grouping.collect(x)
    for row in range(rows):
        for group in range(4):
            expected = []
            for start, end in pairwise(offsets or [0, 23]):
                mine = [x[row, t, 0, 0, 0].item() for t in range(start, end) if bool(chosen[row, t, group])]
                expected += mine + [0.0] * (end - start - len(mine))
            assert regrouped[row, :, 1, group, 2].tolist() == expected
    assert torch.equal(grouping.filled, regrouped[:, :, 0, :, 0] > 0)
    assert torch.equal(grouping.counts, chosen.sum(1))
    inside = chosen[:, :, None, :, None]
    weight = torch.randn(regrouped.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((regrouped * grouping.collect(weight)).sum(), x)
    assert_close(gradient, (weight * inside).sum(3, keepdim=True), FP32)
    weights = torch.randn(rows, 23, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    combined = grouping.combine(regrouped, weights)
    assert_close(combined, x[:, :, :, 0] * (weights * chosen).sum(2)[:, :, None, None], FP32)
    (gradient,) = torch.autograd.grad(combined.sum(), weights)
    assert_close(gradient, chosen * x.sum((2, 3, 4))[:, :, None], FP32)
