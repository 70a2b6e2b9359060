"""Router of a mixture of experts: scores, choice and weights, with the same arithmetic in training and inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from linear_moe.modeling.host import Host, constant, normal
from linear_moe.modeling.moe.capacity import capacity, within_capacity
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.ops.autograd import Function
from linear_moe.modeling.tokens import TokenLayout


def scores(logits: Tensor, config: MoEConfig) -> Tensor:
    """Turns router logits `[n, E]` into scores of all experts `[n, E]` in fp32."""
    logits = logits.float()
    return logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()


def choose(choice: Tensor, config: MoEConfig) -> Tensor:
    """Indices `[n, k]` int64 of each token's top-k experts by the scores `choice [n, E]`, within its best groups."""
    if config.num_groups > 1:
        groups = choice.unflatten(-1, (config.num_groups, -1))
        best = groups.amax(-1) if config.group_score == "max" else groups.topk(2, dim=-1).values.sum(-1)
        index = best.topk(config.top_k_groups, dim=-1).indices
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(-1, index, True)
        choice = groups.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
    return choice.topk(config.top_k, dim=-1).indices


def route(
    logits: Tensor,
    config: MoEConfig,
    bias: Tensor | None = None,
    once: Callable[[Callable[[], Tensor]], Tensor] = lambda choose: choose(),
) -> tuple[Tensor, Tensor]:
    """Chooses the top-k experts of every token and weighs them.

    Args:
        logits: `[n, E]`.
        bias: `[E]` fp32, added to the scores for the choice only.
        once: calls the function that makes the choice; `Activations.once` returns the first choice when recomputing.

    Returns:
        Weights `[n, k]` fp32 and indices `[n, k]` int64 of the chosen experts.
    """
    all_scores = scores(logits, config)
    choice = all_scores.detach()
    index = once(lambda: choose(choice if bias is None else choice + bias, config))
    if config.top_k_first:
        top = logits.float().gather(-1, index).softmax(-1)
    else:
        top = all_scores.gather(-1, index)
        if config.normalize_top_k:
            top = top / (top.sum(-1, keepdim=True) + 1e-20)
    return top * config.routed_scaling_factor, index


class _Logits(Function):
    """Product `[n, E]` of `x [n, D]` and `weight [E, D]` in fp32.

    The backward pass keeps x in its own dtype: an fp32 copy would be the largest activation of the layer. The product
    is in fp32 within `torch.autocast` too, because bf16 logits would choose other experts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        dx = (grad @ weight.float()).to(x.dtype) if need_x else None
        dweight = (grad.T @ x.float()).to(weight.dtype) if need_weight else None
        return dx, dweight


class Router(nn.Module):
    """Linear router in fp32: `x [n, D]` -> experts' weights `[n, k]` and index `[n, k]`, with the host's losses.

    An index of num_experts means that the token is beyond the expert's capacity, and no expert takes it.

    `expert_bias [E]` is not trained by gradients: the training loop changes it after each step (`expert_bias` of
    MoEConfig). It is saved and exported like a parameter.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, init_std: float, layer: int, host: Host):
        super().__init__()
        self.config, self.layer, self.host = config, layer, host
        self.weight = host.parameter(config.num_experts, hidden_size, init=normal(init_std), tokenwise=True)
        self.expert_bias: nn.Parameter | None = None
        if config.expert_bias:
            self.expert_bias = host.parameter(
                config.num_experts, init=constant(0.0), decay=False, fp32=True, trained=False
            )

    def forward(self, x: Tensor, layout: TokenLayout | None = None) -> tuple[Tensor, Tensor]:
        """Routes tokens `x [n, D]`; `layout` None: the tokens are one sequence, and all of it is on this rank."""
        config = self.config
        logits = _Logits.apply(x, self.weight)
        once = self.host.activations.once
        weights, index = route(logits, config, self.expert_bias, once)
        layout, counted = layout or TokenLayout(1, len(x)), index
        if layout.padding is not None:  # without a capacity, experts compute padding too: shapes do not depend on it
            counted = index.masked_fill(self.host.own_tokens(layout.padding.view(-1, 1)), config.num_experts)
        kept = once(lambda: self._kept(weights.detach(), counted, layout)) if self.limited else None
        self.host.observe_routing(counted, kept, config, self.layer)
        weights = self.host.router_losses(weights, logits, counted, config, self.layer, layout)
        if kept is None:
            return weights, index
        return weights * kept, counted.masked_fill(~kept, config.num_experts)

    @property
    def limited(self) -> bool:
        """Whether experts take no more than their capacity: in training only."""
        return self.config.capacity_factor is not None and self.training

    def _kept(self, weights: Tensor, index: Tensor, layout: TokenLayout) -> Tensor:
        """Selects the choices `[n, k]` bool within the experts' capacity, which counts the micro-batch on all ranks."""
        shape, pieces = (len(weights), self.config.num_experts + 1), layout.pieces  # last column: no expert
        everywhere = self.host.all_tokens(weights.new_full(shape, -1.0).scatter(1, index, weights)[:, :-1])
        if pieces is not None:
            everywhere = pieces.all_tokens(everywhere)
        limit = capacity(len(everywhere) if pieces is None else pieces.tokens, self.config)
        taken = within_capacity(everywhere, limit, self.config.drop_policy)
        if pieces is not None:
            taken = pieces.own_tokens(taken)
        return F.pad(self.host.own_tokens(taken), (0, 1)).gather(1, index)
