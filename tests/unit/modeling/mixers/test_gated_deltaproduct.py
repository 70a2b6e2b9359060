"""Gated DeltaProduct against flash-linear-attention's layer and against the paper's equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.golden import compare_golden
from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import compare, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.0, "num_householder": 3, "conv_size": 0},
    {"use_forget_gate": False, "use_output_gate": False, "allow_neg_eigval": False, "conv_size": 3},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_gated_deltaproduct_is_the_papers_equations(fields: dict[str, Any]) -> None:
    """Section 4 of arXiv 2502.10297: products of generalised Householder matrices, one token and head at a time."""
    ours = build("gated_deltaproduct", fields)
    randomise(ours)
    c: Any = ours.config
    w = {name: value.double() for name, value in ours.state_dict().items()}
    heads, n = c.num_v_heads or 4, c.num_householder
    group = heads // (c.num_heads or 4)

    def features(name: str, sequence: Tensor, t: int) -> Tensor:
        """Features `[heads, writes, channels]` of token t."""
        taps = w[f"{name}_conv1d.weight"].flip(1).T if c.conv_size else torch.ones(1, 1).double()
        y = F.silu(sum(tap * (w[f"{name}_proj.weight"] @ sequence[t - i]) for i, tap in enumerate(taps) if i <= t))
        y = y.view(-1, *([] if name == "q" else [n]), ours.value_dim if name == "v" else ours.key_dim)
        return y if name == "v" else (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(group, 0)

    def theirs(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.double():
            states = torch.zeros(heads, ours.key_dim, ours.value_dim, dtype=torch.float64)
            for t, token in enumerate(sequence):
                q, k, v = (features(name, sequence, t) for name in "qkv")
                beta = torch.sigmoid(w["b_proj.weight"] @ token).view(heads, n) * (2 if c.allow_neg_eigval else 1)
                row, after = [], []
                for h in range(heads):
                    state = states[h]
                    if c.use_forget_gate:
                        a = w["a_proj.weight"][h] @ token + w["dt_bias"][h]
                        state = state * torch.exp(-w["A_log"][h].exp() * torch.log1p(a.exp()))
                    for i in range(n):
                        reflection = torch.eye(ours.key_dim).double() - beta[h, i] * torch.outer(k[h, i], k[h, i])
                        state = reflection @ state + beta[h, i] * torch.outer(k[h, i], v[h, i])
                    after.append(state)
                    o = state.T @ q[h] / ours.key_dim**0.5
                    row.append(o / (o.square().mean() + dims().norm_eps).sqrt() * w["o_norm.weight"])
                states, o = torch.stack(after), torch.cat(row)
                o = o * F.silu(w["g_proj.weight"] @ token) if c.use_output_gate else o
                outputs.append(w["o_proj.weight"] @ o)
        return torch.stack(outputs).view(x.shape)

    compare(ours, theirs)


def test_gated_deltaproduct_is_flas() -> None:
    def names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        ours = {key: value.squeeze(1) if "conv1d" in key else value for key, value in theirs.items()}
        for key in ours:
            if key.startswith(("k_", "v_", "b_")):  # by write, head, channel -> by head, write, channel
                ours[key] = ours[key].unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2)
        return ours

    compare_golden("gated_deltaproduct", "gated_deltaproduct", {"head_dim": 64, "expand_v": 1.0}, names)
