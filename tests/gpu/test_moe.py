"""The experts' Triton kernels against their PyTorch definitions, and the whole operation on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linear_moe.config.schema import ModelConfig, MoEConfig
from linear_moe.modeling.ffn import MoE
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.ops import experts as definition
from linear_moe.modeling.ops.experts import STEPS, Assignment, assign, experts
from tests.gpu.kernels import DEVICE, HALF, INTERPRETED, MARKS
from tests.tolerances import BF16, FP32, assert_close

triton = pytest.importorskip("triton")
from linear_moe.modeling.ops import experts_gemm_gpu, experts_gpu  # noqa: E402  they import triton

pytestmark = MARKS
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs CUDA")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def choose(tokens: int, num_experts: int, top_k: int, drop: bool = False) -> Tensor:
    """Skewed, so that some of many experts get no token; with `drop` every third slot has no expert."""
    noise = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(1))
    index = (noise / torch.arange(1, num_experts + 1).float() ** 1.5).topk(top_k).indices
    if drop:
        index.view(-1)[::3] = num_experts
    return index.to(DEVICE)


# tokens, experts, top_k, some slots without an expert
ROUTINGS = [(70, 6, 2, False), (11, 64, 8, False), (1, 8, 3, True), (9, 5, 5, False), (37, 300, 3, True)]


@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "drop"), [*ROUTINGS, (0, 4, 2, False)])
def test_assign(tokens: int, num_experts: int, top_k: int, drop: bool) -> None:
    index = choose(tokens, num_experts, top_k, drop)
    expected = assign(index.cpu(), num_experts)
    assert experts_gpu.can_assign(num_experts)
    found = Assignment(*experts_gpu.assign(index, num_experts))
    for name in ("counts", "ends", "slot", "row"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
        assert getattr(found, name).dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 130, 2500])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "drop"), ROUTINGS)
def test_collect_and_combine(
    tokens: int, num_experts: int, top_k: int, drop: bool, width: int, dtype: torch.dtype
) -> None:
    to = assign(choose(tokens, num_experts, top_k, drop), num_experts)
    x = draw(tokens, 2 * width, dtype=dtype)[:, :width]
    rows = experts_gpu.collect(x, to)
    assert torch.equal(rows, definition.collect(x, to))
    rows[int(to.ends[-1]) :] = float("nan")  # what a grouped GEMM leaves there
    assert_close(experts_gpu.combine(rows, to), definition.combine(rows, to), FP32 if dtype == torch.float32 else HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 130])
@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "drop"), ROUTINGS)
def test_activation(
    tokens: int, num_experts: int, top_k: int, drop: bool, by_slot: bool, size: int, dtype: torch.dtype
) -> None:
    """Forward, and backward against autograd."""
    to = assign(choose(tokens, num_experts, top_k, drop), num_experts)
    weights = draw(tokens, top_k, seed=2).abs()
    if not by_slot:
        to, weights = Assignment.of_rows(torch.tensor([tokens * top_k], device=DEVICE)), weights.flatten()
    used = int(to.ends[-1])
    gate_up = draw(tokens * top_k, 2 * size, dtype=dtype, seed=3).requires_grad_()
    weights.requires_grad_()
    expected = definition.activate(gate_up, weights, to)
    grad = draw(*expected.shape, dtype=dtype, seed=4)
    dgate_up, dweights = torch.autograd.grad(expected[:used], [gate_up, weights], grad[:used])

    tolerance = FP32 if dtype == torch.float32 else HALF
    gate_up = gate_up.detach().clone()
    assert_close(experts_gpu.activate(gate_up, weights, to), expected, tolerance, "forward")
    found = experts_gpu.activate_backward(grad, gate_up, weights.detach(), to)
    assert_close(found, dweights, FP32, "weights")
    assert_close(gate_up[:used], dgate_up[:used], tolerance, "gate and up")
    assert_close(grad, expected, tolerance, "the output again")


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones in the interpreter, where they make up for small inputs."""
    if INTERPRETED:
        for name in ("UP", "DOWN_BACKWARD", "OUTER"):
            small = {"ROWS": 16, "COLUMNS": 32, "INNER": 16}
            monkeypatch.setattr(experts_gemm_gpu, name, getattr(experts_gemm_gpu, name) | small)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize(("hidden", "ffn"), [(48, 40)] if INTERPRETED else [(48, 40), (256, 384), (1024, 896)])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "drop"),
    [(20, 6, 2, False), (7, 12, 3, True), *([] if INTERPRETED else [(1000, 6, 2, True), *ROUTINGS])],
)
def test_fused_products(
    tokens: int, num_experts: int, top_k: int, drop: bool, hidden: int, ffn: int, by_slot: bool
) -> None:
    """Against the products of rows that were gathered; fp32 where the interpreter cannot multiply bf16."""
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    tolerance = FP32 if INTERPRETED else BF16
    to = assign(choose(tokens, num_experts, top_k, drop), num_experts)
    weights = draw(tokens, top_k, seed=2).abs()
    if not by_slot:
        to, weights = Assignment.of_rows(to.counts), weights.flatten()
        tokens *= top_k
    x, grad = (draw(tokens, hidden, dtype=dtype, seed=seed) for seed in (3, 4))
    up = (draw(num_experts, 2, ffn, hidden, seed=5) * 0.2).to(dtype)
    down = (draw(num_experts, hidden, ffn, seed=6) * 0.2).to(dtype)
    used = int(to.ends[-1])
    rows, drows = definition.collect(x, to).float(), definition.collect(grad, to).float()

    gate_up, h = experts_gemm_gpu.up(x, up, weights, to)
    expected = by_expert(rows, up.flatten(1, 2).transpose(1, 2), to)
    assert_close(gate_up[:used], expected[:used], tolerance, "gate and up")
    assert_close(h[:used], definition.activate(gate_up, weights, to)[:used], tolerance, "activation")

    h_again = by_expert(drows, down, to)
    expected = gate_up.float().clone()
    dweights = definition.activate_backward(h_again, expected, weights, to)
    h, found = experts_gemm_gpu.down_backward(grad, down, gate_up, weights, to)
    assert_close(h[:used], h_again[:used], tolerance, "activation again")
    assert_close(found, dweights, tolerance, "weights")
    assert_close(gate_up[:used], expected[:used], tolerance, "gradient of gate and up")

    for left, right, gathered in ((grad, h, "left"), (gate_up, x, "right")):
        found = experts_gemm_gpu.outer(left, right, to, gathered == "left", gathered == "right")
        a, b = (drows, h.float()) if gathered == "left" else (gate_up.float(), rows)
        ends = [0, *to.ends.tolist()]
        parts = [a[i:j].T @ b[i:j] for i, j in zip(ends, ends[1:], strict=False)]
        assert_close(found, torch.stack(parts), tolerance, gathered)


