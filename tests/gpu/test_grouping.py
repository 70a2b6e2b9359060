"""Tests of the Triton kernels that regroup tokens against the PyTorch version, with all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.ops.fused.grouping import Grouping
from tests.gpu.kernels import DEVICE, HALF, MARKS
from tests.tolerances import FP32, assert_close

pytest.importorskip("triton")
from linear_moe.modeling.ops.fused import grouping_triton  # imports triton

pytestmark = MARKS


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "groups", "size", "documents"),
    [
        (2, 37, 2, 5, 64, None),
        (1, 70, 3, 4, 20, [0, 1, 2, 0, 40, 27, 0]),
        (3, 1, 1, 2, 1, None),
        (1, 5, 9, 3, 128, None),
    ],
)
def test_grouping(
    batch: int, length: int, heads: int, groups: int, size: int, documents: list[int] | None, dtype: torch.dtype
) -> None:
    """The kernels match the PyTorch version, which runs for tensors on the CPU."""
    offsets = None if documents is None else torch.tensor([0, *documents]).cumsum(0)
    chosen = draw(batch, length, groups).cpu() > 0.3
    on_cpu = Grouping(chosen, offsets)
    places = Grouping(chosen.to(DEVICE), None if offsets is None else offsets.to(DEVICE)).places
    assert torch.equal(places.cpu(), on_cpu.places)
    tolerance = FP32 if dtype == torch.float32 else HALF
    for own in (1, groups):
        x, dy = (draw(batch, length, heads, n, size, dtype=dtype, seed=n) for n in (own, groups))
        leaf = x.double().cpu().requires_grad_()
        expected = on_cpu.collect(leaf)
        actual = grouping_triton.scatter(x, places)
        assert actual.dtype == dtype
        assert torch.equal(actual.cpu(), expected.to(dtype))
        gradient = grouping_triton.gather(dy, places, total=own == 1)
        (wanted,) = torch.autograd.grad(expected, leaf, dy.double().cpu())
        assert_close(gradient.cpu().view(x.shape), wanted.to(dtype), tolerance)
    x, dy = draw(batch, length, heads, groups, size, dtype=dtype), draw(batch, length, heads, size, dtype=dtype, seed=2)
    weights = draw(batch, length, groups, seed=3)
    leaves = [t.double().cpu().requires_grad_() for t in (x, weights)]
    expected = on_cpu.combine(leaves[0], leaves[1])
    gradients = torch.autograd.grad(expected, leaves, dy.double().cpu())
    actual_results = [
        grouping_triton.gather(x, places, weights, total=True),
        *grouping_triton.scatter_weighted(dy, x, weights, places),
    ]
    for a, e in zip(actual_results, (expected, *gradients), strict=True):
        assert_close(a.cpu(), e.to(a.dtype), FP32 if a.dtype == torch.float32 else HALF)
