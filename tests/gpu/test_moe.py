"""Tests of the experts' Triton kernels against their PyTorch definitions, and of the whole operation on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear_moe.modeling.activations import Activations
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.ffn import MoE
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.ops import experts as operation
from linear_moe.modeling.ops.experts import assign, experts, reference, refused_by_quack
from linear_moe.modeling.ops.experts.assignment import Assignment
from tests.gpu.kernels import DEVICE, HALF, INTERPRETED, MARKS
from tests.tolerances import BF16, BF16_ROUNDING, FP32, assert_close

triton = pytest.importorskip("triton")
from linear_moe.modeling.ops.experts import gemm_triton  # noqa: E402  they import triton
from linear_moe.modeling.ops.experts import triton as experts_triton  # noqa: E402  imports triton

pytestmark = MARKS
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs CUDA")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def choose(tokens: int, num_experts: int, top_k: int, drop: bool = False) -> Tensor:
    """Draws a skewed choice of experts, in which some of many experts get no token.

    With `drop`, every third slot has no expert.
    """
    noise = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(1))
    index = (noise / torch.arange(1, num_experts + 1).float() ** 1.5).topk(top_k).indices
    if drop:
        index.view(-1)[::3] = num_experts
    return index.to(DEVICE)


# tokens, experts, top_k, whether some slots have no expert
ROUTINGS = [(70, 6, 2, False), (11, 64, 8, False), (1, 8, 3, True), (9, 5, 5, False), (37, 300, 3, True)]


@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "drop"), [*ROUTINGS, (0, 4, 2, False)])
def test_assign(tokens: int, num_experts: int, top_k: int, drop: bool) -> None:
    index = choose(tokens, num_experts, top_k, drop)
    expected = assign(index.cpu(), num_experts)
    assert experts_triton.can_assign(num_experts)
    actual = Assignment(*experts_triton.assign(index, num_experts))
    for name in ("counts", "offsets", "slot", "row"):
        assert getattr(actual, name).tolist() == getattr(expected, name).tolist(), name
        assert getattr(actual, name).dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 130, 2500])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "drop"), ROUTINGS)
def test_collect_and_combine(
    tokens: int, num_experts: int, top_k: int, drop: bool, width: int, dtype: torch.dtype
) -> None:
    to = assign(choose(tokens, num_experts, top_k, drop), num_experts)
    x = draw(tokens, 2 * width, dtype=dtype)[:, :width]
    rows = experts_triton.collect(x, to)
    assert torch.equal(rows, reference.collect(x, to))
    rows[int(to.ends[-1]) :] = float("nan")  # a grouped GEMM may leave NaN in rows without expert
    tolerance = FP32 if dtype == torch.float32 else HALF
    assert_close(experts_triton.combine(rows, to), reference.combine(rows, to), tolerance)
    weights = draw(tokens, top_k, seed=2)
    expected = reference.combine(rows, to, weights)
    assert_close(experts_triton.combine(rows, to, weights), expected, tolerance, "weighted")
    exact = reference.combine(rows.float() * reference.row_weights(weights, to).unsqueeze(1), to)
    assert_close(expected, exact, FP32 if dtype == torch.float32 else BF16_ROUNDING)
    by_row, weights = Assignment.of_rows(to.counts), weights.flatten()
    expected = reference.combine(rows, by_row, weights)
    assert_close(experts_triton.combine(rows, by_row, weights), expected, tolerance, "weighted, rows")


@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "drop"), ROUTINGS)
def test_slot_sums(tokens: int, num_experts: int, top_k: int, drop: bool, by_slot: bool) -> None:
    to, weights = assign(choose(tokens, num_experts, top_k, drop), num_experts), draw(tokens, top_k)
    parts = draw(tokens * top_k, 3, seed=1)
    parts[int(to.ends[-1]) :] = float("nan")
    expected = torch.zeros(tokens * top_k, device=DEVICE)
    used = int(to.ends[-1])
    assert to.slot is not None
    expected[to.slot[:used].long() if by_slot else slice(used)] = parts[:used].sum(1)
    if not by_slot:
        to, weights = Assignment.of_rows(to.counts), weights.flatten()
    for module in (reference, experts_triton):
        assert_close(module.slot_sums(parts, weights, to), expected.view(weights.shape), FP32, module.__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 130])
@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "drop"), ROUTINGS)
def test_activation(
    tokens: int, num_experts: int, top_k: int, drop: bool, by_slot: bool, size: int, dtype: torch.dtype
) -> None:
    """The kernels match the definition of the activation, and autograd's gradients of it."""
    to = assign(choose(tokens, num_experts, top_k, drop), num_experts)
    weights = draw(tokens, top_k, seed=2).abs()
    if not by_slot:
        to, weights = Assignment.of_rows(torch.tensor([tokens * top_k], device=DEVICE)), weights.flatten()
    used = int(to.ends[-1])
    gate_up = draw(tokens * top_k, 2 * size, dtype=dtype, seed=3).requires_grad_()
    weights.requires_grad_()
    expected = reference.activate(gate_up, weights, to)
    grad = draw(*expected.shape, dtype=dtype, seed=4)
    dgate_up, dweights = torch.autograd.grad(expected[:used], [gate_up, weights], grad[:used])

    tolerance = FP32 if dtype == torch.float32 else HALF
    gate_up = gate_up.detach().clone()
    assert_close(experts_triton.activate(gate_up, weights, to), expected, tolerance, "forward")
    actual_dweights = experts_triton.activate_backward(grad, gate_up, weights.detach(), to)
    assert_close(actual_dweights, dweights, FP32, "weights")
    assert_close(gate_up[:used], dgate_up[:used], tolerance, "gate and up")
    assert_close(grad, expected, tolerance, "the output again")


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tiles small in the interpreter, so that its small inputs have several tiles too."""
    if INTERPRETED:
        for name in ("UP", "DOWN_BACKWARD", "DOWN_GRADIENT", "UP_GRADIENT"):
            small = {"ROWS": 16, "COLUMNS": 32, "INNER": 16}
            monkeypatch.setattr(gemm_triton, name, getattr(gemm_triton, name) | small)


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
    """The fused products match products of gathered rows; in fp32 in the interpreter, which cannot multiply bf16."""
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
    rows, drows = reference.collect(x, to).float(), reference.collect(grad, to).float()

    gate_up, h = gemm_triton.up(x, up, weights, to)
    expected = by_expert(rows, up.flatten(1, 2).transpose(1, 2), to)
    assert_close(gate_up[:used], expected[:used], tolerance, "gate and up")
    assert_close(h[:used], reference.activate(gate_up, weights, to)[:used], tolerance, "activation")

    h_again = by_expert(drows, down, to)
    expected = gate_up.float().clone()
    dweights = reference.activate_backward(h_again, expected, weights, to)
    h, actual_dweights = gemm_triton.down_backward(grad, down, gate_up, weights, to)
    assert_close(h[:used], h_again[:used], tolerance, "activation again")
    assert_close(actual_dweights, dweights, tolerance, "weights")
    assert_close(gate_up[:used], expected[:used], tolerance, "gradient of gate and up")

    for gathered, factor, tokens_left in ((drows, h, True), (rows, gate_up, False)) if by_slot else ():
        factor[used:] = float("nan")
        product = gemm_triton.outer(grad if tokens_left else x, factor, to, tokens_left)
        a, b = (gathered, factor.float()) if tokens_left else (factor.float(), gathered)
        ends = [0, *to.ends.tolist()]
        parts = [a[i:j].T @ b[i:j] for i, j in zip(ends, ends[1:], strict=False)]
        assert_close(product, torch.stack(parts), tolerance, f"outer product, tokens left: {tokens_left}")


@pytest.mark.skipif(not INTERPRETED, reason="test_operation compares the same on a GPU")
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "drop"),
    [(20, 6, 2, False), (7, 12, 3, True), (5, 1, 1, False), (4, 3, 3, False)],
)
def test_operation_of_fused_products(
    tokens: int, num_experts: int, top_k: int, drop: bool, by_slot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and all gradients match, for sizes that no tile divides and with NaN around the tokens in memory."""
    to, hidden, ffn = assign(choose(tokens, num_experts, top_k, drop), num_experts), 40, 72
    weights = draw(tokens, top_k, seed=2).abs()
    if not by_slot:
        to, weights, tokens = Assignment.of_rows(to.counts), weights.flatten(), tokens * top_k
    used = tokens if by_slot else int(to.ends[-1])
    shapes = [(num_experts, 2, ffn, hidden), (num_experts, hidden, ffn)]
    x, grad = (torch.full((tokens + 1, hidden + 8), torch.nan)[:-1, :hidden] for _ in range(2))
    x.copy_(draw(tokens, hidden, seed=3))
    grad.copy_(draw(tokens, hidden, seed=4))
    leaves = [t.requires_grad_() for t in (x, weights, *(draw(*shape, seed=5) * 0.2 for shape in shapes))]
    results = []
    for fused in (True, False):
        if fused:
            monkeypatch.setattr(operation, "_products", lambda *_: gemm_triton.Fused(experts_triton))
        y = experts(*leaves, to, "grouped_mm")
        y_, dx, *others = [y, *torch.autograd.grad(y, leaves, grad, retain_graph=True)]
        results.append([y_[:used], dx[:used], *others])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, leaves, grad)
        monkeypatch.undo()
    for what, actual, expected in zip(("y", "x", "weights", "gate_up", "down"), *results, strict=True):
        assert_close(actual, expected, FP32, what)


