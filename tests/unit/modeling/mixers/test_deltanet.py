"""DeltaNet against flash-linear-attention's layer and against the paper's equations."""

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
    {"use_gate": True, "allow_neg_eigval": True, "conv_size": 0, "expand_k": 0.5},
    {"use_beta": False, "qk_activation": "relu", "qk_norm": "sum", "conv_size": 3, "expand_v": 2.0},
    {"num_heads": 2, "qk_activation": "elu", "qk_norm": "sum", "conv_size": 0},
    {"num_heads": 2, "qk_activation": "identity", "conv_size": 2},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_deltanet_is_the_papers_equations(fields: dict[str, Any]) -> None:
    """Equations 2, 3 and section 3.4 of arXiv 2406.06484, one token and one head at a time, in fp64."""
    ours = build("deltanet", fields)
    randomise(ours)
    c: Any = ours.config
    w = {name: value.double() for name, value in ours.state_dict().items()}
    silu, heads = F.silu, c.num_heads or 4
    phi = {"silu": silu, "relu": F.relu, "elu": lambda x: torch.where(x > 0, x + 1, x.exp()), "identity": lambda x: x}

    def features(name: str, tokens: list[Tensor]) -> Tensor:
        """Features of the last token; the convolution reaches back over the tokens before it."""
        projected = [w[f"{name}_proj.weight"] @ token for token in tokens]
        if c.conv_size:
            taps = w[f"{name}_conv1d.weight"].flip(1)
            mixed = sum(tap * p for tap, p in zip(taps.T, projected[::-1], strict=False))
        else:
            mixed = projected[-1]
        x = silu(mixed) if name == "v" else phi[c.qk_activation](mixed)
        x = x.view(heads, -1)
        if name == "v":
            return x
        return (
            x / x.abs().sum(-1, keepdim=True).clamp(min=1e-6)
            if c.qk_norm == "sum"
            else x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        )

    def theirs(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.double():
            states: list[Any] = [None] * heads
            for t, token in enumerate(sequence):
                q, k, v = (features(name, list(sequence[: t + 1])) for name in "qkv")
                beta = torch.sigmoid(w["b_proj.weight"] @ token) if c.use_beta else torch.ones(heads).double()
                beta = 2 * beta if c.allow_neg_eigval else beta
                row = []
                for h in range(heads):
                    before = k.new_zeros(k.shape[1], v.shape[1]) if t == 0 else states[h]
                    erase = torch.eye(k.shape[1]).double() - beta[h] * torch.outer(k[h], k[h])
                    states[h] = erase @ before + beta[h] * torch.outer(k[h], v[h])
                    o = states[h].T @ q[h] / k.shape[1] ** 0.5
                    row.append(o / (o.square().mean() + dims().norm_eps).sqrt() * w["o_norm.weight"])
                o = torch.cat(row)
                outputs.append(w["o_proj.weight"] @ (o * silu(w["g_proj.weight"] @ token) if c.use_gate else o))
        return torch.stack(outputs).view(x.shape)

    compare(ours, theirs)


@pytest.mark.parametrize(
    ("recording", "fields"), [("deltanet", {}), ("deltanet_gate", {"use_gate": True, "allow_neg_eigval": True})]
)
def test_deltanet_is_flas(recording: str, fields: dict[str, Any]) -> None:
    def names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.squeeze(1) if "conv1d" in key else value for key, value in theirs.items()}

    compare_golden(recording, "deltanet", fields, names)
