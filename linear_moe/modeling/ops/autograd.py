"""The base class of our differentiable operations."""

from __future__ import annotations

from typing import Any

import torch


class Function(torch.autograd.Function):
    """A `torch.autograd.Function` whose subclasses may name and type the arguments of `forward` and `backward`.

    PyTorch declares both methods with a context and any number of arguments, so type checkers refuse a subclass that
    names its own arguments.
    """

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def backward(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
