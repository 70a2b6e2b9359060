"""RWKV-7 against the paper's equations and flash-linear-attention's layers, and the values that layers pass on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.activations import Activations
from linear_moe.modeling.host import Host
from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.mixers.rwkv7 import RWKV7
from linear_moe.modeling.ops.backends import use_backend
from linear_moe.modeling.tokens import Cache, TokenLayout
from tests.golden.golden import compare_golden
from tests.tolerances import DECODE, FP32, assert_close
from tests.unit.modeling.mixers.common import build, dims, packed, stream
from tests.unit.modeling.mixers.truth import compare, randomise

RANKS = {"decay_rank": 4, "rate_rank": 4, "value_rank": 3, "gate_rank": 5}
VARIANTS: list[dict[str, Any]] = [RANKS, {"num_heads": 2, "expand_v": 2.0, "norm_eps": 0.05}]


class Layers(torch.nn.Module):
    """First two layers of a model, with nothing between them."""

    def __init__(self, *layers: Mixer):
        super().__init__()
        self.layers, self.host = torch.nn.ModuleList(layers), layers[0].host

    def forward(self, x: Tensor, layout: TokenLayout, caches: list[Cache] | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, layout, None if caches is None else caches[i])
        return x


def two_layers(fields: dict[str, Any] = RANKS, host: Any = None, tensor: int = 1) -> Any:
    return Layers(*(build("rwkv7", fields, host, replace(dims(), layer=layer), tensor) for layer in (0, 1)))


@pytest.mark.parametrize("fields", VARIANTS)
def test_rwkv7_is_the_papers_equations(fields: dict[str, Any]) -> None:
    """Section 4 of arXiv 2503.14456, one token and one head at a time, in fp64."""
    ours, heads = two_layers(fields), fields.get("num_heads", 4)
    randomise(ours)
    weights = [{name: w.double() for name, w in layer.state_dict().items()} for layer in ours.layers]
    eps = fields.get("norm_eps", 32 // heads * dims().norm_eps)

    def lora(w: dict[str, Tensor], name: str, x: Tensor, activation: Any = lambda t: t) -> Tensor:
        low = activation(w[f"{name}_lora.0.weight"] @ x)
        return w[f"{name}_lora.2.weight"] @ low + w.get(f"{name}_lora.2.bias", 0.0)

    def layer(w: dict[str, Tensor], sequence: Tensor, first: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        K, V = 32 // heads, len(w["g_norm.weight"]) // heads
        before, outputs, values = torch.zeros(32).double(), [], []
        states = [torch.zeros(V, K, dtype=torch.float64) for _ in range(heads)]
        for t, token in enumerate(sequence):
            x_r, x_w, x_k, x_v, x_a, x_g = (torch.lerp(token, before, w[f"x_{n}"]) for n in "rwkvag")
            r, k, v = (w[f"{n}_proj.weight"] @ y for n, y in (("r", x_r), ("k", x_k), ("v", x_v)))
            values.append(v)
            if first is not None:
                v = v + (first[t] - v) * torch.sigmoid(lora(w, "v", x_v))
            decay = torch.exp(-torch.exp(torch.tensor(-0.5)) * torch.sigmoid(lora(w, "w", x_w, torch.tanh)))
            rate, gate = torch.sigmoid(lora(w, "a", x_a)), lora(w, "g", x_g, torch.sigmoid)
            erased, k, row = k * w["k_k"], k * (1 + (rate - 1) * w["k_a"]), []
            for h in range(heads):
                key, value = slice(K * h, K * h + K), slice(V * h, V * h + V)
                unit = erased[key] / erased[key].norm()
                transition = torch.diag(decay[key]) - torch.outer(unit, rate[key] * unit)
                states[h] = states[h] @ transition + torch.outer(v[value], k[key])
                o = states[h] @ r[key]
                o = (o - o.mean()) / (o.var(correction=0) + eps).sqrt()
                o = o * w["g_norm.weight"][value] + w["g_norm.bias"][value]
                row.append(o + (r[key] * k[key] * w["r_k"][h]).sum() * v[value])
            outputs.append(w["o_proj.weight"] @ (torch.cat(row) * gate))
            before = token
        return torch.stack(outputs), values

    def theirs(x: Tensor) -> Tensor:
        outputs = []
        for sequence in x.double():
            hidden, first = layer(weights[0], sequence, None)
            outputs.append(layer(weights[1], hidden, first)[0])
        return torch.stack(outputs)

    compare(ours, theirs)


@pytest.mark.parametrize("recording", ["rwkv7_first", "rwkv7"])
def test_rwkv7_is_flas(recording: str) -> None:
    def names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.replace("lora.lora", "lora"): v.flatten() if k.startswith("x_") else v for k, v in theirs.items()}

    def prepare(mixer: Mixer, layout: TokenLayout, tensors: dict[str, Tensor]) -> None:
        if "input.v_first" in tensors:
            layout.shared["v_first"] = tensors["input.v_first"].flatten(0, 1)

    compare_golden(recording, "rwkv7", {}, names, prepare)


def test_two_layers_in_chunks_and_packed() -> None:
    layers, results, lengths = two_layers(), {}, [5, 1, 40, 2]
    x = stream(1, sum(lengths)).requires_grad_()
    weight = stream(1, sum(lengths), seed=1)
    for backend in ("reference", "chunk"):
        with use_backend(backend):
            y = layers(x, packed(lengths))
            results[backend] = [y, *torch.autograd.grad((y * weight).sum(), [x, *layers.parameters()])]
    for actual, expected in zip(results["chunk"], results["reference"], strict=True):
        assert_close(actual, expected, FP32)
    apart = [layers(document, TokenLayout(1, len(document))) for document in x.split(lengths)]
    assert_close(torch.cat(apart), results["chunk"][0], FP32)


@torch.no_grad()
def test_two_layers_decode() -> None:
    layers, x = two_layers(), stream(2, 9).view(2, 9, -1)
    caches = [layer.init_cache(2, 9, x.dtype, x.device) for layer in layers.layers]
    pieces = [
        layers(x[:, a:b].flatten(0, 1), TokenLayout(2, b - a), caches) for a, b in ((0, 4), (4, 5), (5, 6), (6, 9))
    ]
    expected = layers(x.flatten(0, 1), TokenLayout(2, 9)).view(2, 9, -1)
    assert_close(torch.cat([piece.view(2, -1, 32) for piece in pieces], 1), expected, DECODE)


def test_two_layers_recomputed() -> None:
    """The first layer's values, made inside a recomputed region, carry gradients from the second."""
    layers, host, weight, results = two_layers(), Host(activations=Activations(["layer"])), stream(2, 7, seed=1), []
    for run in (partial(host.activations.layer, 0), lambda layer, *args: layer(*args)):
        x, layout = stream(2, 7).requires_grad_(), TokenLayout(2, 7)
        y = x
        for layer in layers.layers:
            y = run(layer, y, layout)
        results.append(torch.autograd.grad((y * weight).sum(), [x, *layers.parameters()]))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_two_layers_on_two_tensor_ranks() -> None:
    from tests.unit.modeling.mixers.test_mixers import (  # at the top, the import would be circular
        Exchange,
        Shard,
        on_two_ranks,
    )

    exchange, weight = Exchange(), stream(2, 7, seed=1)
    full, shards = two_layers(), [two_layers(host=Shard(rank, exchange), tensor=2) for rank in (0, 1)]
    x = [stream(2, 7).requires_grad_() for _ in range(2)]
    actual, expected = on_two_ranks(shards, x[0], TokenLayout(2, 7)), full(x[1], TokenLayout(2, 7))
    assert_close(actual, expected, FP32)
    for y in (actual, expected):
        (y * weight).sum().backward()
    assert_close(*[leaf.grad for leaf in x], FP32)  # type: ignore[misc, arg-type]


