"""Regrouping of tokens against a stable sort of each document."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from linear_moe.modeling.ops.grouping import Grouping


@pytest.mark.parametrize("offsets", [None, [0, 0, 5, 6, 6, 20, 23, 23]])
def test_chosen_tokens_come_first_in_their_document(offsets: list[int] | None) -> None:
    rows = 3 if offsets is None else 1
    chosen = torch.rand(rows, 23, 4, generator=torch.Generator().manual_seed(0)) > 0.6
    chosen[..., 3] = True
    chosen[..., 2] = False
    grouping = Grouping(chosen, None if offsets is None else torch.tensor(offsets))
    x = torch.arange(rows * 23.0).view(rows, 23, 1, 1, 1).expand(-1, -1, 2, -1, 3).clone().requires_grad_()
    regrouped = grouping.collect(x)
    for row in range(rows):
        for group in range(4):
            expected = []
            for start, end in pairwise(offsets or [0, 23]):
                for wanted in (True, False):
                    expected += [row * 23.0 + t for t in range(start, end) if bool(chosen[row, t, group]) == wanted]
            assert regrouped[row, :, 1, group, 2].tolist() == expected
    assert torch.equal(grouping.restore(regrouped), x.expand(-1, -1, -1, 4, -1))
    assert torch.equal(grouping.counts, chosen.sum(1))
    weight = torch.randn(regrouped.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((regrouped * weight).sum(), x)
    assert torch.allclose(gradient, grouping.restore(weight).sum(3, keepdim=True))
