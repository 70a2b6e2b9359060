"""Routed SwiGLU experts behind one interface: same weights, two implementations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.config.schema import MoEConfig
from linear_moe.modeling.host import Host, normal

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10


class Experts(nn.Module):
    """This rank's experts: `down(silu(gate(x)) * up(x) * prob)`.

    Weights are `[out, in]` per expert as in nn.Linear: `gate_up_proj [E, 2, F, D]` (0: gate, 1: up) and
    `down_proj [E, D, F]`.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, init_std: float, output_init_std: float, host: Host):
        super().__init__()
        num, ffn = config.num_experts, config.expert_ffn_size
        axes = {0: "expert", 2: "expert_tensor"}
        self.gate_up_proj = host.parameter(num, 2, ffn, hidden_size, init=normal(init_std), axes=axes)
        self.down_proj = host.parameter(num, hidden_size, ffn, init=normal(output_init_std), axes=axes)
        self.compute = {"grouped": self.grouped, "sequential": self.sequential}[config.experts]

    def forward(self, x: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Tensor:
        """Tokens sorted by expert `x [M, D]`, tokens per expert `[E]`, weights `probs [M]` -> `[M, D]`."""
        return self.compute(x, tokens_per_expert, probs)

    def grouped(self, x: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Tensor:
        """All experts in two grouped GEMMs."""
        ends = tokens_per_expert.to(x.device).cumsum(0).to(torch.int32)
        gate, up = grouped_mm(x, self.gate_up_proj.flatten(1, 2).transpose(1, 2), offs=ends).chunk(2, -1)
        h = (F.silu(gate) * up * probs.unsqueeze(-1)).to(x.dtype)
        return grouped_mm(h, self.down_proj.transpose(1, 2), offs=ends)

    def sequential(self, x: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Tensor:
        """One expert after the other: the definition."""
        counts = tokens_per_expert.tolist()
        out = []
        for i, (tokens, weight) in enumerate(zip(x.split(counts), probs.split(counts), strict=True)):
            gate, up = F.linear(tokens, self.gate_up_proj[i].flatten(0, 1)).chunk(2, -1)
            out.append(F.linear((F.silu(gate) * up * weight.unsqueeze(-1)).to(x.dtype), self.down_proj[i]))
        return torch.cat(out)
