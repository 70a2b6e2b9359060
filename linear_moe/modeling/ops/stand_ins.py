"""Stand-ins for the kernels of a GPU: they keep for the backward pass what the kernels keep, and compute zeros.

Within `stand_ins`, ops on any device choose and prepare as on a GPU, but in a kernel's place an autograd function keeps
the tensors that the function `kept...` beside the kernel's call names. On the meta device that costs neither memory nor
arithmetic: `plan/saved.py` measures there how much a forward pass keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.ops.autograd import Function

_active: ContextVar[bool] = ContextVar("stand_ins", default=False)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Within it, kernels are stood in for."""
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def stood_in() -> bool:
    """Whether kernels are stood in for."""
    return _active.get()


def stand_in(outputs: Sequence[Tensor], kept: Iterable[Tensor | None], inputs: Iterable[Tensor | None]) -> Any:
    """`outputs`, as an operation of `inputs` gives them that keeps `kept` for its backward pass; one, or a tuple."""
    found: tuple[Tensor, ...] = _StandIn.apply(list(outputs), list(kept), *inputs)
    return found if len(found) > 1 else found[0]


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
