"""Order of the shared expert and the collectives of a layer; test_published.py has transformers' layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.ffn import MoE
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.moe.dispatch import Dispatcher


def build(moe: MoEConfig) -> MoE:
    config = ModelConfig(hidden_size=32, moe=moe, init_std=0.2)
    host = Host(torch.float32)
    layer = MoE(config, layer_dims(config, 0), host)
    initialize(layer, host, seed=1)
    return layer


def run(layer: MoE, x: Tensor) -> list[Tensor]:
    """Returns the output, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


class Recorder(Host, Dispatcher):
    """Host and dispatcher that record the order of calls which communicate on several ranks."""

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
    """The shared expert's products begin after dispatch and before the routed experts.

    The backward pass of the routed experts then comes first, on the main stream, so that a recomputed layer is
    recomputed on the main stream.
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
