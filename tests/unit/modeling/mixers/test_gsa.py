"""Gated slot attention against the paper's equations and flash-linear-attention's recordings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.golden import compare_golden
from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import compare, convolved, randomise

VARIANTS: list[dict[str, Any]] = [
    {"num_slots": 8},
    {"num_slots": 64, "num_heads": 2, "scale": 0.5, "gate_normalizer": 2.0},
    {"num_slots": 6, "num_kv_heads": 2, "conv_size": 4, "feature_map": "relu", "expand_k": 0.5, "expand_v": 2.0},
]


@pytest.mark.parametrize("more", [{}, {"num_kv_heads": 2, "conv_size": 4, "feature_map": "relu"}])
def test_gsa_is_the_papers_equations(more: dict[str, Any]) -> None:
    """Section 3.2 of arXiv 2409.07146, one token and one head at a time, in fp64."""
    ours = build("gsa", {"num_slots": 8, "scale": 0.5, "gate_normalizer": 2.0} | more)
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}

    def swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def theirs(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.double():
            keys, values = (
                [torch.zeros(8, 8, dtype=torch.float64)] * 4 for _ in range(2)
            )  # [slots, size] of each head
            row = []
            projected = [sequence @ w[f"{n}_proj.weight"].T for n in "qkv"]
            if more:
                projected = [convolved(x, w[f"{n}_conv1d.weight"]) for n, x in zip("qkv", projected, strict=True)]
            for token, *qkv in zip(sequence, *projected, strict=True):
                q, k, v = (x.clamp_min(0) if more and i < 2 else swish(x) for i, x in enumerate(qkv))
                alpha, heads = torch.sigmoid(w["f_proj.weight"] @ token) ** (1 / 2), []
                for h in range(4):
                    one, group = (slice(8 * n, 8 * n + 8) for n in (h, h // 2 if more else h))
                    a = alpha[group, None]
                    keys[h] = a * keys[h] + (1 - a) * k[group]
                    values[h] = a * values[h] + (1 - a) * v[group]
                    heads.append(values[h].T @ torch.softmax(0.5 * keys[h] @ q[one], 0))
                o = swish(torch.cat(heads))
                o = o / (o.square().mean() + dims().norm_eps).sqrt() * w["o_norm.weight"]
                row.append(w["o_proj.weight"] @ o)
            outputs.append(torch.stack(row))
        return torch.stack(outputs)

    compare(ours, theirs)


def test_gsa_is_flash_linear_attentions() -> None:
    def names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace("g_norm", "o_norm"): value for key, value in tensors.items()}

    compare_golden("gsa", "gsa", {}, names)
