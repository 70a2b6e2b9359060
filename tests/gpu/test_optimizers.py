"""Tests that optimizer steps on a GPU equal those on a CPU, and never wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from linear_moe.config.schema import MuonConfig
from linear_moe.modeling.host import Matrices, ParameterSpec, constant
from linear_moe.training.optimizer.adamw import AdamW, round_stochastically
from linear_moe.training.optimizer.muon import Muon, Share, newton_schulz
from tests.tolerances import BF16, FP32, assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SHAPES = [(256, 128), (4, 2, 64, 96), (33,)]


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def trained(device: str, kind: str, moments: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]
    options = {"lr": 0.01, "weight_decay": 0.1, "moments": moments}
    if kind == "muon":
        optimizer: AdamW = Muon(weights, muon=MuonConfig(), dtype=dtype, **options)
        assert isinstance(optimizer, Muon)
        specs = {w: ParameterSpec(tuple(w.shape), constant(0.0), matrices=Matrices()) for w in weights[:2]}
        shares = {w: Share(str(i), s, s.shape, 0, w.numel()) for i, (w, s) in enumerate(specs.items())}
        optimizer.orthogonalize(shares, None)
    else:
        optimizer = AdamW(weights, **options)
    optimizer.initialize()
    for step in range(4):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(device)
        if device == "cuda" and step:
            with never_waiting():
                optimizer.step()
        else:
            optimizer.step()
    return [w.cpu() for w in weights]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_equals_cpu(kind: str) -> None:
    exact = trained("cpu", kind, torch.float32, torch.float32)
    for actual, expected in zip(trained("cuda", kind, torch.float32, torch.float32), exact, strict=True):
        assert_close(actual, expected, FP32)
    for moments, dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        for actual, expected in zip(trained("cuda", kind, moments, dtype), exact, strict=True):
            assert_close(actual, expected, BF16)


def test_multi_tensor_functions() -> None:
    from linear_moe.training import platform

    platform.install()
    from linear_moe.training.optimizer.build import _foreach_copy, _foreach_norm, _foreach_scale

    tensors = [torch.randn(shape, device="cuda") for shape in SHAPES]
    whole = torch.cat([t.flatten() for t in tensors]).double().norm()
    flag = torch.zeros(1, dtype=torch.int, device="cuda")
    rounded = [torch.zeros_like(t, dtype=torch.bfloat16) for t in tensors]
    with never_waiting():
        norm, _ = _foreach_norm(2048, flag, [tensors], False)
        _foreach_copy(tensors, rounded)
        _foreach_scale(2048, flag, [tensors, tensors], 0.5)
    assert_close(norm[0], whole, FP32)
    for half, low in zip(tensors, rounded, strict=True):
        assert torch.equal(low, (half * 2).to(torch.bfloat16))


def test_rounding_and_iterations() -> None:
    value = torch.full((100_000,), 1.001, device="cuda")
    first, second = (torch.empty_like(value, dtype=torch.bfloat16) for _ in range(2))
    round_stochastically(first, value.clone(), "a")
    round_stochastically(second, value.clone(), "a")
    assert torch.equal(first, second) and len(first.unique()) == 2
    assert_close(first.double().mean(), value[0], 2e-4)
    x = torch.randn(8, 512, 256, device="cuda", dtype=torch.bfloat16)
    values = torch.linalg.svdvals(newton_schulz(x).float())
    assert values.max() < 1.4 and values.median() > 0.6
