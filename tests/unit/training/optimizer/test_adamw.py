"""Our AdamW equals PyTorch's: to fp32 rounding, and bit for bit where both run the same kernel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from linear_moe.training.optimizer import adamw
from linear_moe.training.optimizer.adamw import AdamW, round_stochastically
from tests.tolerances import BF16_ROUNDING, FP32, assert_close

SHAPES = [(7, 5), (1,), (33,), (2, 3, 4), (129,)]
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}


def parameters(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def groups(tensors: list[Tensor]) -> list[dict[str, object]]:
    """Two parameter groups, one with and one without weight decay."""
    return [{"params": tensors[:2], "weight_decay": 0.1}, {"params": tensors[2:], "weight_decay": 0.0}]


def run(optimizer: torch.optim.Optimizer, tensors: list[Tensor], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + step)
        optimizer.step()


# ("plain", bf16) is left out, because PyTorch's plain implementation rounds to bf16 after each operation.
@pytest.mark.parametrize(
    ("kernel", "dtype"), [("fused", torch.float32), ("fused", torch.bfloat16), ("plain", torch.float32)]
)
def test_equals_torch(kernel: str, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    start = copy.deepcopy(ours)
    reference = torch.optim.AdamW(groups(theirs), **SETTINGS, fused=kernel == "fused", foreach=False)
    run(AdamW(groups(ours), **SETTINGS), ours, range(20))
    run(reference, theirs, range(20))
    for actual, expected, before in zip(ours, theirs, start, strict=True):
        assert not torch.equal(actual, before)
        if kernel == "fused":
            assert torch.equal(actual, expected)
        else:
            assert_close(actual, expected, FP32)


def test_state_dict_resumes_exactly() -> None:
    whole, half = parameters(torch.float32), parameters(torch.float32)
    run(AdamW(groups(whole), **SETTINGS), whole, range(20))
    first = AdamW(groups(half), **SETTINGS)
    run(first, half, range(10))
    second = AdamW(groups(half), **SETTINGS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [group["step"] for group in second.param_groups] == [10, 10]
    run(second, half, range(10, 20))
    for actual, expected in zip(half, whole, strict=True):
        assert torch.equal(actual, expected)


def test_parameters_without_gradient_stay() -> None:
    tensors = parameters(torch.float32)
    optimizer = AdamW(tensors, **SETTINGS, weight_decay=0.5)
    tensors[0].grad = torch.ones_like(tensors[0])
    before = tensors[1].detach().clone()
    optimizer.step()
    assert torch.equal(tensors[1], before) and tensors[1] not in optimizer.state
    assert optimizer.param_groups[0]["step"] == 1


def test_refuses_what_it_does_not_do() -> None:
    tensors = parameters(torch.float32)
    for flag in ({"adam_w_mode": False}, {"capturable": True}):
        with pytest.raises(ValueError, match="CUDA graph"):
            AdamW(tensors, **flag)
    with pytest.raises(ValueError, match="closure"):
        AdamW(tensors).step(lambda: None)


# -- moments in bf16 --------------------------------------------------------------------------------------------------
def test_rounding_is_right_on_average() -> None:
    """Stochastic rounding goes to one of the two neighbours, is unbiased, and is a function of its key."""
    value = torch.tensor([1.0, 1.001, -3.1415, 1e-20, 0.0]).repeat_interleave(20_000)
    rounded = torch.empty_like(value, dtype=torch.bfloat16)
    round_stochastically(rounded, value.clone(), "a")
    assert ((rounded.float() - value).abs() <= 2 * BF16_ROUNDING * value.abs()).all()
    exact = value == 1.0
    assert torch.equal(rounded[exact].float(), value[exact]) and not rounded[value == 0].any()
    assert_close(rounded.view(5, -1).double().mean(1), value.view(5, -1).double().mean(1), 2e-4)
    again, other = torch.empty_like(rounded), torch.empty_like(rounded)
    round_stochastically(again, value.clone(), "a")
    round_stochastically(other, value.clone(), "b")
    assert torch.equal(again, rounded) and not torch.equal(other, rounded)


def test_bf16_second_moment_decays() -> None:
    """A bf16 second moment decays with beta2 = 0.999, although one step changes it by less than half a bit."""
    tensor = torch.zeros(4096, requires_grad=True)
    optimizer = AdamW([tensor], betas=(0.9, 0.999), moments=torch.bfloat16)
    optimizer.names[tensor] = "w"
    tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    tensor.grad = torch.zeros_like(tensor)
    for _ in range(500):
        optimizer.step()
    second = optimizer.state[tensor]["exp_avg_sq"]
    assert second.dtype is torch.bfloat16
    assert_close(second.double().mean(), torch.tensor(1e-3 * 0.999**500), 1e-2)


def test_bf16_moments_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large parameters are updated in parts; one step from zero moments gives the weights of exact moments."""
    monkeypatch.setattr(adamw, "CHUNK", 50)
    half, exact = parameters(torch.float32), parameters(torch.float32)
    run(AdamW(groups(half), **SETTINGS, moments=torch.bfloat16), half, range(1))
    run(AdamW(groups(exact), **SETTINGS), exact, range(1))
    for a, b in zip(half, exact, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="fp32 or bf16"):
        AdamW(half, moments=torch.float16)
