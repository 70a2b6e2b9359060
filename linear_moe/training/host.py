"""The Megatron-Core host: the same model, spread over tensor, expert and pipeline ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_default_pg_collection,
    switch_load_balancing_loss_func,
    z_loss_func,
)
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from torch import Tensor, nn

from linear_moe.config.schema import MoEConfig
from linear_moe.modeling.host import Host, Init
from linear_moe.modeling.moe.dispatch import Dispatcher
from linear_moe.modeling.moe.router import scores
from linear_moe.modeling.ops.experts import Assignment

DISPATCHERS = {"alltoall": MoEAlltoAllTokenDispatcher, "allgather": MoEAllGatherTokenDispatcher}


class MegatronHost(Host):
    """Call after `parallel.initialize`.

    Args:
        config: Megatron's configuration, from `megatron_config`.
        device: of the parameters.
        recompute: recompute layers' activations in the backward pass.
    """

    def __init__(self, config: TransformerConfig, device: torch.device, recompute: bool = False):
        super().__init__(config.params_dtype, device, recompute)
        self.config = config
        self.tensor_sequence: bool = config.sequence_parallel
        self._sizes = {
            "tensor": ps.get_tensor_model_parallel_world_size(),
            "expert": ps.get_expert_model_parallel_world_size(),
            "expert_tensor": ps.get_expert_tensor_parallel_world_size(),
        }
        self._ranks = {
            "tensor": ps.get_tensor_model_parallel_rank(),
            "expert": ps.get_expert_model_parallel_rank(),
            "expert_tensor": ps.get_expert_tensor_parallel_rank(),
        }
        self._auxiliary: dict[str, Tensor] = {}  # by name: the sum of what is reported, and how many were added

    def size(self, axis: str) -> int:
        return self._sizes[axis]

    def rank(self, axis: str) -> int:
        return self._ranks[axis]

    def parameter(
        self,
        *shape: int,
        init: Init,
        axes: Mapping[int, str] | None = None,
        decay: bool = True,
        fp32: bool = False,
        tokenwise: bool = False,
    ) -> nn.Parameter:
        """See Host; also tells Megatron over which ranks to reduce the gradient and to count it in the norm."""
        parameter: Any = super().parameter(*shape, init=init, axes=axes, decay=decay, fp32=fp32, tokenwise=tokenwise)
        split = {axis: dim for dim, axis in parameter.spec.axes.items()}
        expert = "expert" in split
        assert not expert or "expert_tensor" in split, "clipping would count an expert's unsplit parameter many times"
        dim = split.get("expert_tensor" if expert else "tensor", -1)
        set_tensor_model_parallel_attributes(parameter, is_parallel=dim >= 0, dim=dim, stride=1)
        parameter.allreduce = not expert  # an expert's replicas are the expert-data-parallel ranks
        parameter.sequence_parallel = tokenwise and self.tensor_sequence  # its gradient is a sum over tensor ranks
        return parameter

    def enter(self, x: Tensor) -> Tensor:
        if self.tensor_sequence:
            return gather_from_sequence_parallel_region(x)
        return copy_to_tensor_model_parallel_region(x)

    def leave(self, y: Tensor) -> Tensor:
        if self.tensor_sequence:
            return reduce_scatter_to_sequence_parallel_region(y)
        return reduce_from_tensor_model_parallel_region(y)

    def shared(self, weight: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(weight)

    def embed(self, weight: Tensor, tokens: Tensor) -> Tensor:
        if self.size("tensor") == 1:
            return super().embed(weight, tokens)
        local = tokens - self.rank("tensor") * weight.shape[0]
        elsewhere = (local < 0) | (local >= weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), weight)
        return self.leave(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0))

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See Host. fp32 logits split over tensor ranks are overwritten."""
        if self.size("tensor") == 1:
            return super().cross_entropy(logits, labels)
        return vocab_parallel_cross_entropy(logits, labels)

    def dispatcher(self, config: MoEConfig) -> Dispatcher:
        if self.size("expert") == self.size("expert_tensor") == 1:
            return super().dispatcher(config)
        return MegatronDispatcher(config, self)

    def router_losses(self, weights: Tensor, logits: Tensor, index: Tensor, config: MoEConfig, layer: int) -> Tensor:
        """Attach load-balancing loss and z-loss of one micro-batch to `weights`: Switch Transformer, ST-MoE.

        Each tensor rank adds its tokens' part. Gradients are later divided by the global number of tokens, so the mean
        losses are multiplied by the micro-batch's (Megatron's own router multiplies by this *rank's* tokens, which
        makes its losses' weight depend on the tensor-parallel size).
        """
        if not torch.is_grad_enabled():
            return weights
        ranks = self.size("tensor") if self.tensor_sequence else 1
        tokens = logits.shape[0] * ranks
        chosen = index.flatten()
        tokens_per_expert = chosen.new_zeros(config.num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
        if ranks > 1:
            dist.all_reduce(tokens_per_expert, group=ps.get_tensor_model_parallel_group())
        all_scores = scores(logits, config)
        balance = switch_load_balancing_loss_func(
            all_scores / all_scores.sum(-1, keepdim=True),
            tokens_per_expert,
            tokens,
            config.top_k,
            config.num_experts,
            moe_aux_loss_coeff=1.0,
        )
        z = z_loss_func(logits, 1.0 / ranks)
        self._report("load_balancing_loss", balance, 1.0 / ranks)
        self._report("router_z_loss", z, 1.0 / ranks)
        return MoEAuxLossAutoScaler.apply(weights, (config.aux_loss * balance + config.z_loss * z) * tokens)

    def auxiliary_loss(self, carrier: Tensor, name: str, value: Tensor, coefficient: float, tokens: int) -> Tensor:
        """See Host. Every tensor rank adds an equal part, since the region's gradients are summed over them.

        Scaled by the tokens for the same reason as in `router_losses`.
        """
        if not torch.is_grad_enabled():
            return carrier
        self._report(name, value, 1.0)
        return MoEAuxLossAutoScaler.apply(carrier, value * (coefficient * tokens / self.size("tensor")))

    def _report(self, name: str, value: Tensor, count: float) -> None:
        # A layer that is recomputed adds itself twice, with its count.
        added = torch.stack([value, torch.full_like(value, count)]).detach().float()
        self._auxiliary[name] = self._auxiliary[name] + added if name in self._auxiliary else added

    def pop_auxiliary_losses(self) -> dict[str, float]:
        """Mean auxiliary losses by name, without coefficients, over layers, micro-batches and replicas since last time.

        Collective over all ranks, whose layers, and so whose losses, may differ.
        """
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, list(self._auxiliary))
        names = sorted({name for own in everywhere for name in own})
        totals = torch.zeros(len(names), 2, dtype=torch.float32, device=self.device)
        for row, name in zip(totals, names, strict=True):
            if name in self._auxiliary:
                row += self._auxiliary[name]
        self._auxiliary.clear()
        dist.all_reduce(totals)
        return {name: total / count for name, (total, count) in zip(names, totals.tolist(), strict=True)}


