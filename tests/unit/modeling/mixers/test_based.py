"""Based against the paper's equations and flash-linear-attention's recordings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.fused.feature_maps import squares, taylor
from linear_moe.modeling.ops.fused.normalizer import normalized
from linear_moe.modeling.ops.recurrences.decay import decay
from tests.golden.golden import compare_golden
from tests.tolerances import FP32, FP64, assert_close
from tests.unit.modeling.mixers.common import build
from tests.unit.modeling.mixers.truth import compare, randomise

VARIANTS: list[dict[str, Any]] = [{"feature_dim": 4}, {"num_heads": 2, "feature_dim": 8}]


def pair(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, size, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    return q, k


def test_squares_and_taylor_are_the_kernels_they_stand_for() -> None:
    q, k = pair()
    s = (q * k).sum(-1)
    assert_close((squares(q) * squares(k)).sum(-1), s**2, FP64)
    s = s / 6**0.5
    assert_close((taylor(q) * taylor(k)).sum(-1), 1 + s + s**2 / 2, FP64)
    assert squares(q).shape[-1] == 21 and taylor(q).shape[-1] == 28
    assert torch.autograd.gradcheck(squares, (q,))


def test_zeros_behind_the_features_change_nothing() -> None:
    """Padding features with zeros, as the kernels need it, changes neither outputs nor states (of unpadded size)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 7, 2, 6, generator=generator) for _ in range(3))
    states = {n: torch.rand(1, 2, 6, c, generator=generator) for n, c in {"state": 6, "normalizer": 1}.items()}
    options: dict[str, Any] = {"eps": 0.1, "scale": 0.5, "cu_seqlens": None}
    for start in ({}, states):
        o, final = normalized(decay, q, k, v, **options, states=start)
        wide = (torch.nn.functional.pad(t, (0, 3)) for t in (q, k))
        padded, cut = normalized(decay, *wide, v, **options, states=start, features=6)
        assert_close(padded, o, FP32)
        for name in states:
            assert_close(cut[name], final[name], FP32, name)


def test_based_is_the_papers_equations() -> None:
    """Section 4.1 of arXiv 2402.18668 as attention: all pairs of tokens, in fp64."""
    ours = build("based", {})
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}

    def theirs(x: Tensor) -> Tensor:
        q, k, v = ((x.double() @ w[f"{n}_proj.weight"].T).unflatten(-1, (4, -1)).transpose(1, 2) for n in "qkv")
        s = q @ k.mT / 16**0.5
        weights = (1 + s + s**2 / 2).tril()
        o = (weights / weights.sum(-1, keepdim=True)) @ v
        return o.transpose(1, 2).flatten(2) @ w["o_proj.weight"].T

    compare(ours, theirs)


def test_based_is_flash_linear_attentions() -> None:
    compare_golden("based", "based", {}, dict)
