"""Expert parallelism in blocks of one size: a capacity bounds the tokens, so ranks need not exchange their numbers."""

from __future__ import annotations

import torch
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from linear_moe.modeling.ops.experts import assign
from linear_moe.modeling.ops.experts.assignment import Assignment
from linear_moe.modeling.ops.kernels import upcast


class PaddedAllToAll:
    """Sends `limit` rows from every rank to every expert; rows without a token are zeros.

    `dispatch` and `combine` are called in pairs. Sizes follow from shapes, so the host never waits for the device,
    unlike with a dropless all-to-all.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self._expert, self._tensor = ps.get_expert_model_parallel_group(), ps.get_expert_tensor_parallel_group()

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor, limit: int) -> tuple[Tensor, Tensor, Assignment]:
        """Sends tokens `x [n, D]` with `weights [n, k]` to the experts `index [n, k]`.

        Args:
            index: number of each chosen expert, `num_experts` for none; at most `limit` choices of each expert.
            limit: rows of an expert's block.

        Returns:
            the local experts' rows `[n', D]`, their weights `[n']`, and the assignment of rows to experts.
        """
        n, k = index.shape
        to = assign(index, self.num_experts)
        assert to.row is not None
        before = to.row - to.offsets.index_select(0, index.flatten()).view(n, k)
        size = self.num_experts * limit
        # Row of each choice in the blocks of all experts; a choice of no expert takes row `size`, which is cut off.
        self._place = torch.where(index < self.num_experts, index * limit + before, size).flatten()
        rows = x.unsqueeze(1).expand(n, k, -1).flatten(0, 1)
        rows = x.new_zeros(size + 1, x.shape[1]).index_copy(0, self._place, rows)[:-1]
        row_weights = weights.new_zeros(size + 1).index_copy(0, self._place, weights.flatten())[:-1]
        local = self.num_experts // self._expert.size()
        sources = self._expert.size() * self._tensor.size()
        self._blocks = (local, sources, limit)
        counts = torch.full((local,), sources * limit, dtype=torch.int32, device=x.device)
        return self._send(rows), self._send(row_weights), Assignment.of_rows(counts)

    def _send(self, rows: Tensor) -> Tensor:
        """Exchanges blocks for all experts for the blocks of the local experts from all ranks, sorted by expert."""
        local, sources, limit = self._blocks
        rows = all_to_all(self._expert, rows)
        if self._tensor.size() > 1:
            rows = gather_from_sequence_parallel_region(rows, group=self._tensor)
        return rows.unflatten(0, (sources, local, limit)).transpose(0, 1).flatten(0, 2)

    def combine(self, y: Tensor, top_k: int) -> Tensor:
        """Sends rows `[n', D]` back and sums those of each token: `[n, D]`, summed in fp32 and rounded once."""
        local, sources, limit = self._blocks
        y = y.unflatten(0, (local, sources, limit)).transpose(0, 1).flatten(0, 2)
        if self._tensor.size() > 1:
            y = reduce_scatter_to_sequence_parallel_region(y, group=self._tensor)
        y = all_to_all(self._expert, y)
        y = torch.cat([y, y.new_zeros(1, y.shape[1])]).index_select(0, self._place)
        return upcast(y.unflatten(0, (-1, top_k))).sum(1).to(y.dtype)