def by_expert(rows: Tensor, matrices: Tensor, to: Assignment) -> Tensor:
    """Multiplies `rows [M, K]` by their expert's matrix `[E, K, N]`, in fp32; rows without an expert give 0."""
    ends = [0, *to.ends.tolist()]
    out = rows.new_zeros(len(rows), matrices.shape[2])
    for e, (i, j) in enumerate(zip(ends, ends[1:], strict=False)):
        out[i:j] = rows[i:j] @ matrices[e].float()
    return out


def layer(tokens: int, num_experts: int, top_k: int, **fields: Any) -> tuple[MoE, Tensor]:
    config = ModelConfig(hidden_size=256, moe=MoEConfig(num_experts, top_k=top_k, expert_ffn_size=192, **fields))
    host = Host(torch.bfloat16, device=DEVICE)
    moe = MoE(config, layer_dims(config, 0), host)
    initialize(moe, host, seed=0)
    return moe, draw(tokens, 256, dtype=torch.bfloat16)


@on_gpu
@pytest.mark.parametrize("products", ["grouped_mm", "triton", "quack"])
@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize("ffn", [192, 200])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "drop"), [(1000, 6, 2, True), (0, 4, 2, False), *ROUTINGS])
def test_operation(
    tokens: int, num_experts: int, top_k: int, drop: bool, ffn: int, by_slot: bool, products: str
) -> None:
    """Outputs and all gradients in bf16 on the GPU match those in fp32 on the CPU."""
    if products == "quack" and (refusal := refused_by_quack(torch.bfloat16, torch.device(DEVICE))):
        pytest.skip(refusal)
    index = choose(tokens, num_experts, top_k, drop)
    assigned = assign(index, num_experts)
    used = tokens
    if not by_slot:
        assigned = Assignment.of_rows(assigned.counts)
        tokens, top_k, used = tokens * top_k, 1, int(assigned.ends[-1])
    shapes = [(tokens, 256), (tokens, top_k), (num_experts, 2, ffn, 256), (num_experts, 256, ffn)]
    inputs = [draw(*shape, seed=i) * (0.1 if i > 1 else 1.0) for i, shape in enumerate(shapes)]
    inputs = [t if i == 1 else t.bfloat16() for i, t in enumerate(inputs)]
    grad = draw(tokens, 256, dtype=torch.bfloat16, seed=9)
    results = []
    for device, dtype, name in (("cuda", None, products), ("cpu", torch.float32, "grouped_mm")):
        leaves = [t.detach().to(device, dtype).requires_grad_() for t in inputs]
        indices = (assigned.counts, assigned.offsets, assigned.slot, assigned.row)
        to = Assignment(*(t if t is None else t.to(device) for t in indices))  # type: ignore[arg-type]
        out = experts(*leaves, to, name)
        y, x, *others = [out, *torch.autograd.grad(out, leaves, grad.to(out))]
        results.append([y[:used], x[:used], *others])  # rows without expert are undefined
    for what, actual, expected in zip(("y", "x", "weights", "gate_up", "down"), *results, strict=True):
        assert_close(actual, expected, BF16, what)
    idle = (results[1][3] == 0).flatten(1).all(1)
    assert (results[0][3][idle.to(DEVICE)] == 0).all(), "experts without tokens have no gradient"