def test_without_a_first_layer_values_are_their_own_residual() -> None:
    """A first RWKV-7 layer that is not the model's first layer mixes its values with themselves."""
    layer = build("rwkv7", RANKS, None, replace(dims(), layer=1))
    layout = TokenLayout(2, 7)
    y = layer(stream(2, 7), layout)
    y.square().sum().backward()
    again = layer(stream(2, 7), TokenLayout(2, 7, shared={"v_first": layout.shared["v_first"].detach()}))
    assert_close(again, y, FP32)
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_initial_values_are_rwkv_lms() -> None:
    """Initial values of the last of two layers, with hidden size 32 and heads of 8, are those of RWKV-LM."""
    layer: Any = build("rwkv7", {}, None, replace(dims(), layer=1)).requires_grad_(False)
    n = torch.arange(32)
    for name, bound in {"r": 0.5, "k": 0.05, "v": 0.5}.items():
        assert_close(layer.get_parameter(f"{name}_proj.weight").abs().max(), torch.tensor(bound / 32**0.5), 1e-2)
    assert_close(layer.x_k, 1 - (n / 32) ** 0.35, FP32)
    z = (n % 8 - 3.5) / 3.5
    assert_close(layer.w_lora[2].bias, -6 + 6 * (n / 31) ** 2 + 0.5 + 2.5 * z * z.abs(), FP32)
    assert_close(layer.a_lora[2].bias, -0.19 + 0.3 * z * z.abs() + 0.4 * (n / 31 - 0.5), FP32)
    assert_close(layer.v_lora[2].bias, 0.73 - 0.4 * (n / 31 - 0.5), FP32)
    assert_close(layer.k_k, 0.71 - 0.1 * (n / 31 - 0.5), FP32)
    assert_close(layer.g_norm.weight, torch.ones(32), FP32)
    assert_close(layer.w_lora[2].weight.T @ layer.w_lora[2].weight, 0.01 * torch.eye(32), FP32)
    assert RWKV7.crossing(layer.config, dims()) == {"v_first": 32} and F.relu(-layer.r_k).max() == pytest.approx(0.04)
