"""Tests that the router of a training step, with all of its options, and the padded exchange never wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("capacity", [None, 1.25])
def test_router_losses_and_statistics_do_not_wait(capacity: float | None) -> None:
    from linear_moe.training import platform

    platform.install()
    from linear_moe.config.schema import Config
    from linear_moe.modeling.host import initialize
    from linear_moe.modeling.moe.router import Router
    from linear_moe.modeling.tokens import TokenLayout
    from linear_moe.options.load import from_dict
    from linear_moe.training import parallel
    from linear_moe.training.host import MegatronHost
    from linear_moe.training.megatron_config import transformer_config

    moe = {"num_experts": 64, "top_k": 8, "num_groups": 8, "top_k_groups": 4, "group_score": "sum_top_2"}
    moe |= {"expert_bias": True, "sequence_aux_loss": 0.01, "global_aux_loss": 0.01, "capacity_factor": capacity}
    config = from_dict(Config, {"model": {"hidden_size": 256, "moe": moe}})
    groups = parallel.initialize_groups(config)
    try:
        host = MegatronHost(transformer_config(config), groups.device)
        router = Router(config.model.moe, 256, 0.02, layer=0, host=host)
        initialize(router, host, seed=0)
        x = torch.randn(4096, 256, device=groups.device, dtype=torch.bfloat16, requires_grad=True)
        chosen = torch.zeros((), device=groups.device)
        for step in range(3):
            if step:  # the first step initialises libraries, which may wait
                torch.cuda.set_sync_debug_mode("error")
            weights, index = router(x, TokenLayout(4, 1024))
            F.silu(weights).sum().backward()
            host.routing.finish_step([router])
            chosen = chosen + (index < 64).sum()
            torch.cuda.set_sync_debug_mode("default")
        (layer,) = host.routing.pop([router])
        assert sum(layer.load) == pytest.approx(64)
        assert layer.bias is not None and any(layer.bias)
        assert float(chosen) == pytest.approx(3 * 8 * 4096 * (1 - layer.dropped))
    finally:
        parallel.destroy()


@pytest.mark.usefixtures("no_waiting")
def test_padded_exchange_does_not_wait() -> None:
    """A token that one rank exchanges with itself comes back times the weights of the experts that took the token."""
    from linear_moe.training import platform

    platform.install()
    from linear_moe.config.schema import Config
    from linear_moe.options.load import from_dict
    from linear_moe.training import parallel
    from linear_moe.training.experts.padded import PaddedAllToAll

    groups = parallel.initialize_groups(from_dict(Config, {}))
    try:
        exchange = PaddedAllToAll(16)
        x = torch.randn(512, 64, device=groups.device, dtype=torch.bfloat16, requires_grad=True)
        index = torch.rand(512, 16, device=groups.device).topk(2).indices
        index[::5, 0] = 16
        weights = torch.ones(512, 2, device=groups.device).masked_fill(index == 16, 0.0).requires_grad_()
        for mode in ("default", "error"):  # the first call initialises libraries, which may wait
            torch.cuda.set_sync_debug_mode(mode)
            rows, row_weights, to = exchange.dispatch(x, weights, index, 512)
            y = exchange.combine((rows * row_weights.unsqueeze(-1)).to(rows.dtype), 2)
            dx, dweights = torch.autograd.grad(y, [x, weights], torch.ones_like(y))
        torch.cuda.set_sync_debug_mode("default")
        assert to.counts.tolist() == [512] * 16
        taken = weights.detach().sum(1, keepdim=True).bfloat16()
        assert torch.equal(y, x * taken) and torch.equal(dx, taken.expand_as(dx))
        assert ((dweights == 0) == (index == 16)).all()
    finally:
        parallel.destroy()
