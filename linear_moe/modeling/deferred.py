"""Gradients of weights at a later time: where a backward pass would otherwise wait for other processes.

A linear layer's backward pass is two products: the gradient of its input, which what comes next needs, and that of its
weight, which nothing needs before the optimizer. Within `later` the second one is put off: until `fill_gap` is called,
or until autograd comes to where `later` was entered. (Delayed weight gradients fill pipeline bubbles in the same way:
arXiv 2401.10241.) Values do not change, only when they are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import ref

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function

# In the order of the backward pass, which runs in one thread at a time. Weakly: one that fails leaves nothing behind.
_waiting: list[ref[Weight]] = []


class Weight:
    """What the gradient of a weight `[out, in]` of one forward pass waits for. The graph holds it, it no graph."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []  # gradient of an output, and its input
        self.gradient: Tensor | None = None

    def wait(self, d_y: Tensor, x: Tensor) -> None:
        self.parts.append((d_y.flatten(0, -2), x.flatten(0, -2)))
        _waiting.append(ref(self))

    def compute(self) -> None:
        for d_y, x in self.parts:
            found = d_y.mT @ x
            self.gradient = found if self.gradient is None else self.gradient + found
        self.parts.clear()


def fill_gap() -> None:
    """Compute the gradients that wait. Call where the device, or the process, has nothing else to do."""
    for waiting in _waiting:
        if (weight := waiting()) is not None:
            weight.compute()
    _waiting.clear()


Weights = dict[nn.Module, tuple[Weight, Tensor]]
"""With the marker of each, whose node is the oldest of the pass, so that autograd comes to it last."""


def weights_of(modules: Iterable[nn.Module]) -> Weights:
    """Those of the trained linear layers among them, for `later`."""
    trained = {m: Weight() for m in modules if isinstance(m, nn.Linear) and m.weight.requires_grad}
    return {m: (waits, _Mark.apply(m.weight, waits)) for m, waits in trained.items()}


_active: ContextVar[Weights | None] = ContextVar("later", default=None)


@contextmanager
def later(weights: Weights | None) -> Iterator[None]:
    """Within it, `linear` puts off the gradients of these."""
    token = _active.set(weights)
    try:
        yield
    finally:
        _active.reset(token)


def linear(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, `x [..., in]`, with the weight of a module."""
    found = (_active.get() or {}).get(module)
    if found is None or weight is not module.weight:
        return F.linear(x, weight, bias)
    waits, marker = found
    y: Tensor = _Product.apply(x, marker, weight.detach(), bias, waits)
    return y


class _Mark(Function):
    """A weight -> an empty tensor, whose backward pass gives the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, waits: Weight) -> Tensor:
        ctx.waits = waits
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        waits: Weight = ctx.waits
        if waits.parts:
            _waiting[:] = [waiting for waiting in _waiting if waiting() is not waits]
            waits.compute()
        gradient, waits.gradient = waits.gradient, None
        return gradient, None


class _Product(Function):
    """`F.linear`, with the marker of the weight for the weight that is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marker: Tensor, weight: Tensor, bias: Tensor | None, waits: Weight) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.waits = waits
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.waits.wait(d_y, x)
        d_x = d_y @ weight if ctx.needs_input_grad[0] else None
        d_bias = d_y.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return d_x, d_y.new_empty(0), None, d_bias, None
