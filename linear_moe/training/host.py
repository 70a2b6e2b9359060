"""The Megatron-Core host: collectives that spread the model over tensor, sequence and expert ranks."""

from __future__ import annotations

from functools import partial
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
)
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn

from linear_moe.modeling.activations import Activations
from linear_moe.modeling.host import Host
from linear_moe.modeling.moe.capacity import capacity
from linear_moe.modeling.moe.config import MoEConfig, expert_dispatcher
from linear_moe.modeling.moe.dispatch import Dispatcher
from linear_moe.modeling.moe.losses import balance_loss, sequence_of_tokens, z_loss
from linear_moe.modeling.moe.router import scores
from linear_moe.modeling.ops.experts.assignment import Assignment
from linear_moe.modeling.ops.fused.linear_cross_entropy import linear_cross_entropy
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.training.experts.gathered import AllGatherDispatcher
from linear_moe.training.experts.padded import PaddedAllToAll
from linear_moe.training.experts.routing import RoutingStatistics


class MegatronHost(Host):
    """Host of a model on Megatron-Core's process groups, which `parallel.initialize_groups` must have made.

    Args:
        config: Megatron's configuration, from `megatron_config.transformer_config`.
        device: device of the parameters.
        activations: settings of activation recomputation; None: all activations are kept for the backward pass.
    """

    def __init__(self, config: TransformerConfig, device: torch.device, activations: Activations | None = None):
        super().__init__(config.params_dtype, device, activations)
        self.config = config
        self.tensor_sequence: bool = config.sequence_parallel
        self._sizes = {
            "tensor": ps.get_tensor_model_parallel_world_size(),
            "expert": ps.get_expert_model_parallel_world_size(),
            "expert_tensor": ps.get_expert_tensor_parallel_world_size(),
            "sequence": ps.get_context_parallel_world_size(),
        }
        self._ranks = {
            "tensor": ps.get_tensor_model_parallel_rank(),
            "expert": ps.get_expert_model_parallel_rank(),
            "expert_tensor": ps.get_expert_tensor_parallel_rank(),
            "sequence": ps.get_context_parallel_rank(),
        }
        self.counted: Tensor | float = 1.0  # share of the optimizer step's tokens whose own loss counts
        self.routing = RoutingStatistics(device, config.num_layers)
        self._auxiliary: dict[str, Tensor] = {}  # by name: sum of the reported losses, and number of its terms

    def size(self, axis: str) -> int:
        return self._sizes[axis]

    def rank(self, axis: str) -> int:
        return self._ranks[axis]

    def parameter(self, *shape: int, tokenwise: bool = False, **options: Any) -> nn.Parameter:
        """See `Host.parameter`. Sets also the attributes by which Megatron reduces the gradient and takes its norm."""
        parameter: Any = super().parameter(*shape, tokenwise=tokenwise, **options)
        split = {axis: dim for dim, axis in parameter.spec.axes.items()}
        expert = "expert" in split
        assert not expert or "expert_tensor" in split, "clipping would count an expert's unsplit parameter many times"
        dim = split.get("expert_tensor" if expert else "tensor", -1)
        set_tensor_model_parallel_attributes(parameter, is_parallel=dim >= 0, dim=dim, stride=1)
        parameter.allreduce = not expert  # False: the gradient is reduced over the expert-data-parallel ranks
        # True: the gradient is summed over the tensor ranks, since each of them has used it on its own tokens only.
        parameter.sequence_parallel = tokenwise and self.tensor_sequence
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
        """See `Host.cross_entropy`. fp32 logits that are split over tensor ranks are overwritten."""
        if self.size("tensor") == 1:
            return super().cross_entropy(logits, labels)
        return vocab_parallel_cross_entropy(logits, labels)

    def linear_cross_entropy(self, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if self.size("tensor") == 1:
            return super().linear_cross_entropy(x, weight, labels)
        first = self.rank("tensor") * weight.shape[0]
        return linear_cross_entropy(x, weight, labels, first=first, merge=self._merge_vocabulary)

    def _merge_vocabulary(self, normaliser: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Log-normalisers `[N]` and labels' logits `[N]` over the whole vocabulary, from each tensor rank's share."""
        own = torch.stack([normaliser, target])
        everywhere = own.new_empty(self.size("tensor") * 2, own.shape[1])
        dist.all_gather_into_tensor(everywhere, own, group=ps.get_tensor_model_parallel_group())
        return everywhere[0::2].logsumexp(0), everywhere[1::2].sum(0)

    def dispatcher(self, config: MoEConfig) -> Dispatcher:
        if self.size("expert") == self.size("expert_tensor") == 1:
            return super().dispatcher(config)
        assert self.tensor_sequence or self.size("tensor") == 1, "tensor ranks would dispatch the same tokens twice"
        local = self.split(config.num_experts, "expert")
        first = self.rank("expert") * local
        if expert_dispatcher(config, self.size("expert")) == "allgather":
            return AllGatherDispatcher(config.num_experts, first, local)
        return MegatronDispatcher(config, self, first, local)

    def all_tokens(self, x: Tensor) -> Tensor:
        if not self.tensor_sequence:
            return x
        everywhere = x.new_empty(x.shape[0] * self.size("tensor"), *x.shape[1:])
        dist.all_gather_into_tensor(everywhere, x.detach().contiguous(), group=ps.get_tensor_model_parallel_group())
        return everywhere

    def own_tokens(self, x: Tensor) -> Tensor:
        return x.chunk(self.size("tensor"))[self.rank("tensor")] if self.tensor_sequence else x

    def observe_routing(self, index: Tensor, kept: Tensor | None, config: MoEConfig, layer: int) -> None:
        if torch.is_grad_enabled() and not self.activations.again:
            dropped = None if kept is None else (~kept & (index < config.num_experts)).sum()
            self.routing.add(_counts(index, config.num_experts), dropped, layer)

    def router_losses(
        self, weights: Tensor, logits: Tensor, index: Tensor, config: MoEConfig, layer: int, layout: TokenLayout
    ) -> Tensor:
        """Attaches the router's losses of one micro-batch to `weights`, and returns `weights`.

        The losses are the load-balancing loss, in up to three scopes (micro-batch, sequence, global batch), and the
        z-loss. They are means over all tokens but padding, because a token loads experts whether its own loss counts or
        not; each tensor or sequence rank adds the part of its tokens. Megatron later divides all gradients by the
        number of tokens whose loss counts. So the means are multiplied by the tokens of the micro-batch, and by the
        share of the step's tokens whose loss counts. (Megatron's own router multiplies by the tokens of this *rank*, so
        that the weight of its losses depends on the tensor-parallel size and on the loss mask.)
        """
        if not torch.is_grad_enabled():
            return weights
        # Each of `ranks` ranks routes its own part of the micro-batch's tokens.
        parts = self.size("tensor") if self.tensor_sequence else 1
        ranks = parts * self.size("sequence")
        counted = None if layout.padding is None else index[:, 0] < config.num_experts
        shares = scores(logits, config)
        shares = shares / shares.sum(-1, keepdim=True)
        if counted is not None:
            shares = shares * counted.unsqueeze(1)
        counts = _counts(index, config.num_experts)
        whole = self.activations.once(partial(self._sum_over_tokens, counts))
        tokens = whole.sum() / config.top_k
        score_sums = shares.sum(0, keepdim=True)
        terms = {
            "load_balancing_loss": (config.aux_loss, balance_loss(whole.unsqueeze(0), score_sums, tokens)),
            "router_z_loss": (config.z_loss, z_loss(logits, counted) / tokens),
        }
        if config.sequence_aux_loss:
            place = self.rank("tensor") * logits.shape[0] if parts > 1 else 0
            sequence, number = sequence_of_tokens(layout, place, logits.shape[0], logits.device)
            chosen = sequence.unsqueeze(1) * (config.num_experts + 1) + index  # the last column counts "no expert"
            table = _counts(chosen, number * (config.num_experts + 1)).unflatten(0, (number, -1))
            by_sequence = self.activations.once(partial(self._sum_over_tokens, table[:, :-1]))
            sums = shares.new_zeros(by_sequence.shape).index_add(0, sequence, shares)
            value = balance_loss(by_sequence, sums, tokens)
            terms["sequence_balancing_loss"] = (config.sequence_aux_loss, value)
        if config.global_aux_loss:
            load = self.activations.once(partial(self.routing.add_global, counts, layer))
            value = balance_loss(load.unsqueeze(0), score_sums, tokens)
            terms["global_balancing_loss"] = (config.global_aux_loss, value)
        for name, (_, value) in terms.items():
            self._report(name, value, 1.0 / ranks)
        weighted = [coefficient * value for coefficient, value in terms.values() if coefficient]
        return MoEAuxLossAutoScaler.apply(weights, sum(weighted) * tokens * self.counted) if weighted else weights

    def _sum_over_tokens(self, counts: Tensor) -> Tensor:
        """Sums counts of each rank's tokens over all ranks that share out the micro-batch's tokens. Collective."""
        if not self.tensor_sequence:
            return self.sum_over_sequence(counts)
        dist.all_reduce(counts := counts.clone(), group=ps.get_tensor_and_context_parallel_group())
        return counts

    def sum_over_sequence(self, x: Tensor) -> Tensor:
        if self.size("sequence") > 1:
            dist.all_reduce(x := x.clone(), group=ps.get_context_parallel_group())
        return x

    def auxiliary_loss(
        self, carrier: Tensor, name: str, value: Tensor, coefficient: float, tokens: Tensor | int
    ) -> Tensor:
        """See `Host.auxiliary_loss`. The loss is scaled by tokens for the reason given in `router_losses`.

        Every tensor rank adds an equal part of it, because gradients of a tensor-parallel region are summed over the
        tensor ranks.
        """
        if not torch.is_grad_enabled():
            return carrier
        self._report(name, value, 1.0 / self.size("sequence"))
        return MoEAuxLossAutoScaler.apply(carrier, value * (coefficient * tokens / self.size("tensor")) * self.counted)

    def _report(self, name: str, value: Tensor, count: float) -> None:
        """Adds a loss to those that `pop_auxiliary_losses` averages, with `count` in the number of terms."""
        if self.activations.again:
            return
        added = torch.stack([value, torch.full_like(value, count)]).detach().float()
        self._auxiliary[name] = self._auxiliary[name] + added if name in self._auxiliary else added

    def pop_auxiliary_losses(self) -> dict[str, float]:
        """Mean auxiliary losses since the last call, by name, over layers, micro-batches and replicas. Collective.

        The losses are without their coefficients. Ranks may have different layers, and so different losses.
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


def _counts(index: Tensor, number: int) -> Tensor:
    """Counts how often each of 0 .. number - 1 is in `index`: `[number]` int64. The value `number` means no expert.

    Unlike `torch.bincount`, it does not make the host wait for the device.
    """
    index = index.flatten()
    return index.new_zeros(number + 1).scatter_add_(0, index, torch.ones_like(index))[:-1]


class MegatronDispatcher(Dispatcher):
    """Sends the tokens of one layer to their experts and back: by Megatron's all-to-all, or in padded blocks.

    Args:
        first, local: number of this rank's first expert, and number of its experts.
    """

    def __init__(self, config: MoEConfig, host: MegatronHost, first: int, local: int):
        super().__init__(config.num_experts)
        self.config, self._ranks = config, host.size("tensor") * host.size("sequence")
        self._padded: PaddedAllToAll | None = PaddedAllToAll(config.num_experts) if config.capacity_pad else None
        self._dispatcher = MoEAlltoAllTokenDispatcher(
            local, list(range(first, first + local)), config=host.config, pg_collection=get_default_pg_collection()
        )

    def dispatch(
        self, x: Tensor, weights: Tensor, index: Tensor, limited: bool = False
    ) -> tuple[Tensor, Tensor, Assignment]:
        self._limited = limited
        if self._padded is not None and limited:
            limit = min(len(x), capacity(len(x) * self._ranks, self.config))
            return self._padded.dispatch(x, weights, index, limit)
        dense = (len(x), self.num_experts + 1)  # the last column takes the choices of no expert, and is cut off
        routing_map = torch.zeros(dense, dtype=torch.bool, device=x.device).scatter(1, index, True)[:, :-1].contiguous()
        probs = weights.new_zeros(dense).scatter(1, index, weights)[:, :-1].contiguous()
        tokens, weights = self._dispatcher.dispatch_preprocess(x, routing_map, probs)
        tokens, weights = self._dispatcher.token_dispatch(tokens, weights)
        tokens, counts, weights = self._dispatcher.dispatch_postprocess(tokens, weights)
        return tokens, weights, Assignment.of_rows(counts.to(x.device))

    def combine(self, y: Tensor) -> Tensor:
        if self._padded is not None and self._limited:
            return self._padded.combine(y, self.config.top_k)
        y = self._dispatcher.combine_preprocess(y)
        y = self._dispatcher.combine_postprocess(self._dispatcher.token_combine(y))
        self._dispatcher.probs = None  # its graph leads back to this object, a cycle the garbage collector cannot see
        return y
