"""Choice of experts and their capacity, against loops over tokens; without losses and statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.moe.capacity import capacity, within_capacity
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.moe.losses import balance_loss, sequence_of_tokens
from linear_moe.modeling.moe.router import Router, route, scores
from linear_moe.modeling.tokens import TokenLayout
from tests.tolerances import BF16_SAME, FP32, assert_close

LOGITS = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))


def dense(weights: Tensor, index: Tensor, experts: int = 12) -> tuple[Tensor, Tensor]:
    """Spreads weights and indices `[n, k]` over all experts: weights and choice `[n, E]`."""
    shape = (len(weights), experts + 1)  # the last column stands for no expert
    chosen = torch.zeros(shape, dtype=torch.bool).scatter(1, index, True)
    return weights.new_zeros(shape).scatter(1, index, weights)[:, :-1], chosen[:, :-1]


@pytest.mark.parametrize("group_score", ["max", "sum_top_2"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_group_limited_choice(group_score: str, score: str) -> None:
    config = MoEConfig(12, top_k=3, num_groups=4, top_k_groups=2, group_score=group_score, score=score)
    bias = torch.linspace(-0.1, 0.1, 12).roll(7)
    _, chosen = dense(*route(LOGITS, config, bias))
    for token, logits in enumerate(LOGITS):
        choice = (logits.softmax(0) if score == "softmax" else logits.sigmoid()) + bias
        groups = [choice[3 * g : 3 * g + 3].sort(descending=True).values for g in range(4)]
        best = sorted(range(4), key=lambda g: -(groups[g][0] if group_score == "max" else groups[g][:2].sum()))[:2]
        allowed = [e for e in range(12) if e // 3 in best]
        expected = sorted(sorted(allowed, key=lambda e: -choice[e])[:3])
        assert chosen[token].nonzero().flatten().tolist() == expected


def test_bias_does_not_weigh() -> None:
    """The bias changes the choice of experts, but their weights are the scores without the bias."""
    config = MoEConfig(12, top_k=2, normalize_top_k=False, score="sigmoid")
    bias = torch.zeros(12)
    bias[5] = 10.0
    probs, chosen = dense(*route(LOGITS, config, bias))
    assert chosen[:, 5].all() and (chosen.sum(1) == 2).all()
    assert torch.equal(probs, LOGITS.sigmoid() * chosen)


def test_softmax_over_the_chosen_is_the_normalised_softmax() -> None:
    first, after = (dense(*route(LOGITS, MoEConfig(12, top_k=3, top_k_first=value))) for value in (True, False))
    assert torch.equal(first[1], after[1])
    assert_close(first[0], after[0], FP32)
    assert_close(first[0].sum(1), torch.ones(64), FP32)


def limited(config: MoEConfig, probs: Tensor, chosen: Tensor) -> Tensor:
    """Capacity written as a loop over experts, with a list of each one's tokens in the order of preference."""
    limit = min(64, math.ceil(64 * config.top_k / 12 * config.capacity_factor))
    taken = torch.zeros_like(chosen)
    for e in range(12):
        tokens = [t for t in range(64) if chosen[t, e]]
        if config.drop_policy == "probs":
            tokens.sort(key=lambda t: -probs[t, e].item())
        taken[tokens[:limit], e] = True
    return taken


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 100.0])
def test_capacity(factor: float, policy: str) -> None:
    config = MoEConfig(12, top_k=2, capacity_factor=factor, drop_policy=policy)
    probs, chosen = dense(*route(LOGITS, config))
    taken = within_capacity(torch.where(chosen, probs, -1.0), capacity(64, config), policy)
    assert torch.equal(taken, limited(config, probs, chosen))
    if factor == 100:
        assert torch.equal(taken, chosen)


def router(**fields: Any) -> Router:
    host = Host(torch.float32)
    module = Router(MoEConfig(12, top_k=2, **fields), 16, 0.5, layer=0, host=host)
    initialize(module, host, seed=0)
    return module


def test_capacity_is_for_training() -> None:
    """Validation and inference drop nothing, so that decoding token by token equals one pass."""
    module, x = router(capacity_factor=0.5), torch.randn(64, 16)
    probs, taken = dense(*module(x))
    assert (taken.sum(1) < 2).any() and torch.equal(probs > 0, taken)
    whole = dense(*module.eval()(x))
    assert (whole[1].sum(1) == 2).all()
    assert torch.equal(torch.cat([dense(*module(token))[0] for token in x.split(1)]) > 0, whole[1])


