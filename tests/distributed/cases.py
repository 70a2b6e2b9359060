"""Functions that the ranks of the distributed tests run. To be imported after `platform.install()`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from linear_moe.checks.validate import validate
from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.host import ParameterSpec
from linear_moe.modeling.moe.router import route
from linear_moe.modeling.ops.experts import reference
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.options.load import from_dict
from linear_moe.training import parallel
from linear_moe.training.build import build_model
from linear_moe.training.experts.routing import routers_of
from linear_moe.training.host import MegatronHost
from linear_moe.training.megatron_config import transformer_config
from linear_moe.training.optimizer.build import build_optimizer
from linear_moe.training.parallel import Groups

ROWS = 4
LENGTH = 32


def start(config: dict[str, Any]) -> tuple[Config, Groups]:
    """Validates the configuration for the number of ranks, and makes its process groups."""
    tree = from_dict(Config, config)
    validate(tree, int(os.environ.get("WORLD_SIZE", "1")), files=False)
    return tree, parallel.initialize_groups(tree)


def shard(model: Any, parameter: Any) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
    """Full shape of the parameter, offset of this rank's share in it, and gradient of the share, on the CPU."""
    spec: ParameterSpec = parameter.spec
    offset = [0] * len(spec.shape)
    for dim, axis in spec.axes.items():
        offset[dim] = model.host.rank(axis) * parameter.shape[dim]
    return spec.shape, tuple(offset), parameter.main_grad.clone().cpu()


def gradients(model: Any) -> dict[str, Any]:
    """`shard` of every parameter that has a gradient, by name."""
    return {name: shard(model, p) for name, p in model.named_parameters() if p.requires_grad}


