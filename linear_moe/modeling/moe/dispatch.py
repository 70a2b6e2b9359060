"""Token dispatch in one process: sort tokens by expert, and add the experts' outputs back."""

from __future__ import annotations

import torch
from torch import Tensor


class Dispatcher:
    """`dispatch` then `combine`, in pairs. `training/host.py` has the same interface over several ranks."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self._token: Tensor | None = None
        self._shape: torch.Size | None = None

    def dispatch(self, x: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `x [n, D]`, `probs [n, E]`, boolean `routing_map [n, E]` -> what the local experts work on:
        tokens sorted by expert `[M, D]`, tokens per local expert `[E_local]` int64, their probabilities `[M]`.
        """
        self._shape = x.shape
        expert, self._token = routing_map.T.nonzero(as_tuple=True)
        return x[self._token], routing_map.sum(0), probs[self._token, expert]

    def combine(self, y: Tensor) -> Tensor:
        """Experts' outputs `[M, D]`, already weighted by their probabilities -> `[n, D]`."""
        assert self._token is not None and self._shape is not None, "combine() follows dispatch()"
        return torch.zeros(self._shape, dtype=y.dtype, device=y.device).index_add(0, self._token, y)
