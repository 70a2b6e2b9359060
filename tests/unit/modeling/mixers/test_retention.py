"""Retention against the paper's equations and flash-linear-attention's recordings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.golden import compare_golden
from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import compare, convolved, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2, "conv_size": 4, "feature_map": "swish", "expand_v": 1.0},
    {"feature_map": "relu", "output_gate": False, "num_heads": 2, "expand_k": 2.0, "rope_base": 100.0},
]


@pytest.mark.parametrize("fields", [{}, {"num_kv_heads": 2, "feature_map": "relu", "rope_base": 100.0, "conv_size": 4}])
def test_retention_is_the_papers_equations(fields: dict[str, Any]) -> None:
    """The parallel form, equations 5 and 8 of arXiv 2307.08621, with complex rotations, in fp64."""
    ours = build("retention", fields)
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}

    def theirs(x: Tensor) -> Tensor:
        x = x.double()
        n = torch.arange(x.shape[1], dtype=torch.float64)
        theta = fields.get("rope_base", 10000.0) ** -torch.linspace(0, 1, 5, dtype=torch.float64)[:4]
        rotation = torch.exp(1j * n[:, None] * theta)
        q, k, v, gate = (x @ w[f"{name}_proj.weight"].T for name in "qkvg")
        if "conv_size" in fields:
            q, k, v = (convolved(t, w[f"{n}_conv1d.weight"]) for n, t in (("q", q), ("k", k), ("v", v)))
        if "feature_map" in fields:
            q, k = q.clamp_min(0), k.clamp_min(0)
        queries, keys, values = q.split(8, -1), k.split(8, -1), v.split(16, -1)
        heads = []
        for h in range(4):
            shared = h * len(keys) // 4
            turned = [torch.complex(*t.chunk(2, -1)) * rotation for t in (queries[h], keys[shared])]
            decays = ((1 - 2.0 ** (-5 - h)) ** (n[:, None] - n)).tril()
            scores = (turned[0] @ turned[1].mH).real / 8**0.5
            o = (scores * decays) @ values[shared]
            heads.append(o / (o.square().mean(-1, keepdim=True) + dims().norm_eps).sqrt() * w["o_norm.weight"])
        return (torch.cat(heads, -1) * gate * gate.sigmoid()) @ w["o_proj.weight"].T

    compare(ours, theirs)


def test_retention_is_flash_linear_attentions() -> None:
    def names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace("g_norm_swish_gate", "o_norm"): value for key, value in tensors.items()}

    compare_golden("retention", "retention", {}, names)
