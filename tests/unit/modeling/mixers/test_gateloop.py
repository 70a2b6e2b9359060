"""GateLoop against its complex recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import compare, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"expand_k": 0.5, "expand_v": 2.0, "num_heads": 2, "output_norm": True, "transition_bias": False},
    {"phase": False},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_gateloop_is_the_papers_recurrence(fields: dict[str, Any]) -> None:
    """Section 3 of arXiv 2311.01927: complex transitions and states, one token and one head at a time."""
    ours = build("gateloop", fields)
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}
    heads = fields.get("num_heads", 4)

    def project(name: str, token: Tensor) -> Tensor:
        return w[f"{name}_proj.weight"] @ token + w.get(f"{name}_proj.bias", 0.0)

    def theirs(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.double():
            states: list[Any] = [0.0] * heads
            row = []
            for token in sequence:
                q, k, v, alpha, gate = (project(name, token) for name in ("q", "k", "v", "alpha", "g"))
                beta = project("beta", token) if fields.get("phase", True) else torch.zeros_like(alpha)
                a = torch.sigmoid(alpha) * torch.exp(1j * beta)
                parts = []
                for h, (q_h, k_h, v_h, a_h) in enumerate(zip(*(t.chunk(heads) for t in (q, k, v, a)), strict=True)):
                    states[h] = a_h[:, None] * states[h] + torch.outer(k_h, v_h)
                    o = (states[h].T @ (q_h + 0j)).real
                    if fields.get("output_norm"):
                        o = o / (o.square().mean() + dims().norm_eps).sqrt() * w["o_norm.weight"]
                    parts.append(o)
                row.append(w["o_proj.weight"] @ (torch.cat(parts) * gate * torch.sigmoid(gate)))
            outputs.append(torch.stack(row))
        return torch.stack(outputs)

    compare(ours, theirs)