SHARED: dict[str, Any] = {"shared_ffn_size": 512, "shared_gate": True}


@on_gpu
@pytest.mark.parametrize(
    "fields", [{}, SHARED, SHARED | {"overlap_shared_expert": True}], ids=["", "shared", "overlap"]
)
def test_no_host_synchronisation(fields: dict[str, Any]) -> None:
    """Router, assignment and experts do not wait for the device, forward and backward."""
    moe, x = layer(1000, 16, 4, **fields)
    x.requires_grad_()
    moe(x).sum().backward()  # compiles the kernels, which may wait
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


# -- the shared expert on a stream of its own -------------------------------------------------------------------------
TOKENS, WIDTH, LAYERS, REPEATS = (20, 32, 2, 1) if INTERPRETED else (2048, 256, 3, 20)


def sleep(cycles: int) -> None:
    if not INTERPRETED:
        torch.cuda._sleep(cycles)


class Stack(nn.Module):
    """A stack of residual MoE layers.

    Args:
        overlap: whether the shared expert runs on a stream of its own.
        recompute: parts of a layer that the backward pass computes again.
        gate: whether the shared expert has a gate.
    """

    def __init__(self, overlap: bool, recompute: Sequence[str] = (), gate: bool = False):
        super().__init__()
        self.host = Host(torch.bfloat16, DEVICE, Activations(recompute))
        moe = MoEConfig(8, top_k=2, expert_ffn_size=192, shared_ffn_size=1024, shared_gate=gate)
        moe.overlap_shared_expert = overlap
        config = ModelConfig(hidden_size=WIDTH, moe=moe)
        self.layers = nn.ModuleList(MoE(config, layer_dims(config, 0), self.host) for _ in range(LAYERS))
        initialize(self, self.host, seed=0)

    def forward(self, x: Tensor) -> Tensor:
        for i, moe in enumerate(self.layers):
            x = x + self.host.activations.layer(i, self.computed, moe, x * 1.0)  # a tensor that only the layer holds
        return x

    def computed(self, moe: nn.Module, x: Tensor) -> Tensor:
        """Calls a layer in the way in which the layers of a model call their channel mixer."""
        return self.host.activations.region("ffn", moe, self.host.activations.transient("norm", rms_norm, x))

    def results(self, x: Tensor) -> list[Tensor]:
        """Returns the output and all gradients."""
        self.zero_grad()
        x = x.detach().requires_grad_()
        y = self(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in self.parameters())]


