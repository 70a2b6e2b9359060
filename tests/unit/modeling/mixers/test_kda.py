"""Kimi Delta Attention against Hugging Face's module with the same weights, and flash-linear-attention's layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.golden import compare_golden
from tests.unit.modeling.mixers.common import build, dims
from tests.unit.modeling.mixers.truth import compare, load, randomise

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 2.0, "allow_neg_eigval": True, "conv_size": 0},
    {"lower_bound": -5.0, "gate_bias": False, "conv_size": 3},
]


@pytest.mark.parametrize("heads", [2, 4])
def test_kda_is_kimi_linears(heads: int) -> None:
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=32, num_hidden_layers=1, linear_num_heads=heads, linear_head_dim=8, linear_conv_kernel_dim=4,
        rms_norm_eps=dims().norm_eps, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = KimiLinearDeltaAttention(config, layer_idx=0).eval()
    ours = build("kda", {"num_heads": heads, "head_dim": 8, "gate_bias": False})
    randomise(ours)
    own = dict(ours.state_dict())
    same = ("q_proj", "k_proj", "v_proj", "b_proj", "o_norm", "o_proj")
    weights = {f"{name}.weight": own[f"{name}.weight"] for name in same}
    for i, place in enumerate("ab"):
        weights[f"forget_gate.f_{place}_proj.weight"] = own[f"f_proj.{i}.weight"]
        weights[f"g_{place}_proj.weight"] = own[f"g_proj.{i}.weight"]
    weights |= {"forget_gate.A_log": own["A_log"].view(1, 1, -1, 1), "forget_gate.dt_bias": own["dt_bias"]}
    weights["conv1d.weight"] = torch.cat([own[f"{n}_conv1d.weight"] for n in "qkv"]).unsqueeze(1)
    load(theirs, weights)
    compare(ours, theirs)


def test_kda_is_flas() -> None:
    def names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.squeeze(1) if "conv1d" in key else value for key, value in theirs.items()}

    compare_golden("kda", "kda", {"head_dim": 64}, names)


@pytest.mark.parametrize("fields", VARIANTS)
def test_kda_is_the_papers_equations(fields: dict[str, Any]) -> None:
    """Section 3 of arXiv 2510.26692, one token and one head at a time, in fp64."""
    ours = build("kda", fields)
    randomise(ours)
    c: Any = ours.config
    w = {name: value.double() for name, value in ours.state_dict().items()}
    heads, size = c.num_v_heads or 4, c.head_dim or 8
    group = heads // (c.num_heads or 4)

    def features(name: str, sequence: Tensor) -> Tensor:
        """Features `[T, heads, channels]`."""
        y = (sequence @ w[f"{name}_proj.weight"].T).T
        if c.conv_size:
            y = F.conv1d(F.pad(y, (c.conv_size - 1, 0)), w[f"{name}_conv1d.weight"].unsqueeze(1), groups=len(y))
        y = F.silu(y.T)
        if name == "v":
            return y.unflatten(-1, (heads, -1))
        y = y.unflatten(-1, (-1, size))
        return (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(group, 1)

    def low_rank(name: str, token: Tensor) -> Tensor:
        y = w[f"{name}_proj.1.weight"] @ (w[f"{name}_proj.0.weight"] @ token) + w.get(f"{name}_proj.1.bias", 0)
        return y.view(heads, -1)

    def log_decay(h: int, f: Tensor) -> Tensor:
        if c.lower_bound is not None:
            return c.lower_bound * torch.sigmoid(w["A_log"][h].exp() * f)
        return -w["A_log"][h].exp() * torch.log1p(f.exp())

    def theirs(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.double():
            q, k, v = (features(name, sequence) for name in "qkv")
            states: list[Any] = [torch.zeros(size, v.shape[-1]).double()] * heads
            for t, token in enumerate(sequence):
                beta = torch.sigmoid(w["b_proj.weight"] @ token) * (2 if c.allow_neg_eigval else 1)
                f, gate = low_rank("f", token) + w["dt_bias"].view(heads, size), low_rank("g", token)
                row = []
                for h in range(heads):
                    state, key = log_decay(h, f[h]).exp()[:, None] * states[h], k[t, h]
                    states[h] = state + beta[h] * torch.outer(key, v[t, h] - state.T @ key)
                    o = states[h].T @ q[t, h] / size**0.5
                    o = o / (o.square().mean() + dims().norm_eps).sqrt() * w["o_norm.weight"]
                    row.append(o * torch.sigmoid(gate[h]))
                outputs.append(w["o_proj.weight"] @ torch.cat(row))
        return torch.stack(outputs).view(x.shape)

    compare(ours, theirs)
