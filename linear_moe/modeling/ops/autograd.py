"""The base class of our differentiable operations."""

from __future__ import annotations

from typing import Any

import torch


class Function(torch.autograd.Function):
    """`torch.autograd.Function` whose subclasses may name and type the arguments of `forward` and `backward`.

    PyTorch declares both for a context and any number of arguments, which type checkers hold against a subclass that
    says which ones it takes.
    """

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def backward(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
