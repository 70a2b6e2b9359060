"""Token dispatch in one process: tokens are only assigned to experts, and are not moved."""

from __future__ import annotations

from torch import Tensor

from linear_moe.modeling.ops.experts import assign
from linear_moe.modeling.ops.experts.assignment import Assignment


class Dispatcher:
    """Dispatcher of one MoE layer in one process; `training/host.py` has dispatchers over several ranks.

    Every call of `dispatch` must be followed by one of `combine`.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def dispatch(
        self, x: Tensor, weights: Tensor, index: Tensor, limited: bool = False
    ) -> tuple[Tensor, Tensor, Assignment]:
        """Brings tokens to the ranks of their experts.

        Args:
            x: `[n, D]` this rank's tokens.
            weights: `[n, k]` weights of each token's experts.
            index: `[n, k]` numbers of each token's experts; num_experts: no expert.
            limited: no expert was chosen by more tokens than its capacity.

        Returns:
            Input of the local experts: tokens `[n', D]`, weights `[n', k']`, and the assignment of tokens to experts.
            The tokens are either x (k' = k), or tokens received from all ranks, sorted by local expert (k' = 1).
        """
        return x, weights, assign(index, self.num_experts)

    def combine(self, y: Tensor) -> Tensor:
        """Brings the experts' outputs `[n', D]` back to the tokens' own ranks; returns this rank's `[n, D]`."""
        return y