def by_expert(rows: Tensor, matrices: Tensor, to: Assignment) -> Tensor:
    """`rows [M, K]` times their expert's matrix `[E, K, N]`, in fp32; 0 for those without."""
    ends = [0, *to.ends.tolist()]
    out = rows.new_zeros(len(rows), matrices.shape[2])
    for e, (i, j) in enumerate(zip(ends, ends[1:], strict=False)):
        out[i:j] = rows[i:j] @ matrices[e].float()
    return out


def layer(tokens: int, num_experts: int, top_k: int) -> tuple[MoE, Tensor]:
    config = ModelConfig(hidden_size=256, moe=MoEConfig(num_experts, top_k=top_k, expert_ffn_size=192))
    host = Host(torch.bfloat16, device=DEVICE)
    moe = MoE(config, layer_dims(config, 0), host)
    initialize(moe, host, seed=0)
    return moe, draw(tokens, 256, dtype=torch.bfloat16)


@on_gpu
@pytest.mark.parametrize("fuse", [frozenset(), *({step} for step in STEPS), STEPS], ids=lambda f: "+".join(f) or "none")
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "drop"), [(1000, 6, 2, False), *ROUTINGS])
def test_operation(tokens: int, num_experts: int, top_k: int, drop: bool, fuse: frozenset[str]) -> None:
    """bf16 on the GPU against fp32 on the CPU with the same inputs: outputs and every gradient."""
    index = choose(tokens, num_experts, top_k, drop)
    shapes = [(tokens, 256), (tokens, top_k), (num_experts, 2, 192, 256), (num_experts, 256, 192)]
    inputs = [draw(*shape, seed=i) * (0.1 if i > 1 else 1.0) for i, shape in enumerate(shapes)]
    inputs = [t if i == 1 else t.bfloat16() for i, t in enumerate(inputs)]
    grad = draw(tokens, 256, dtype=torch.bfloat16, seed=9)
    results = []
    for device, dtype in (("cuda", None), ("cpu", torch.float32)):
        leaves = [t.detach().to(device, dtype).requires_grad_() for t in inputs]
        out = experts(*leaves, assign(index.to(device), num_experts), frozenset(fuse))
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(out))])
    for what, actual, expected in zip(("y", "x", "weights", "gate_up", "down"), *results, strict=True):
        assert_close(actual, expected, BF16, what)
    idle = (results[1][3] == 0).flatten(1).all(1)
    assert (results[0][3][idle.to(DEVICE)] == 0).all(), "experts without tokens have no gradient"


@on_gpu
def test_no_host_synchronisation() -> None:
    """Router, assignment, experts, forward and backward."""
    moe, x = layer(1000, 16, 4)
    x.requires_grad_()
    moe(x).sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_is_deterministic() -> None:
    moe, x = layer(3000, 16, 4)
    results = []
    for _ in range(2):
        moe.zero_grad()
        x = x.detach().requires_grad_()
        y = moe(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in moe.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
