"""HGRN2 against the paper's equations and flash-linear-attention's recordings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.golden import compare_golden
from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import compare, randomise

VARIANTS: list[dict[str, Any]] = [{}, {"num_heads": 2, "conv_size": 4, "conv_bias": True, "lower_bound": "none"}]


def test_hgrn2_is_flash_linear_attentions() -> None:
    def bounds(mixer: Any, layout: Any, tensors: dict[str, Tensor]) -> None:
        mixer.lower_bound.bound = lambda x: tensors["input.lower_bound"].logit()

    compare_golden("hgrn2", "hgrn2", {"lower_bound": "fixed"}, dict, bounds)


@pytest.mark.parametrize(("kind", "conv_size"), [("learned", 0), ("fixed", 0), ("none", 4)])
def test_hgrn2_is_the_papers_equations(kind: str, conv_size: int) -> None:
    """Section 3 of arXiv 2404.07904, one token and one head at a time, in fp64; the third of four layers."""
    ours = build(
        "hgrn2",
        {"lower_bound": kind, "conv_size": conv_size, "conv_bias": conv_size > 0},
        at=replace(dims(), layer=2, num_layers=4),
    )
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}
    gamma = {"learned": w.get("lower_bound.logit", torch.zeros(())).sigmoid(), "fixed": 0.5, "none": 0.0}[kind]

    def projected(name: str, sequence: Tensor) -> Tensor:
        y = sequence @ w[f"{name}_proj.weight"].T
        if not conv_size:
            return y
        weight, bias = w[f"{name}_conv1d.weight"], w[f"{name}_conv1d.bias"]
        return F.conv1d(F.pad(y.T, (conv_size - 1, 0)), weight.unsqueeze(1), bias, groups=32).T

    def theirs(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.double():
            states, row = [torch.zeros(8, 8, dtype=torch.float64) for _ in range(4)], []
            for q, f, i in zip(*(projected(n, sequence) for n in "qfi"), strict=True):
                q, forget = q * q.sigmoid(), gamma + (1 - gamma) * f.sigmoid()
                for h in range(4):
                    at = slice(8 * h, 8 * h + 8)
                    states[h] = forget[at, None] * states[h] + torch.outer(1 - forget[at], i[at])
                o = torch.cat([q[8 * h : 8 * h + 8] @ states[h] for h in range(4)]) / 8**0.5
                o = o / (o.square().mean() + dims().norm_eps).sqrt() * w["g_norm.weight"]
                row.append(w["o_proj.weight"] @ o)
            outputs.append(torch.stack(row))
        return torch.stack(outputs)

    compare(ours, theirs)
