"""Routed SwiGLU experts: one set of weights, several implementations."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.modeling.host import Host, Matrices, normal
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.ops import experts as ops
from linear_moe.modeling.ops.experts import reference
from linear_moe.options.errors import ConfigError


class Experts(nn.Module):
    """Routed experts of this rank: `down(silu(gate(x)) * up(x) * weight)`.

    Weights are `[out, in]` per expert as in nn.Linear: `gate_up_proj [E, 2, F, D]` (0: gate, 1: up) and
    `down_proj [E, D, F]`.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, init_std: float, output_init_std: float, host: Host):
        super().__init__()
        num, ffn = config.num_experts, config.expert_ffn_size
        axes = {0: "expert", 2: "expert_tensor"}
        weight = partial(host.parameter, axes=axes, matrices=Matrices())
        self.gate_up_proj = weight(num, 2, ffn, hidden_size, init=normal(init_std))
        self.down_proj = weight(num, hidden_size, ffn, init=normal(output_init_std))
        self.kind, self.host = config.experts, host

    def forward(self, x: Tensor, weights: Tensor, to: ops.Assignment) -> Tensor:
        """Computes the outputs `[n, D]` of tokens `x [n, D]` from their experts `to`, with `weights [n, k]`."""
        activations = self.host.activations
        if self.kind == "sequential":
            return activations.region("experts", self.sequential, x, weights, to)
        if self.kind == "quack":
            check_quack(x.dtype, x.device)  # training checks before it starts, but a model can be loaded anywhere
        return ops.experts(x, weights, self.gate_up_proj, self.down_proj, to, self.kind, activations.keeps("experts"))

    def sequential(self, x: Tensor, weights: Tensor, to: ops.Assignment) -> Tensor:
        """Computes one expert after the other; this implementation defines the result."""
        counts = to.counts.tolist()
        unassigned = weights.numel() - sum(counts)
        *tokens, rest = reference.collect(x, to).split([*counts, unassigned])
        *weight, _ = reference.row_weights(weights, to).split([*counts, unassigned])
        out = []
        for i in range(len(counts)):
            gate, up = F.linear(tokens[i], self.gate_up_proj[i].flatten(0, 1)).chunk(2, -1)
            h = (F.silu(gate) * up * weight[i].unsqueeze(-1)).to(x.dtype)
            out.append(F.linear(h, self.down_proj[i]))
        return reference.combine(torch.cat([*out, torch.zeros_like(rest)]), to)


def check_quack(dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError if model.moe.experts=quack cannot compute in `dtype` on `device`."""
    if refusal := ops.refused_by_quack(dtype, device):
        raise ConfigError("model.moe.experts", "quack", refusal, fix="set it to auto")
