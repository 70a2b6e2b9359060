"""Deferred weight gradients: they are equal to others, and computed in gaps or at the end of the backward pass."""

from __future__ import annotations

import gc
from contextlib import suppress
from typing import Any
from unittest import mock
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linear_moe.layout.sequence import PieceOrder
from linear_moe.modeling import deferred as module
from linear_moe.modeling.activations import Activations
from linear_moe.modeling.deferred import fill_gap, later, linear, weights_of
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.mixers.registry import mixer_class
from linear_moe.training.sequence import exchange
from linear_moe.training.sequence.exchange import SequenceGroup
from tests.distributed.sequences import one_pass, own_layout, stream
from tests.tolerances import FP32, assert_close
from tests.unit.modeling.mixers.common import build, case_ids, cases


class Gap(torch.autograd.Function):
    """Stand-in for an exchange: its backward pass fills the gap, and notes how many gradients were waiting."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, waited: list[int]) -> Tensor:  # type: ignore[override]
        ctx.waited = waited
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.waited.append(len(module._waiting))
        fill_gap()
        return gradient, None


def layers() -> nn.ModuleList:
    host = Host()
    linears = nn.ModuleList([Linear(host, 6, 6, bias=n == 1) for n in range(4)])
    initialize(linears, host, seed=0)
    return linears


def run(linears: nn.ModuleList, x: Tensor, waited: list[int]) -> Tensor:
    """Applies the third layer twice and the last one not at all, with one gap before the third."""
    y = torch.tanh(linears[0](x))
    y = Gap.apply(torch.tanh(linears[1](y)), waited)
    return linears[2](torch.tanh(linears[2](y)))


@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_those_of_linear(again: bool) -> None:
    linears, x = layers(), torch.randn(2, 5, 6, requires_grad=True)
    linears[0].weight.requires_grad_(False)

    def inside(x: Tensor) -> Tensor:
        with later(weights_of(linears.modules())):
            return run(linears, x, waited)

    gradients, waited = [], list[int]()
    for function in (lambda x: run(linears, x, []), inside):
        y = checkpoint(function, x, use_reentrant=False) if again else function(x)
        y.square().sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in (x, *linears.parameters())])
        linears.zero_grad()
        x.grad = None
    # In the gap, the gradients of both uses of the third layer waited; the second layer's came after the gap.
    assert waited == [2] and not module._waiting
    for actual, expected in zip(*reversed(gradients), strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            assert_close(actual, expected, FP32, "gradient")


def test_others_are_not_put_off() -> None:
    layer, other = layers()[0], layers()[1]
    x = torch.randn(3, 6)
    with later(weights_of([other])):
        linear(layer, x, layer.weight).sum().backward()
        linear(other, x, other.weight * 2).sum().backward()  # not the module's own weight
    assert layer.weight.grad is not None and other.weight.grad is not None and not module._waiting


SPLIT = {
    key[:-2]: (name, fields)
    for key, (name, fields) in zip(case_ids(), cases(), strict=True)
    if key.endswith("-0") and mixer_class(name).family != "softmax" and mixer_class(name).capabilities.sequence_parallel
}


@pytest.mark.parametrize("name", SPLIT)
def test_exchanges_of_a_backward_pass_have_work_beside_them(name: str) -> None:
    """The first exchange, of the state's gradient, computes the weight gradient of the output projection meanwhile."""
    _, layout = own_layout(SequenceGroup(PieceOrder(1, "zigzag"), 0), packed=False)
    waited: list[int] = []

    def gap() -> None:
        waited.append(len(module._waiting))
        fill_gap()

    with mock.patch.object(exchange, "fill_gap", gap):
        one_pass(build(*SPLIT[name]), stream(False, 0), stream(False, 1), layout)
    forward, backward = waited[: len(waited) // 2], waited[len(waited) // 2 :]
    assert not any(forward) and backward[0] == 1
    assert not any(backward[1:])  # deferring others would cost more than it hides


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("recomputed", ["layer", "core"])
def test_recomputation_sends_nothing_again(name: str, recomputed: str) -> None:
    _, layout = own_layout(SequenceGroup(PieceOrder(1, "zigzag"), 0), packed=True)
    mixer, dy = build(*SPLIT[name]), stream(True, 1).flatten(0, 1)
    x, results = stream(True, 0).flatten(0, 1).requires_grad_(), []
    for modules in ((), (recomputed,)):
        activations = mixer.host.activations = Activations(modules)
        with mock.patch.object(exchange, "_from_all", side_effect=exchange._from_all) as messages:
            y = activations.layer(0, lambda x: mixer(x, layout), x)
            sent = messages.call_count
            gradients = torch.autograd.grad(y, [x, *mixer.parameters()], dy, allow_unused=True)
        assert messages.call_count == 2 * sent
        results.append((sent, y, gradients))
    assert results[0][0] == results[1][0]
    assert_close(results[1][1], results[0][1], FP32, "output")
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(b, a, FP32, "gradient")


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("as when memory ends")


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_of_a_pass(fails: bool) -> None:
    """A pass leaves no reference cycles, which would keep parameters alive, and a failed pass leaves no gradients."""
    layer, x = layers()[0], torch.randn(3, 6, requires_grad=True)
    parameter, gc_was_enabled = ref(layer.weight), gc.isenabled()
    gc.disable()
    try:
        with later(weights_of([layer])):
            y = layer(Fails.apply(x) if fails else x).sum()
        if fails:
            with suppress(RuntimeError):  # drops the exception, whose traceback holds tensors
                y.backward()
            assert module._waiting
        del layer, y
        torch.ones(1, requires_grad=True).backward()  # autograd drops the nodes of the failed pass only now
        assert parameter() is None
    finally:
        if gc_was_enabled:
            gc.enable()
        module.fill_gap()
