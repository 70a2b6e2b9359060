"""The mixers against independent truth: Hugging Face's modules with the same weights, the papers' equations."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.mixers.base import Layout, Mixer
from tests.tolerances import FP32, assert_close
from tests.unit.mixers.common import build, dims, stream

BATCH, LENGTH = 2, 11


def rows(x: Tensor) -> Tensor:
    return x.view(BATCH, LENGTH, -1)


def randomise(module: torch.nn.Module) -> None:
    """Every parameter away from its initial value, so that a swapped or ignored one shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def load(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    module.load_state_dict({k: v.clone() for k, v in weights.items()}, strict=True)


def compare(ours: Mixer, theirs: Any) -> None:
    """Outputs, and gradients with respect to the input, of `theirs(x [B, T, hidden])`."""
    x, weight = stream(BATCH, LENGTH), stream(BATCH, LENGTH, seed=1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = ours(a, Layout(BATCH, LENGTH)), theirs(rows(b)).flatten(0, 1)
    assert_close(actual, expected, FP32, "output")
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    assert a.grad is not None and b.grad is not None
    assert_close(a.grad, b.grad, FP32, "gradient")


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mamba2_is_hugging_faces(groups: int) -> None:
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, state_size=8, n_groups=groups, expand=2, conv_kernel=4, chunk_size=4,
        num_hidden_layers=1, layer_norm_epsilon=dims().norm_eps,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    ours = build("mamba2", {"head_dim": 8, "state_size": 8, "num_groups": groups})
    randomise(ours)
    own = dict(ours.state_dict())
    weights = {name: own[name] for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")}
    weights["in_proj.weight"] = torch.cat([own[f"{n}_proj.weight"] for n in ("z", "x", "B", "C", "dt")])
    weights["conv1d.weight"] = torch.cat([own[f"{n}_conv1d.weight"] for n in "xBC"]).unsqueeze(1)
    weights["conv1d.bias"] = torch.cat([own[f"{n}_conv1d.bias"] for n in "xBC"])
    load(theirs, weights)
    compare(ours, theirs)


@pytest.mark.parametrize("v_heads", [2, 4])
def test_gated_deltanet_is_qwen3_nexts(v_heads: int) -> None:
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=32, num_hidden_layers=1, linear_num_key_heads=2, linear_num_value_heads=v_heads,
        rms_norm_eps=dims().norm_eps, linear_key_head_dim=8, linear_value_head_dim=16, linear_conv_kernel_dim=4,
        layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, layer_idx=0).eval()
    ours = build("gated_deltanet", {"num_heads": 2, "num_v_heads": v_heads, "head_dim": 8})
    randomise(ours)
    own = dict(ours.state_dict())

    def by_key_head(*names: str) -> Tensor:
        return torch.cat([own[f"{n}_proj.weight"].view(2, -1, 32) for n in names], dim=1).flatten(0, 1)

    weights = {name: own[name] for name in ("A_log", "dt_bias")}
    weights |= {"norm.weight": own["o_norm.weight"], "out_proj.weight": own["o_proj.weight"]}
    weights["in_proj_qkvz.weight"], weights["in_proj_ba.weight"] = (
        by_key_head("q", "k", "v", "g"),
        by_key_head("b", "a"),
    )
    weights["conv1d.weight"] = torch.cat([own[f"{n}_conv1d.weight"] for n in "qkv"]).unsqueeze(1)
    load(theirs, weights)
    compare(ours, theirs)


@pytest.mark.parametrize(
    ("family", "fields", "options"),
    [
        ("llama", {"num_kv_heads": 2}, {}),
        ("qwen2", {"num_kv_heads": 1, "qkv_bias": True, "rope_base": 500.0}, {}),
        ("qwen3", {"num_kv_heads": 2, "head_dim": 16, "qk_norm": True}, {"head_dim": 16}),
        (
            "qwen3_next",
            {"num_kv_heads": 2, "head_dim": 16, "qk_norm": True, "output_gate": True, "rotary_fraction": 0.25},
            {"head_dim": 16, "layer_types": ["full_attention"]},
        ),
    ],
)
def test_attention_is_hugging_faces(family: str, fields: dict[str, Any], options: dict[str, Any]) -> None:
    prefix = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_next": "Qwen3Next"}[family]
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config = getattr(configuration, prefix + "Config")(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=fields["num_kv_heads"],
        rms_norm_eps=dims().norm_eps, attn_implementation="eager",
        rope_parameters={
            "rope_type": "default", "rope_theta": fields.get("rope_base", 10000.0),
            "partial_rotary_factor": fields.get("rotary_fraction", 1.0),
        },
        **options,
    )  # fmt: skip
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    attention = getattr(module, prefix + "Attention")(config, layer_idx=0).eval()
    ours = build("attention", fields)
    randomise(ours)
    own = dict(ours.state_dict())
    if family == "qwen3_next":
        query, gate = own["q_proj.weight"].view(4, 16, 32), own.pop("g_proj.weight").view(4, 16, 32)
        own["q_proj.weight"] = torch.cat((query, gate), dim=1).flatten(0, 1)
        own |= {name: own[name] - 1.0 for name in ("q_norm.weight", "k_norm.weight")}
    load(attention, own)
    rotary = getattr(module, prefix + "RotaryEmbedding")(config)
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]

    def theirs(x: Tensor) -> Tensor:
        angles = rotary(x, torch.arange(LENGTH).unsqueeze(0))
        return attention(x, position_embeddings=angles, attention_mask=mask)[0]

    compare(ours, theirs)


def test_gla_is_the_papers_equations() -> None:
    """Section 4.3 and 4.4 of arXiv 2312.06635, one token and one head at a time, in fp64."""
    ours = build("gla", {"qkv_bias": True}, at=dims(hidden=32, heads=4))
    randomise(ours)
    w = {name: value.double() for name, value in ours.state_dict().items()}

    def theirs(x: Tensor) -> Tensor:
        x = x.double()
        outputs = []
        for sequence in x:
            states, row = [torch.zeros(4, 8, dtype=torch.float64) for _ in range(4)], []
            for token in sequence:
                q, k, v = (w[f"{n}_proj.weight"] @ token + w[f"{n}_proj.bias"] for n in "qkv")
                low_rank = w["gk_proj.1.weight"] @ (w["gk_proj.0.weight"] @ token) + w["gk_proj.1.bias"]
                alpha = torch.sigmoid(low_rank) ** (1 / 16)
                r = w["g_proj.weight"] @ token
                heads = []
                for h in range(4):
                    key, value = slice(4 * h, 4 * h + 4), slice(8 * h, 8 * h + 8)
                    states[h] = alpha[key, None] * states[h] + torch.outer(k[key], v[value])
                    o = states[h].T @ q[key] / 4**0.5
                    o = o / (o.square().mean() + dims().norm_eps).sqrt() * w["o_norm.weight"]
                    heads.append(o * r[value] * torch.sigmoid(r[value]))
                row.append(w["o_proj.weight"] @ torch.cat(heads))
            outputs.append(torch.stack(row))
        return torch.stack(outputs)

    compare(ours, theirs)


def test_gla_convolution_is_conv1d_with_silu() -> None:
    """With a convolution, GLA is GLA of the convolved projections."""
    ours = build("gla", {"conv_size": 4})
    x = stream(1, LENGTH)
    inputs, _ = ours.project(x, Layout(1, LENGTH), None)
    for name in "qkv":
        projected = (x @ ours.get_parameter(f"{name}_proj.weight").T).T
        weight = ours.get_parameter(f"{name}_conv1d.weight").unsqueeze(1)
        expected = F.silu(F.conv1d(projected, weight, padding=3, groups=len(weight))[..., :LENGTH]).T
        assert_close(inputs[name].flatten(2)[0], expected, FP32, name)
