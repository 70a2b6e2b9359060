"""Experts and router against their definitions and against transformers' own modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.config.schema import ModelConfig, MoEConfig
from linear_moe.modeling.ffn import MoE
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.moe.dispatch import Dispatcher
from tests.tolerances import FP32, assert_close


def build(moe: MoEConfig, hidden: int = 32) -> MoE:
    config = ModelConfig(hidden_size=hidden, moe=moe, init_std=0.2)
    host = Host(torch.float32)
    layer = MoE(config, layer_dims(config, 0), host)
    initialize(layer, host, seed=1)
    return layer


def run(layer: MoE, x: Tensor) -> list[Tensor]:
    """Output and the gradients of input and every parameter."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shared", [0, 24])
def test_grouped_equals_sequential(score: str, shared: int) -> None:
    x = torch.randn(50, 32)
    results = []
    for experts in ("grouped", "sequential"):
        moe = MoEConfig(6, top_k=2, expert_ffn_size=16, shared_ffn_size=shared, score=score, experts=experts)
        results.append(run(build(moe), x))
    for grouped, sequential in zip(*results, strict=True):
        assert_close(grouped, sequential, FP32)


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
def test_expert_without_tokens(experts: str) -> None:
    """One token leaves most experts idle: finite outputs, exactly zero gradients of the idle ones."""
    layer = build(MoEConfig(num_experts=8, top_k=1, expert_ffn_size=16, experts=experts))
    _, index = layer.router(x := torch.randn(1, 32))
    out, _, *gradients = run(layer, x)
    assert out.isfinite().all()
    idle = torch.arange(8) != index.item()
    assert gradients[1][~idle].abs().sum() > 0
    assert gradients[1][idle].abs().sum() == 0


def test_equals_mixtral() -> None:
    """transformers' Mixtral block with the same weights: softmax, then top-k, then normalised."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    ours = build(MoEConfig(num_experts=6, top_k=2, expert_ffn_size=16))
    theirs = MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=32, intermediate_size=16, num_local_experts=6, num_experts_per_tok=2)
    )
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(ours.experts.gate_up_proj.flatten(1, 2))
        theirs.experts.down_proj.copy_(ours.experts.down_proj)
    x = torch.randn(2, 20, 32)
    expected = theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert_close(ours(x.flatten(0, 1)), expected.flatten(0, 1), FP32)


def test_unnormalised_top_k() -> None:
    """Written out: each chosen expert's SwiGLU times its raw softmax score."""
    layer = build(MoEConfig(num_experts=5, top_k=3, expert_ffn_size=16, normalize_top_k=False))
    x = torch.randn(7, 32)
    score = (x @ layer.router.weight.T).softmax(-1)
    expected = torch.zeros_like(x)
    for n in range(7):
        for e in score[n].topk(3).indices:
            gate, up = layer.experts.gate_up_proj[e]
            h = torch.nn.functional.silu(gate @ x[n]) * (up @ x[n])
            expected[n] += score[n, e] * (layer.experts.down_proj[e] @ h)
    assert_close(layer(x), expected, FP32)


class Recorder(Host, Dispatcher):
    """Keeps the order of what communicates between ranks elsewhere."""

    def __init__(self) -> None:
        Host.__init__(self, torch.float32)
        self.calls: list[str] = []

    def enter(self, x: Tensor) -> Tensor:
        self.calls.append("enter")
        return x

    def leave(self, y: Tensor) -> Tensor:
        self.calls.append("leave")
        return y

    def dispatcher(self, config: MoEConfig) -> Dispatcher:
        Dispatcher.__init__(self, config.num_experts)
        return self

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("dispatch")
        return super().dispatch(*args, **kwargs)

    def combine(self, y: Tensor) -> Tensor:
        self.calls.append("combine")
        return y


@pytest.mark.parametrize("overlap", [False, True])
def test_shared_expert_communicates_outside_dispatch_and_combine(overlap: bool) -> None:
    """Its products are begun inside; before the routed experts, whose backward pass thus comes first and on the main
    stream, so that a layer is recomputed there.
    """
    moe = MoEConfig(6, top_k=2, expert_ffn_size=16, shared_ffn_size=8, overlap_shared_expert=overlap)
    config, host = ModelConfig(hidden_size=32, moe=moe), Recorder()
    layer = MoE(config, layer_dims(config, 0), host)
    initialize(layer, host, seed=1)
    for name, module in (("shared", layer.shared_expert.down_proj), ("routed", layer.experts)):
        module.register_forward_hook(lambda *_, name=name: host.calls.append(name))
    layer(torch.randn(20, 32))
    assert host.calls == ["enter", "dispatch", "shared", "routed", "combine", "leave"]


def test_overlap_changes_no_number() -> None:
    moe = MoEConfig(6, top_k=2, expert_ffn_size=16, shared_ffn_size=24, shared_gate=True)
    x = torch.randn(50, 32)
    plain, aside = run(build(moe), x), run(build(dataclasses.replace(moe, overlap_shared_expert=True)), x)
    assert all(torch.equal(a, b) for a, b in zip(plain, aside, strict=True))
