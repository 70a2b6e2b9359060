"""Computing on a second CUDA stream beside what the current one does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Branch:
    """`function(x)` from `start` to `join`, beside what the caller gives the current stream in between.

    It waits for nothing that the current stream was given after `Branch` was made. Autograd runs each backward op on
    the stream of its forward op, so the backward pass branches as well. The host never waits. On a CPU, or with `aside`
    false, `start` computes in place: the same ops in the same order, and so the same numbers.

    `function` must not communicate: collectives stay on the current stream, in the order of the program, because those
    of two communicators whose order differs between ranks can block each other.

    With activation recomputation, the recomputed forward pass runs on the stream of the op that first asks for it. That
    must be an op of the current stream: one that comes after `start` in the forward pass, and keeps a tensor.

    Args:
        function: of one tensor.
        x: on the current stream, and ready there.
        aside: use the other stream, if x is on a GPU.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, aside: bool):
        self.function, self.x = function, x
        self._side = _side_stream(x.device) if aside and x.is_cuda else None
        if self._side is not None:
            self._main = torch.cuda.current_stream(x.device)
            assert self._main != self._side, "recomputed from the branch's own backward pass"
            self._ready = self._main.record_event()

    def start(self) -> None:
        if self._side is None:
            self._y = self.function(self.x)
            return
        self._side.wait_event(self._ready)
        # The allocator knows a tensor's first stream only; autograd may let go of x while the other still reads it.
        self.x.record_stream(self._side)
        with torch.cuda.stream(self._side):
            self._y = self.function(self.x)

    def join(self) -> Tensor:
        """The function's value, ready on the current stream."""
        if self._side is not None:
            self._main.wait_stream(self._side)
            self._y.record_stream(self._main)
        return self._y
