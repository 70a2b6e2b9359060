"""Expert parallelism by gathering tokens: every rank of an expert group sees all of the group's tokens."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from linear_moe.modeling.moe.dispatch import Dispatcher
from linear_moe.modeling.ops.experts import assign
from linear_moe.modeling.ops.experts.assignment import Assignment


class AllGatherDispatcher(Dispatcher):
    """Gathers all tokens of the expert group on every rank, and sums the ranks' outputs for each token.

    `dispatch` and `combine` are called in pairs. Sizes follow from shapes, so the host never waits for the device. A
    rank's buffers have room for the case that all tokens of the group choose its experts.

    Args:
        num_experts: number of experts on all ranks together.
        first, local: number of this rank's first expert, and number of its experts.
    """

    def __init__(self, num_experts: int, first: int, local: int):
        super().__init__(num_experts)
        self.first, self.local = first, local
        self._group = ps.get_expert_tensor_and_model_parallel_group()

    def dispatch(
        self, x: Tensor, weights: Tensor, index: Tensor, limited: bool = False
    ) -> tuple[Tensor, Tensor, Assignment]:
        everyones = index.new_empty(len(index) * self._group.size(), index.shape[1])
        dist.all_gather_into_tensor(everyones, index.contiguous(), group=self._group)
        local = everyones - self.first
        elsewhere = (local < 0) | (local >= self.local)
        tokens, weights = (gather_from_sequence_parallel_region(part, group=self._group) for part in (x, weights))
        return tokens, weights, assign(local.masked_fill(elsewhere, self.local), self.local)

    def combine(self, y: Tensor) -> Tensor:
        return reduce_scatter_to_sequence_parallel_region(y, group=self._group)