class MegatronDispatcher(Dispatcher):
    """Megatron's token dispatcher of one layer: tokens travel to the ranks of their experts and back."""

    def __init__(self, config: MoEConfig, host: MegatronHost):
        super().__init__(config.num_experts)
        assert host.tensor_sequence or host.size("tensor") == 1, "tensor ranks would dispatch the same tokens twice"
        local = host.split(config.num_experts, "expert")
        first = host.rank("expert") * local
        self._dispatcher = DISPATCHERS[config.dispatcher](
            local, list(range(first, first + local)), config=host.config, pg_collection=get_default_pg_collection()
        )

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Assignment]:
        dense = (len(x), self.num_experts + 1)  # with a column for no expert
        routing_map = torch.zeros(dense, dtype=torch.bool, device=x.device).scatter(1, index, True)[:, :-1].contiguous()
        probs = weights.new_zeros(dense).scatter(1, index, weights)[:, :-1].contiguous()
        tokens, weights = self._dispatcher.dispatch_preprocess(x, routing_map, probs)
        tokens, weights = self._dispatcher.token_dispatch(tokens, weights)
        tokens, counts, weights = self._dispatcher.dispatch_postprocess(tokens, weights)
        return tokens, weights, Assignment.of_rows(counts.to(x.device))

    def combine(self, y: Tensor) -> Tensor:
        y = self._dispatcher.combine_preprocess(y)
        y = self._dispatcher.token_combine(y)
        return self._dispatcher.combine_postprocess(y)
