"""The router: scores, top-k and weights, one arithmetic for training and inference."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.config.schema import MoEConfig
from linear_moe.modeling.host import Host, normal


def scores(logits: Tensor, config: MoEConfig) -> Tensor:
    """Router logits `[n, E]` -> scores of all experts `[n, E]` in fp32."""
    logits = logits.float()
    return logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()


def route(logits: Tensor, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """Choose the top-k experts of every token.

    Returns:
        Their weights `[n, k]` fp32 and which they are, `[n, k]` int64.
    """
    top, index = scores(logits, config).topk(config.top_k, dim=-1)
    if config.normalize_top_k:
        top = top / (top.sum(-1, keepdim=True) + 1e-20)
    return top, index


class Router(nn.Module):
    """Linear router in fp32: `x [n, D]` -> experts' weights `[n, k]` and index `[n, k]`, with the host's losses."""

    def __init__(self, config: MoEConfig, hidden_size: int, init_std: float, layer: int, host: Host):
        super().__init__()
        self.config, self.layer, self.host = config, layer, host
        self.weight = host.parameter(config.num_experts, hidden_size, init=normal(init_std), tokenwise=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.float(), self.weight.float())
        weights, index = route(logits, self.config)
        return self.host.router_losses(weights, logits, index, self.config, self.layer), index
