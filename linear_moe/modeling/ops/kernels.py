"""Framework for small operations around recurrences, and stand-ins for the kernels of any operation.

A small operation is a PyTorch definition and, for CUDA, Triton kernels (`fused`).

Within `stand_ins`, ops on any device choose and prepare as on a GPU, but in a kernel's place an autograd function keeps
the tensors that the function `kept...` beside the kernel's call names. On the meta device that costs neither memory nor
arithmetic: `plan/saved.py` measures there how much a forward pass keeps.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.modeling.ops.autograd import Function


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


class _Fused(Function):
    """An operation that saves only its inputs; without kernels, its backward pass computes the definition again."""

    @staticmethod
    def forward(
        ctx: Any,
        definition: Callable[..., Any] | None,
        kernels: ModuleType | None,
        options: dict,
        *inputs: Tensor | None,
    ) -> Any:
        ctx.definition, ctx.kernels, ctx.options = definition, kernels, options
        ctx.save_for_backward(*inputs)
        function: Any = definition if kernels is None else kernels.forward
        y = function(*inputs, **options)
        ctx.several = isinstance(y, tuple)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if ctx.kernels is not None:
            return None, None, None, *ctx.kernels.backward(grads if ctx.several else grads[0], *inputs, **ctx.options)
        leaves = [x if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        with torch.enable_grad():
            y = ctx.definition(*leaves, **ctx.options)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        gradients = iter(torch.autograd.grad(y, wanted, grads))
        return None, None, None, *(next(gradients) if need else None for need in needs)


def fused(definition: Callable[..., Any], kernels: str, *inputs: Tensor | None, **options: Any) -> Any:
    """Returns `definition(*inputs, **options)`, differentiable once; only the inputs are saved for the backward pass.

    Args:
        kernels: name of a Triton module of `ops/fused`, which is used if the first input is on CUDA and not fp64. The
            module has `forward(*inputs, **options)` and `backward(grad, *inputs, **options)`, which returns a gradient
            (or None) for each input. If the definition returns a tuple, so does `forward`, and `grad` is a tuple.
    """
    first = inputs[0]
    assert first is not None
    if first.is_cuda and first.dtype != torch.float64 and has_triton():
        return on_kernels(kernels, *inputs, **options)
    return _Fused.apply(definition, None, options, *inputs)


def on_kernels(kernels: str, *inputs: Tensor | None, **options: Any) -> Any:
    """Runs the Triton kernels of `fused` on inputs that are on CUDA."""
    module = importlib.import_module(f"linear_moe.modeling.ops.fused.{kernels}")
    with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device; autograd sets it in backward
        return _Fused.apply(None, module, options, *inputs)


def upcast(x: Tensor) -> Tensor:
    """Casts `x` to fp32; fp64 stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


_active: ContextVar[bool] = ContextVar("stand_ins", default=False)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Replaces kernels by stand-ins in the scope of this context."""
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def stood_in() -> bool:
    """Whether stand-ins replace kernels here."""
    return _active.get()


def stand_in(outputs: Sequence[Tensor], kept: Iterable[Tensor | None], inputs: Iterable[Tensor | None]) -> Any:
    """Returns `outputs`, a tensor or a tuple, as an operation of `inputs` that keeps `kept` for its backward pass."""
    results: tuple[Tensor, ...] = _StandIn.apply(list(outputs), list(kept), *inputs)
    return results if len(results) > 1 else results[0]


class _StandIn(Function):
    """Keeps given tensors; its gradients are zeros."""

    @staticmethod
    def forward(
        ctx: Any, outputs: list[Tensor], kept: list[Tensor | None], *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*kept)
        ctx.like = [None if x is None else (x.shape, x.dtype, x.device) for x in inputs]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # as a kernel's backward pass, it asks for them
        del kept
        zeros = [None if x is None else torch.zeros(x[0], dtype=x[1], device=x[2]) for x in ctx.like]
        return None, None, *(z if need else None for z, need in zip(zeros, ctx.needs_input_grad[2:], strict=True))
