"""Decaying fast weights against the paper's equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.tokens import TokenLayout
from tests.tolerances import FP32, assert_close
from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import compare, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_heads": 2},
    {"gate_rank": 4, "qkv_bias": True, "output_norm": True, "expand_k": 0.5, "expand_v": 2.0, "gate_init": 0.9},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_fast_weights_are_the_papers_equations(fields: dict[str, Any]) -> None:
    """The decay rule of arXiv 2210.04243, one token and one head at a time, in fp64."""
    ours = build("gated_linear_fast_weight", fields)
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}
    count = fields.get("num_heads", 4)
    key_dim, value_dim = len(w["k_proj.weight"]) // count, len(w["v_proj.weight"]) // count

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    def gate(name: str, x: Tensor) -> Tensor:
        low_rank = "gate_rank" in fields
        return torch.sigmoid(linear(f"{name}.1", linear(f"{name}.0", x)) if low_rank else linear(name, x))

    def theirs(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.double():
            states, row = [torch.zeros(value_dim, key_dim, dtype=torch.float64)] * count, []
            for token in sequence:
                q, k, v = (linear(f"{n}_proj", token) for n in "qkv")
                z, f, heads = gate("gv_proj", token), gate("gk_proj", token), []
                for h in range(count):
                    key = slice(key_dim * h, key_dim * (h + 1))
                    value = slice(value_dim * h, value_dim * (h + 1))
                    states[h] = torch.outer(z[value], f[key]) * states[h] + torch.outer(v[value], k[key])
                    o = states[h] @ q[key] / key_dim**0.5
                    if "output_norm" in fields:
                        o = o / (o.square().mean() + dims().norm_eps).sqrt() * w["o_norm.weight"]
                    heads.append(o)
                row.append(w["o_proj.weight"] @ torch.cat(heads))
            outputs.append(torch.stack(row))
        return torch.stack(outputs)

    compare(ours, theirs)


def test_gates_begin_at_gate_init() -> None:
    ours = build("gated_linear_fast_weight", {"gate_init": 0.9})
    inputs, _ = ours.project(torch.zeros(3, 32), TokenLayout(1, 3), None)
    for name in ("g", "gv"):
        assert_close(inputs[name].exp(), torch.full((1, 3, 4, 8), 0.9), FP32, name)
