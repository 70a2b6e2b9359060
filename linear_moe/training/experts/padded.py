"""Expert parallelism in blocks of one size: with a capacity, no rank has to ask others how many tokens will come."""

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
    """`dispatch` then `combine`, in pairs: every rank sends `limit` rows to every expert, zeros where it has fewer.

    Sizes follow from shapes, so the host never waits for the device, unlike with a dropless all-to-all.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self._expert, self._tensor = ps.get_expert_model_parallel_group(), ps.get_expert_tensor_parallel_group()

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor, limit: int) -> tuple[Tensor, Tensor, Assignment]:
        """Tokens `x [n, D]` with `weights [n, k]` of the experts `index [n, k]` -> rows `[n', D]`, weights `[n']`.

        Args:
            index: num_experts: none; of each expert, there are at most `limit`.
        """
        n, k = index.shape
        to = assign(index, self.num_experts)
        assert to.row is not None
        before = to.row - to.offsets.index_select(0, index.flatten()).view(n, k)
        size = self.num_experts * limit
        self._place = torch.where(index < self.num_experts, index * limit + before, size).flatten()  # size: none
        rows = x.unsqueeze(1).expand(n, k, -1).flatten(0, 1)
        rows = x.new_zeros(size + 1, x.shape[1]).index_copy(0, self._place, rows)[:-1]
        row_weights = weights.new_zeros(size + 1).index_copy(0, self._place, weights.flatten())[:-1]
        local = self.num_experts // self._expert.size()
        sources = self._expert.size() * self._tensor.size()
        self._blocks = (local, sources, limit)
        counts = torch.full((local,), sources * limit, dtype=torch.int32, device=x.device)
        return self._send(rows), self._send(row_weights), Assignment.of_rows(counts)

    def _send(self, rows: Tensor) -> Tensor:
        """Blocks of all experts -> those of the local ones from all ranks, sorted by expert."""
        local, sources, limit = self._blocks
        rows = all_to_all(self._expert, rows)
        if self._tensor.size() > 1:
            rows = gather_from_sequence_parallel_region(rows, group=self._tensor)
        return rows.unflatten(0, (sources, local, limit)).transpose(0, 1).flatten(0, 2)

    def combine(self, y: Tensor, top_k: int) -> Tensor:
        """Rows `[n', D]` -> tokens `[n, D]`, sums in fp32, rounded once."""
        local, sources, limit = self._blocks
        y = y.unflatten(0, (local, sources, limit)).transpose(0, 1).flatten(0, 2)
        if self._tensor.size() > 1:
            y = reduce_scatter_to_sequence_parallel_region(y, group=self._tensor)
        y = all_to_all(self._expert, y)
        y = torch.cat([y, y.new_zeros(1, y.shape[1])]).index_select(0, self._place)
        return upcast(y.unflatten(0, (-1, top_k))).sum(1).to(y.dtype)
