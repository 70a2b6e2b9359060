"""Token dispatch in one process: tokens stay where they are, and are only assigned to experts."""

from __future__ import annotations

from torch import Tensor

from linear_moe.modeling.ops.experts import assign
from linear_moe.modeling.ops.experts.assignment import Assignment


class Dispatcher:
    """`dispatch` then `combine`, in pairs. `training/host.py` has the same interface over several ranks."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def dispatch(
        self, x: Tensor, weights: Tensor, index: Tensor, limited: bool = False
    ) -> tuple[Tensor, Tensor, Assignment]:
        """Tokens `x [n, D]` and their experts' `weights [n, k]` and `index [n, k]` (num_experts: none) -> what the
        local experts work on: tokens `[n', D]`, weights `[n', k']`, and which expert they are assigned to.

        Either the same tokens, k times assigned, or tokens received from all ranks, sorted by local expert (k' = 1).

        Args:
            limited: no expert has more than its capacity.
        """
        return x, weights, assign(index, self.num_experts)

    def combine(self, y: Tensor) -> Tensor:
        """What the experts made of the dispatched tokens, `[n', D]` -> outputs of this rank's tokens `[n, D]`."""
        return y
