"""Linear and RMSNorm on one and on two tensor ranks, against PyTorch's own arithmetic."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import RMSNorm, l2_norm
from tests.tolerances import FP32, assert_close


class Rank(Host):
    """Host of one of two tensor ranks, which keeps the tensors to reduce and counts shared weights."""

    def __init__(self, rank: int = 0):
        super().__init__()
        self.tensor_rank, self.shared_calls = rank, 0

    def size(self, axis: str) -> int:
        return 2 if axis == "tensor" else 1

    def rank(self, axis: str) -> int:
        return self.tensor_rank if axis == "tensor" else 0

    def shared(self, weight: torch.Tensor) -> torch.Tensor:
        self.shared_calls += 1
        return weight


def pair(split: Literal["column", "row", "shared"] | None, bias: bool) -> tuple[Linear, list[Linear]]:
    layers = []
    for host in (Host(), Rank(0), Rank(1)):
        layer = Linear(host, 8, 6, split=split, bias=bias, std=0.5)
        initialize(layer, host, seed=0)
        if bias:
            with torch.no_grad():  # values that are not zero and differ between outputs
                full = torch.arange(6.0)
                layer.bias.copy_(full.chunk(2)[host.rank("tensor")] if len(layer.bias) == 3 else full)
        layers.append(layer)
    return layers[0], layers[1:]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("split", ["column", "row", "shared", None])
def test_ranks_together_are_the_full_layer(split: Literal["column", "row", "shared"] | None, bias: bool) -> None:
    full, ranks = pair(split, bias)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    expected = x @ full.weight.T + (torch.arange(6.0) if bias else 0.0)
    assert_close(full(x), expected, FP32)
    if split == "column":
        actual = torch.cat([rank(x) for rank in ranks], -1)
    elif split == "row":
        # A real host sums inside `leave`, and every rank adds the bias after the sum: here both terms have added it.
        actual = sum(rank(part) for rank, part in zip(ranks, x.chunk(2, -1), strict=True))
        actual = actual - torch.arange(6.0) if bias else actual
    else:
        actual = ranks[1](x)
    assert_close(actual, expected, FP32)
    host = ranks[1].host
    assert isinstance(host, Rank) and host.shared_calls == (1 + bias if split == "shared" else 0)


def test_linear_is_nn_linear_and_initialised() -> None:
    layer = Linear(Host(), 64, 64, bias=True, std=0.02)
    initialize(layer, Host(), seed=0)
    assert isinstance(layer, nn.Linear) and float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not layer.bias.any()
    decays = {name: p.spec.decay for name, p in layer.named_parameters()}  # type: ignore[attr-defined]
    assert decays == {"weight": True, "bias": False}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_norm(groups: int) -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 1.5, 8)
    norm = RMSNorm(Host(), 8, eps=0.1, split="column", groups=groups)
    norm.weight.data.copy_(weight)
    size = 8 // groups
    parts = [part / (part.square().mean(-1, keepdim=True) + 0.1).sqrt() for part in x.split(size, -1)]
    assert_close(norm(x), torch.cat(parts, -1) * weight, FP32)
    if groups % 2 == 0:
        halves = []
        for rank in (0, 1):
            local = RMSNorm(Rank(rank), 8, eps=0.1, split="column", groups=groups)
            local.weight.data.copy_(weight.chunk(2)[rank])
            halves.append(local(x.chunk(2, -1)[rank]))
        assert_close(torch.cat(halves, -1), norm(x), FP32)
    else:
        with pytest.raises(AssertionError):  # a group would straddle ranks
            RMSNorm(Rank(), 12, split="column", groups=3)


def test_norm_of_heads_shares_its_weight() -> None:
    host = Rank()
    norm = RMSNorm(host, 8, split="shared")
    initialize(norm, host, seed=0)
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    assert_close(norm(x), F.rms_norm(x, (8,), None, 1e-5), FP32)
    assert host.shared_calls == 1 and not norm.weight.spec.decay  # type: ignore[attr-defined]


def test_l2_norm() -> None:
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    assert_close(l2_norm(x), F.normalize(x), FP32)
    tiny = 1e-4 * x
    assert_close(l2_norm(tiny), tiny * (tiny.square().sum(-1, keepdim=True) + 1e-6).rsqrt(), FP32)
