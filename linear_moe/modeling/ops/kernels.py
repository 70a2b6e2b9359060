"""Small operations around recurrences, each one pass over memory on CUDA, defined by a PyTorch function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
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
    return find_spec("triton") is not None


class _Fused(Function):
    """Saves its inputs only; without kernels the backward pass computes the definition again."""

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
        found = iter(torch.autograd.grad(y, wanted, grads))
        return None, None, None, *(next(found) if need else None for need in needs)


def fused(definition: Callable[..., Any], kernels: str, *inputs: Tensor | None, **options: Any) -> Any:
    """`definition(*inputs, **options)`, differentiable once, saving only the inputs for the backward pass.

    Args:
        kernels: a Triton module of this package, used if the first input is on CUDA and not fp64, with
            `forward(*inputs, **options)` and `backward(grad, *inputs, **options)` -> a gradient (or None) for each
            input. Where the definition returns a tuple, so does `forward`, and `grad` is one.
    """
    first = inputs[0]
    assert first is not None
    if first.is_cuda and first.dtype != torch.float64 and has_triton():
        return on_kernels(kernels, *inputs, **options)
    return _Fused.apply(definition, None, options, *inputs)


def on_kernels(kernels: str, *inputs: Tensor | None, **options: Any) -> Any:
    """The Triton kernels of `fused`, for inputs on CUDA."""
    module = importlib.import_module(f"linear_moe.modeling.ops.fused.{kernels}")
    with torch.cuda.device_of(inputs[0]):  # where Triton launches; autograd sees to the backward pass
        return _Fused.apply(None, module, options, *inputs)


def upcast(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
