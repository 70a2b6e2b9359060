"""Deferred weight gradients, computed while a backward pass would otherwise wait for other processes.

The backward pass of a linear layer has two matrix products: the gradient of its input, which the rest of the backward
pass needs, and the gradient of its weight, which only the optimizer needs. Within `later`, `linear` puts the second
product off until `fill_gap` is called or, at the latest, until autograd comes to the point at which `weights_of` was
called. (Delayed weight gradients fill pipeline bubbles in the same way: arXiv 2401.10241.) The gradients do not change,
only the time at which they are computed.
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

# Gradients that wait, in the order of the backward pass, which runs in one thread at a time. The references are weak,
# so that a backward pass that fails leaves nothing behind.
_waiting: list[ref[Weight]] = []


class Weight:
    """Deferred gradient of a weight `[out, in]`; the autograd graph holds this object, which itself holds no graph."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []  # gradient of an output, and its input
        self.gradient: Tensor | None = None

    def wait(self, d_y: Tensor, x: Tensor) -> None:
        self.parts.append((d_y.flatten(0, -2), x.flatten(0, -2)))
        _waiting.append(ref(self))

    def compute(self) -> None:
        for d_y, x in self.parts:
            product = d_y.mT @ x
            self.gradient = product if self.gradient is None else self.gradient + product
        self.parts.clear()


def fill_gap() -> None:
    """Computes all deferred gradients; call it where the device, or the process, has nothing else to do."""
    for waiting in _waiting:
        if (weight := waiting()) is not None:
            weight.compute()
    _waiting.clear()


Weights = dict[nn.Module, tuple[Weight, Tensor]]
"""Deferred gradient and marker of each module. The marker's autograd node is the oldest, so that it runs last."""


def weights_of(modules: Iterable[nn.Module]) -> Weights:
    """Makes the deferred gradients of the trained linear layers among `modules`, for `later`."""
    trained = {m: Weight() for m in modules if isinstance(m, nn.Linear) and m.weight.requires_grad}
    return {m: (waits, _Mark.apply(m.weight, waits)) for m, waits in trained.items()}


_active: ContextVar[Weights | None] = ContextVar("later", default=None)


@contextmanager
def later(weights: Weights | None) -> Iterator[None]:
    """Context in which `linear` defers the weight gradients of the modules in `weights` (None: of no module)."""
    token = _active.set(weights)
    try:
        yield
    finally:
        _active.reset(token)


def linear(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `F.linear(x, weight, bias)` for `x [..., in]` and the weight of `module`, deferred within `later`."""
    deferred = (_active.get() or {}).get(module)
    if deferred is None or weight is not module.weight:
        return F.linear(x, weight, bias)
    waits, marker = deferred
    y: Tensor = _Product.apply(x, marker, weight.detach(), bias, waits)
    return y


class _Mark(Function):
    """Maps a weight to an empty tensor, the marker, whose backward pass returns the gradient of the weight."""

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
    """`F.linear` in which autograd sees the marker instead of the weight, and which defers the weight's gradient."""

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