def rms_norm(x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:])


def in_backward(module: nn.Module, function: Callable[[], None]) -> None:
    """Makes autograd call `function` before the module's backward pass, on the stream of this pass."""

    def at_output(_: nn.Module, __: Any, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(lambda _: function())

    module.register_forward_hook(at_output)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("recompute", [(), ("layer",), ("ffn",), ("norm", "activation", "experts")], ids=" ".join)
@pytest.mark.parametrize("late", ["shared", "routed", "neither"])
def test_overlap_changes_no_bit(late: str, recompute: tuple[str, ...], gate: bool) -> None:
    """Overlap changes no bit of outputs and gradients, even if a stream is late and freed memory is overwritten.

    Repetitions give a race the chance to show.
    """
    x = draw(TOKENS, WIDTH, dtype=torch.bfloat16)
    expected = Stack(False, (), gate).results(x)
    stack = Stack(True, recompute, gate)

    def overwrite() -> None:
        kept = [torch.full((TOKENS, WIDTH), torch.nan, device=DEVICE, dtype=torch.bfloat16) for _ in range(8)]
        del kept

    for moe in stack.layers:
        disturbed: list[tuple[nn.Module, Callable[[], None]]] = [(moe.experts, overwrite)]
        if late != "neither":
            module = moe.experts if late == "routed" else moe.shared_expert.down_proj
            disturbed.append((module, lambda: sleep(500_000)))
        for module, disturb in disturbed:
            module.register_forward_pre_hook(lambda *_, disturb=disturb: disturb())
            in_backward(module, disturb)
    for _ in range(REPEATS):
        results = stack.results(x)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@on_gpu
def test_overlap_saves_time() -> None:
    """Overlap saves time if the dispatch, the shared expert and the backward passes of all experts take long."""

    def wait() -> None:
        sleep(40_000_000)

    def milliseconds(overlap: bool) -> float:
        stack, x = Stack(overlap), draw(TOKENS, WIDTH, dtype=torch.bfloat16)
        stack.results(x)  # compiles the kernels
        for moe in stack.layers:

            def dispatch(*args: Any, dispatch: Any = moe.dispatcher.dispatch) -> Any:
                received = dispatch(*args)
                wait()
                return received

            moe.dispatcher.dispatch = dispatch
            moe.shared_expert.down_proj.register_forward_pre_hook(lambda *_: wait())
            for module in (moe.experts, moe.shared_expert.down_proj):
                in_backward(module, wait)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        stack.results(x)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    assert milliseconds(True) < 0.65 * milliseconds(False)
