"""Titans' memory against the paper's equations, the surprise by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import compare, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_heads": 2, "chunk_size": 1, "conv_size": 2},
    {"chunk_size": 4, "initial_rate": 0.1, "initial_momentum": 0.9, "initial_forget": 0.5},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_titans_is_the_papers_equations(fields: dict[str, Any]) -> None:
    """Equations 8 to 18 of arXiv 2501.00663, one token and one head at a time, in fp64: the gradient of every token's
    loss at the memory that its chunk starts from (equation 16), then momentum and forgetting."""
    ours = build("titans", fields)
    randomise(ours)
    w, config = {name: value.double() for name, value in ours.state_dict().items()}, ours.config
    count = config.num_heads or 4

    def head(memory: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor]) -> Tensor:
        surprise, outputs = torch.zeros_like(memory), []
        for t in range(len(q)):
            if t % config.chunk_size == 0:
                start = memory if memory.requires_grad else memory.clone().requires_grad_()
            loss = (k[t] @ start - v[t]).square().sum()
            (gradient,) = torch.autograd.grad(loss, start, create_graph=True)
            surprise = gates["eta"][t] * surprise - gates["theta"][t] * gradient
            memory = (1 - gates["alpha"][t]) * memory + surprise
            outputs.append(q[t] @ memory)
        return torch.stack(outputs)

    def projected(tokens: Tensor, name: str) -> Tensor:
        weight = w[f"{name}_conv1d.weight"]
        x = F.pad((tokens @ w[f"{name}_proj.weight"].T).T, (weight.shape[1] - 1, 0))
        return F.silu(F.conv1d(x, weight[:, None], groups=len(weight))).T.unflatten(-1, (count, -1))

    def theirs(x: Tensor) -> Tensor:
        rows = []
        for tokens in x.double():
            q, k, v = (projected(tokens, name) for name in "qkv")
            q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
            gates = {
                name: (tokens @ w[f"{name}_proj.weight"].T + w[f"{name}_bias"]).sigmoid()
                for name in ("theta", "eta", "alpha")
            }
            heads = []
            for h in range(count):
                o = head(w["M0"][h], q[:, h], k[:, h], v[:, h], {name: gate[:, h] for name, gate in gates.items()})
                heads.append(o / (o.square().mean(-1, keepdim=True) + dims().norm_eps).sqrt() * w["o_norm.weight"])
            o = torch.cat(heads, -1) * F.silu(tokens @ w["g_proj.weight"].T)
            rows.append(o @ w["o_proj.weight"].T)
        return torch.stack(rows)

    compare(ours, theirs)
