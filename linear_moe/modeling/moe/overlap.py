"""Computation on a second CUDA stream, beside the current one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Branch:
    """Computation of `function(x)` on a second stream from `start` to `join`, beside the caller's work in between.

    The second stream does not wait for work that the current stream gets after `Branch` was made. Autograd runs each
    backward op on the stream of its forward op, so the backward pass branches as well. The host never waits. On a CPU,
    or with `aside` false, `start` computes on the current stream: the same ops in the same order, with equal results.

    `function` must not communicate. Collectives stay on the current stream, in the order of the program, because
    collectives of two communicators can block each other if their order differs between ranks.

    With activation recomputation, the recomputed forward pass runs on the stream of the op that first needs a
    recomputed tensor. This must be an op of the current stream that comes after `start` in the forward pass.

    Args:
        function: function of one tensor.
        x: tensor that is ready on the current stream.
        aside: use the second stream, if x is on a GPU.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, aside: bool):
        self.function, self.x = function, x
        self._side = _side_stream(x.device) if aside and x.is_cuda else None
        if self._side is not None:
            self._main = torch.cuda.current_stream(x.device)
            assert self._main != self._side, "recomputed from the branch's own backward pass"
            self._ready = self._main.record_event()

    def start(self) -> None:
        """Begins the computation."""
        if self._side is None:
            self._y = self.function(self.x)
            return
        self._side.wait_event(self._ready)
        # The allocator only knows the stream on which x was made: autograd may free x while the second stream reads it.
        self.x.record_stream(self._side)
        with torch.cuda.stream(self._side):
            self._y = self.function(self.x)

    def join(self) -> Tensor:
        """Makes the current stream wait for the second one, and returns the function's value."""
        if self._side is not None:
            self._main.wait_stream(self._side)
            self._y.record_stream(self._main)
        return self._y