def sequences(config: Config, groups: Groups, step: int) -> Iterator[Tensor]:
    """Yields this replica's micro-batches `[B, T + 1]` of a step: every data_size-th, from number data_rank on."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, vocab_size(config), (ROWS, LENGTH + 1), generator=generator)
    yield from rows.split(config.training.micro_batch)[groups.data_rank :: groups.data_size]


def train(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Trains for `steps` steps, then validates once.

    Returns:
        the summed token losses of every step and of the validation on this replica (last stage only), the gradients of
        the first step before clipping, the gradient norms, the router losses and the routing.
    """
    tree, groups = start(config)
    model = build_model(tree, vocab_size(tree), groups)
    optimizer = build_optimizer(model, tree)
    inner = model[0].module
    result: dict[str, Any] = {"losses": [], "norms": [], "router": [], "routing": []}
    result |= {"last_stage": groups.last_stage, "data_rank": groups.data_rank}

    def forward(batches: Iterator[Tensor], chunk: Any) -> tuple[Tensor, Any]:
        rows = next(batches)
        layout = TokenLayout(rows.shape[0], rows.shape[1] - 1)
        losses = chunk(rows[:, :-1], layout, labels=rows[:, 1:])

        def reduce(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total = losses.sum()
            return total, torch.tensor(losses.numel(), dtype=torch.int), total.detach().clone()

        return losses, reduce

    def run(step: int, **options: bool) -> None:
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=sequences(tree, groups, step),
            model=model,
            num_microbatches=ROWS // tree.training.micro_batch // groups.data_size,
            seq_length=LENGTH,
            micro_batch_size=tree.training.micro_batch,
            **options,
        )
        result["losses"].append(sum(losses) if losses else None)

    for step in range(steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run(step, forward_only=False, force_all_reduce=step == 0)
        if step == 0:
            result["gradients"] = gradients(inner)
        _, norm, _ = optimizer.step()
        inner.host.routing.finish_step(routers_of(model))
        result["norms"].append(float(norm))
        result["router"].append(inner.host.pop_auxiliary_losses())
        result["routing"].append(inner.host.routing.pop(routers_of(model)))
    inner.eval()
    with torch.no_grad():
        run(steps, forward_only=True)
    return result


def host_of(config: dict[str, Any]) -> MegatronHost:
    tree, groups = start(config)
    return MegatronHost(transformer_config(tree), groups.device)


def strided_gradients(config: dict[str, Any], weight: Tensor, factors: list[Tensor]) -> dict[str, Tensor]:
    """Sums over tensor ranks of tensors that are not contiguous.

    They are the transposed output of a region, the gradient of a weight that arrives transposed, and the gradient of an
    input that arrives expanded.
    """
    host = host_of(config)
    factor = factors[host.rank("tensor")]
    weight = weight.requires_grad_()
    (host.shared(weight).T * factor).sum().backward()
    x = torch.zeros(weight.shape, requires_grad=True)
    (host.enter(x).sum() * factor.sum()).backward()
    left, kept = factor.clone(), factor.clone()
    host.leave(left)
    assert torch.equal(left, kept), "a region's output is summed in place, and autograd may have kept it"
    return {"transposed": weight.grad, "expanded": x.grad, "left": host.leave(factor.T)}


def dispatch(config: dict[str, Any], x: list[Tensor], routing_map: list[Tensor]) -> dict[str, Tensor]:
    """Dispatches tokens to experts that multiply them by their number + 1, and combines the results.

    Returns:
        outputs, tokens of each local expert, and gradients of the tokens and of the routing probabilities.
    """
    tree, groups = start(config)
    host = MegatronHost(transformer_config(tree), groups.device)
    tokens = x[groups.rank].requires_grad_()
    chosen = routing_map[groups.rank]
    index = chosen.int().topk(tree.model.moe.top_k).indices
    probs = (chosen / chosen.sum(-1, keepdim=True)).requires_grad_()
    dispatcher = host.dispatcher(tree.model.moe)
    sent, weights, to = dispatcher.dispatch(tokens, probs.gather(1, index), index)
    counts = to.counts
    first = host.rank("expert") * len(counts)
    expert = torch.repeat_interleave(torch.arange(first, first + len(counts)), counts)
    factor = reference.row_weights(weights, to)[: len(expert)] * (expert + 1)
    rows = reference.collect(sent, to)
    made = torch.cat([rows[: len(expert)] * factor.unsqueeze(-1), torch.full_like(rows[len(expert) :], torch.nan)])
    y = dispatcher.combine(reference.combine(made, to))
    y.square().sum().backward()
    return {"y": y.detach(), "counts": counts, "dx": tokens.grad, "dprobs": probs.grad * chosen}


def router_losses(config: dict[str, Any], logits: Tensor, layout: TokenLayout | None = None) -> dict[str, Any]:
    """Gradient of this tensor rank's part of `logits` from the router's losses alone, and the logged losses."""
    tree, groups = start(config)
    host = MegatronHost(transformer_config(tree), groups.device)
    part = logits.chunk(groups.tensor_size)[groups.tensor_rank].clone().requires_grad_()
    weights, index = route(part, tree.model.moe)
    layout = layout or TokenLayout(1, len(logits))
    (host.router_losses(weights, part, index, tree.model.moe, 0, layout) * 0).sum().backward()
    return {"gradient": part.grad, "logged": host.pop_auxiliary_losses()}


def auxiliary_loss(config: dict[str, Any], x: Tensor, weight: Tensor) -> dict[str, Any]:
    """Gradients of this rank's tokens and of a shared weight from a loss inside a region, and the logged losses."""
    tree, groups = start(config)
    host = MegatronHost(transformer_config(tree), groups.device)
    part = x.chunk(groups.tensor_size)[groups.tensor_rank].clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    tokens = host.enter(part)
    value = (tokens @ host.shared(weight)).square().mean()
    (host.leave(host.auxiliary_loss(tokens, "some_loss", value, 0.1, len(tokens))) * 0).sum().backward()
    if groups.tensor_rank == 0:  # stands for a layer that only one pipeline stage has
        host.auxiliary_loss(tokens, "other_loss", value + 1, 0.1, len(tokens))
    with torch.no_grad():
        host.auxiliary_loss(tokens, "no_loss", value, 0.1, len(tokens))
    return {"dx": part.grad, "dweight": weight.grad, "logged": [host.pop_auxiliary_losses() for _ in range(2)]}
