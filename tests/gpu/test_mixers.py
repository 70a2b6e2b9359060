"""Tests of every mixer on the GPU kernels in bf16, against the CPU in fp32 with the same weights and inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.host import Host
from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.tokens import TokenLayout
from tests.tolerances import BF16, BF16_GRADIENT_FLOOR, BF16_OVER_CPU, assert_close
from tests.unit.modeling.mixers.common import build, case_ids, cases, dims, packed, stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("no_autotuning"),
]
HIDDEN = 128
TOKENS = 200


def pair(name: str, fields: dict[str, Any]) -> tuple[Mixer, Mixer]:
    """Builds a mixer twice, with the same weights: in bf16 on the GPU, and in fp32 on the CPU."""
    at = replace(dims(HIDDEN), norm_eps=0.1)  # conditions the mixer for bf16, see `dims`
    cpu = build(name, fields, Host(dtype=torch.bfloat16), at)
    single = build(name, fields, None, at)
    single.load_state_dict({key: value.float() for key, value in cpu.state_dict().items()})
    return cpu.cuda(), single


def run(mixer: Mixer, x: Tensor, layout: TokenLayout, weight: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns the output, the gradient of the input, and the parameters' gradients by name."""
    x = x.clone().requires_grad_()
    y = mixer(x, layout)
    dx, *gradients = torch.autograd.grad((y * weight.to(y)).sum(), [x, *mixer.parameters()])
    names = [name for name, _ in mixer.named_parameters()]
    return y, dx, {name: g.double().cpu() for name, g in zip(names, gradients, strict=True)}


@pytest.mark.parametrize("layout", [TokenLayout(2, TOKENS // 2), packed([70, 1, 129])], ids=["rows", "packed"])
@pytest.mark.parametrize(("name", "fields"), cases(), ids=case_ids())
def test_forward_and_backward(name: str, fields: dict[str, Any], layout: TokenLayout) -> None:
    gpu, cpu = pair(name, fields)
    x, weight = stream(1, TOKENS, HIDDEN).bfloat16(), stream(1, TOKENS, HIDDEN, seed=1).bfloat16()
    moved = {key: None if (t := getattr(layout, key)) is None else t.cuda() for key in ("cu_seqlens", "positions")}
    y, dx, actual = run(gpu, x.cuda(), replace(layout, **moved), weight)
    expected_y, expected_dx, expected = run(cpu, x.float(), layout, weight)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected_y, BF16, "output")
    floor = BF16_GRADIENT_FLOOR * max(float(gradient.norm()) for gradient in expected.values())
    expected["input"], actual["input"] = expected_dx.double(), dx.double().cpu()

    def errors(gradients: dict[str, Tensor]) -> dict[str, float]:
        return {
            name: float((gradients[name] - gradient).norm()) / max(float(gradient.norm()), floor)
            for name, gradient in expected.items()
        }

    _, half_dx, half = run(gpu.cpu(), x, layout, weight)
    on_gpu, on_cpu = errors(actual), errors(half | {"input": half_dx.double()})
    wrong = {n: (on_gpu[n], on_cpu[n]) for n in on_gpu if not on_gpu[n] <= max(BF16, BF16_OVER_CPU * on_cpu[n])}
    assert not wrong, wrong


@torch.no_grad()
@pytest.mark.parametrize(("name", "fields"), cases(), ids=case_ids())
def test_decoding(name: str, fields: dict[str, Any]) -> None:
    gpu, cpu = pair(name, fields)
    x = stream(2, 80, HIDDEN).bfloat16()
    rows, cache = x.cuda().view(2, 80, HIDDEN), gpu.init_cache(2, 90, torch.bfloat16, torch.device("cuda"))
    outputs, start = [], 0
    for n in [70] + [1] * 10:
        positions = torch.arange(start, start + n, device="cuda").expand(2, n)
        piece = rows[:, start : start + n].flatten(0, 1)
        outputs.append(gpu(piece, TokenLayout(2, n, positions=positions), cache).view(2, n, HIDDEN))
        start += n
    assert_close(torch.cat(outputs, 1).flatten(0, 1), cpu(x.float(), TokenLayout(2, 80)), BF16)


@pytest.mark.parametrize(("name", "fields"), cases(), ids=case_ids())
def test_no_host_synchronisation(name: str, fields: dict[str, Any]) -> None:
    """Once the kernels are compiled, neither pass waits for the device, so the host can run ahead."""
    gpu, _ = pair(name, fields)
    x = stream(1, TOKENS, HIDDEN).bfloat16().cuda().requires_grad_()
    weight = torch.ones_like(x)

    def both_passes() -> None:
        torch.autograd.grad(gpu(x, TokenLayout(2, TOKENS // 2)), [x, *gpu.parameters()], weight)

    both_passes()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
