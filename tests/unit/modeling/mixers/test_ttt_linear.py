"""TTT-Linear against the paper's equations, the inner gradient by autograd."""

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
    {"num_heads": 2, "mini_batch_size": 4, "conv_size": 3, "rope_base": 100.0, "inner_norm_eps": 1e-2},
    {"mini_batch_size": 3, "share_qk": False, "gate": False, "inner_lr": 2.0},
]


def rotated(x: Tensor, place: int, base: float) -> Tensor:
    """Rotates each pair of neighbouring features as a complex number."""
    frequencies = base ** (-torch.arange(0, len(x), 2, dtype=torch.float64) / len(x))
    turn = torch.polar(torch.ones_like(frequencies), place * frequencies)
    return torch.view_as_real(torch.view_as_complex(x.contiguous().view(-1, 2)) * turn).flatten()


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal depthwise convolution of `x [T, C]`."""
    return F.conv1d(F.pad(x.T, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight)).T


@pytest.mark.parametrize("fields", VARIANTS)
def test_ttt_linear_is_the_papers_equations(fields: dict[str, Any]) -> None:
    """Sections 2.3 to 2.7 of arXiv 2407.04620, one token and one head at a time, in fp64: every token's inner loss is
    differentiated at the weights that its mini-batch starts from, and the weights that it reads are made anew."""
    ours = build("ttt_linear", fields)
    randomise(ours)
    w, config = {name: value.double() for name, value in ours.state_dict().items()}, ours.config
    size, heads = config.mini_batch_size, config.num_heads or 4
    head_dim = 32 // heads

    def head(h: int, q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
        def memory(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
            normed = F.layer_norm(
                x @ weights + bias, (head_dim,), w["ttt_norm_weight"][h], w["ttt_norm_bias"][h], config.inner_norm_eps
            )
            return x + normed

        weights, outputs = [w["W1"][h], w["b1"][h]], []
        for first in range(0, len(q), size):
            weights = [t if t.requires_grad else t.clone().requires_grad_() for t in weights]
            total = [torch.zeros_like(t) for t in weights]
            for i, t in enumerate(range(first, min(first + size, len(q)))):
                query, key = (rotated(x[t], i, config.rope_base) for x in (q, k))
                loss = (memory(key, *weights) - v[t]).square().sum() / 2
                gradients = torch.autograd.grad(loss, weights, create_graph=True)
                total = [s + rate[t] * g for s, g in zip(total, gradients, strict=True)]
                step = (1 / (i + 1) + w["learnable_token_idx"][i]).clamp(min=0)
                now = [t - step * s for t, s in zip(weights, total, strict=True)]
                outputs.append(memory(query, *now))
            weights = now
        return torch.stack(outputs)

    def theirs(x: Tensor) -> Tensor:
        rows = []
        for tokens in x.double():
            q, v = tokens @ w["q_proj.weight"].T, tokens @ w["v_proj.weight"].T
            if config.share_qk:
                q, k = (causal_conv(q, w[f"conv_{n}.weight"], w[f"conv_{n}.bias"]) for n in "qk")
            else:
                k = tokens @ w["k_proj.weight"].T
            rates = (tokens @ w["lr_proj.weight"].T + w["lr_proj.bias"]).sigmoid() * config.inner_lr / head_dim
            split = [t.unflatten(-1, (heads, head_dim)) for t in (q, k, v)]
            o = torch.cat([head(h, *(t[:, h] for t in split), rates[:, h]) for h in range(heads)], -1)
            o = F.layer_norm(o, o.shape[-1:], w["post_norm.weight"], w["post_norm.bias"], dims().norm_eps)
            if config.gate:
                o = o * F.gelu(tokens @ w["g_proj.weight"].T, approximate="tanh")
            rows.append(o @ w["o_proj.weight"].T)
        return torch.stack(rows)

    compare(ours, theirs)