class Observer(Host):
    """Host that keeps the arguments of `observe_routing`."""

    def observe_routing(self, index: Tensor, kept: Tensor | None, config: MoEConfig, layer: int) -> None:
        self.seen = index, kept, layer


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_what_is_told_of_the_routing(policy: str) -> None:
    """The host observes all choices, and which of them were kept; dropped choices get no expert and weight 0."""
    config = MoEConfig(12, top_k=2, capacity_factor=0.75, drop_policy=policy)
    host = Observer(torch.float32)
    module = Router(config, 16, 0.5, layer=3, host=host)
    initialize(module, host, seed=0)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(4))
    weights, index = module(x)
    full_weights, choices = route(x @ module.weight.T, config)
    told, kept, layer = host.seen
    assert torch.equal(told, choices) and layer == 3
    assert torch.equal(kept, limited(config, *dense(full_weights, choices)).gather(1, choices))
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(index, choices.where(kept, 12))
    assert torch.equal(weights, full_weights.where(kept, 0.0))
    module.eval()(x)
    assert host.seen[1] is None


def test_bf16_is_multiplied_in_fp32() -> None:
    """Neither the product nor the softmax is rounded to the activations' 8 bits."""
    host = Host(torch.bfloat16)
    module = Router(MoEConfig(12, top_k=12), 256, 0.5, layer=0, host=host)
    initialize(module, host, seed=0)
    x = torch.randn(64, 256, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(4))
    kept: list[Tensor] = []
    inputs = x.clone().requires_grad_(), x.double().requires_grad_()
    exact = module.weight.detach().double().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        weights, index = module(inputs[0])
    assert not any(t.shape == x.shape and t.dtype == torch.float32 for t in kept), "x is kept as it came"
    expected = (inputs[1] @ exact.T).softmax(-1)
    assert_close(weights, expected.gather(1, index).float(), FP32)
    grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(5))
    actual = torch.autograd.grad(weights, [inputs[0], module.weight], grad)
    exactly = torch.autograd.grad(expected.gather(1, index), [inputs[1], exact], grad.double())
    for a, b in zip(actual, exactly, strict=True):
        assert a.dtype == torch.bfloat16
        assert_close(a, b.bfloat16(), BF16_SAME)  # rounded once


def test_arithmetic_is_the_same_within_autocast() -> None:
    """Results within torch.autocast are equal, with the forward pass inside and the backward pass outside of it.

    Trainers of an exported model use autocast in this way.
    """
    module = Router(MoEConfig(12, top_k=4), 64, 0.5, layer=0, host=(host := Host(torch.float32)))
    initialize(module, host, seed=0)
    results = []
    for enabled in (False, True):
        x = torch.randn(50, 64, generator=torch.Generator().manual_seed(4)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            weights, index = module(x)
        factor = torch.rand(weights.shape, generator=torch.Generator().manual_seed(5))
        results.append([weights, index, *torch.autograd.grad((weights * factor).sum(), [x, module.weight])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_scores_are_fp32_and_the_bias_is_no_trained_weight() -> None:
    host = Host(torch.bfloat16)
    module = Router(MoEConfig(12, top_k=2, expert_bias=True), 16, 0.5, layer=0, host=host)
    initialize(module, host, seed=0)
    probs, _ = module(torch.randn(4, 16, dtype=torch.bfloat16))
    assert probs.dtype == torch.float32 == module.expert_bias.dtype == module.state_dict()["expert_bias"].dtype
    probs.sum().backward()
    assert module.expert_bias.grad is None and not module.expert_bias.requires_grad


def test_balance_loss() -> None:
    """The loss is 1 for an even load, E if all tokens go to one expert, and losses of parts of the tokens add up."""
    even = torch.full((1, 4), 6)
    assert balance_loss(even, torch.full((1, 4), 3.0), 12) == 1
    one = torch.tensor([[24, 0, 0, 0]])
    assert balance_loss(one, torch.tensor([[12.0, 0, 0, 0]]), 12) == 4
    config = MoEConfig(12, top_k=2)
    counts = dense(*route(LOGITS, config))[1].sum(0, keepdim=True)
    shares = scores(LOGITS, config)
    parts = [balance_loss(counts, part.sum(0, keepdim=True), 64) for part in shares.split(16)]
    assert_close(sum(parts), balance_loss(counts, shares.sum(0, keepdim=True), 64), FP32)


def test_sequences_of_tokens() -> None:
    rows = sequence_of_tokens(TokenLayout(3, 4), 6, 6, torch.device("cpu"))
    assert (rows[0].tolist(), rows[1]) == ([1, 1, 2, 2, 2, 2], 3)
    packed = TokenLayout(1, 9, torch.tensor([0, 2, 2, 5, 9]), max_document=4)
    documents = sequence_of_tokens(packed, 1, 6, torch.device("cpu"))
    assert (documents[0].tolist(), documents[1]) == ([0, 2, 2, 2, 3, 3], 4)
