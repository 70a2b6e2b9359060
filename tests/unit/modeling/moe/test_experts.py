"""Operation of the experts against a loop over experts: outputs, gradients, kept memory, and waits for the device."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.ffn import MoE, SwiGLU
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.moe.config import MoEConfig
from linear_moe.modeling.moe.experts import Experts
from linear_moe.modeling.ops import experts as ops
from linear_moe.modeling.ops.experts import assign, experts
from linear_moe.modeling.ops.experts import products as products_module
from linear_moe.modeling.ops.experts.assignment import Assignment
from linear_moe.modeling.ops.experts.reference import activate, combine
from tests.tolerances import FP32, assert_close

HIDDEN, FFN = 24, 16


def build(num_experts: int, kind: str) -> Experts:
    host = Host(torch.float32)
    layer = Experts(MoEConfig(num_experts, expert_ffn_size=FFN, experts=kind), HIDDEN, 0.3, 0.3, host)
    initialize(layer, host, seed=1)
    return layer


def skewed(tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Draws distinct experts for each token, low numbers far more often: of many experts, some get no token."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(tokens, num_experts, generator=generator)
    return (noise / torch.arange(1, num_experts + 1).float() ** 1.5).topk(top_k).indices


def dropped(tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Draws experts as `skewed` does, with no expert for every third slot and for all slots of the last token."""
    index = skewed(tokens, num_experts, top_k)
    index.view(-1)[::3] = num_experts
    index[-1] = num_experts
    return index


CASES = {
    "mixed": skewed(50, 6, 2),
    "idle experts": skewed(12, 40, 3),
    "one token": skewed(1, 8, 2),
    "one expert each": skewed(30, 4, 1),
    "all experts": skewed(9, 5, 5),
    "one for all": torch.full((20, 1), 3),
    "dropped": dropped(31, 6, 2),
    "all dropped": torch.full((5, 2), 6),
    "no tokens": torch.empty(0, 2, dtype=torch.int64),
}
EXPERTS = {"idle experts": 40, "one token": 8, "all experts": 5, "one expert each": 4, "one for all": 4}


@pytest.mark.parametrize("name", CASES)
def test_assign_sorts_stably(name: str) -> None:
    index, num = CASES[name], EXPERTS.get(name, 6)
    to = assign(index, num)
    pairs = sorted((e, slot) for slot, e in enumerate(index.flatten().tolist()))
    assert to.slot.tolist() == [slot for _, slot in pairs]
    assert to.row.flatten().tolist() == [pairs.index((e, s)) for s, e in enumerate(index.flatten().tolist())]
    assert to.counts.tolist() == [sum(e == i for e, _ in pairs) for i in range(num)]
    assert to.ends.tolist() == torch.tensor(to.counts.tolist()).cumsum(0).tolist()
    assert {t.dtype for t in (to.slot, to.row, to.counts, to.ends)} == {torch.int32}


def run(layer: Experts, x: Tensor, weights: Tensor, to: Assignment) -> list[Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = layer(x, weights, to)
    factor = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    leaves = [x, weights, layer.gate_up_proj, layer.down_proj]
    return [out, *torch.autograd.grad(out, leaves, factor, materialize_grads=True)]


def draw(index: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(len(index), HIDDEN, generator=generator), torch.rand(index.shape, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_grouped_equals_sequential(name: str) -> None:
    index, num = CASES[name], EXPERTS.get(name, 6)
    x, weights = draw(index)
    to = assign(index, num)
    results = [run(build(num, kind), x, weights, to) for kind in ("grouped", "sequential")]
    for what, grouped, sequential in zip(("y", "x", "weights", "gate_up", "down"), *results, strict=True):
        assert_close(grouped, sequential, FP32, what)
    idle = to.counts == 0
    assert results[0][3][idle].abs().sum() == results[0][4][idle].abs().sum() == 0


def test_written_out() -> None:
    """Grouped experts equal the equation of one token at a time; slots without an expert have no effect."""
    index = CASES["dropped"]
    x, weights = draw(index)
    layer = build(6, "grouped")
    out, _, dweights, *_ = run(layer, x, weights, assign(index, 6))
    expected = torch.zeros_like(x)
    for t, chosen in enumerate(index.tolist()):
        for j, e in enumerate(chosen):
            if e < 6:
                gate, up = layer.gate_up_proj[e] @ x[t]
                expected[t] += weights[t, j] * (layer.down_proj[e] @ (F.silu(gate) * up))
    assert_close(out, expected, FP32)
    assert dweights[index == 6].abs().sum() == 0


def test_bf16_is_rounded_once() -> None:
    """Sums over a token's experts, and the activation, are computed in fp32."""
    index = skewed(40, 16, 8)
    to = assign(index, 16)
    generator = torch.Generator().manual_seed(6)
    y = torch.randn(320, 24, generator=generator).bfloat16()
    expected = y.double()[to.row.flatten().long()].unflatten(0, (40, 8)).sum(1)
    assert torch.equal(combine(y, to), expected.bfloat16())
    weights = torch.rand(40, 8, generator=generator)
    gate_up = torch.randn(320, 2 * FFN, generator=generator).bfloat16()
    gate, up = gate_up.double().chunk(2, -1)
    expected = F.silu(gate) * up * weights.flatten()[to.slot.long()].unsqueeze(-1)
    assert torch.equal(activate(gate_up, weights, to), expected.bfloat16())


@pytest.mark.parametrize("kind", ["grouped", "sequential"])
def test_tokens_already_sorted(kind: str) -> None:
    """Tokens sorted by expert, as ranks receive them, give the same results as an assignment with one expert each."""
    counts = torch.tensor([3, 0, 4, 1])
    index = torch.arange(4).repeat_interleave(counts).unsqueeze(1)
    x, weights = draw(index)
    received = run(build(4, kind), x, weights.flatten(), Assignment.of_rows(counts))
    local = run(build(4, kind), x, weights, assign(index, 4))
    for actual, expected in zip(received, local, strict=True):
        assert_close(actual, expected.view(actual.shape), FP32)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List that grows by one with each grouped GEMM."""
    calls: list[str] = []
    multiply = products_module.grouped_mm
    monkeypatch.setattr(
        products_module, "grouped_mm", lambda *args, **options: calls.append("") or multiply(*args, **options)
    )
    return calls


def test_frozen_weights_and_inputs(products: list[str]) -> None:
    """Gradients are the same if only one is needed, and the GEMMs of the others are left out."""
    index = CASES["mixed"]
    x, weights = draw(index)
    layer = build(6, "grouped")
    expected = run(layer, x, weights, assign(index, 6))
    assert len(products) == 6
    for i, number in enumerate(
        (4, 3, 4, 4)
    ):  # two GEMMs forward, one for the activation's gradient, one for the leaf's gradient
        leaves = [x.clone(), weights.clone(), layer.gate_up_proj.detach(), layer.down_proj.detach()]
        leaves[i] = leaves[i].clone().requires_grad_()
        products.clear()
        out = experts(*leaves, assign(index, 6))
        factor = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        (gradient,) = torch.autograd.grad(out, leaves[i], factor)
        assert_close(gradient, expected[i + 1], FP32)
        assert len(products) == number


@pytest.mark.parametrize("by_slot", [True, False])
def test_computed_again(products: list[str], by_slot: bool) -> None:
    """Recomputation takes one more product and gives equal results, and a second backward pass is possible."""
    index = CASES["one expert each"]
    (x, weights), layer = draw(index), build(4, "grouped")
    to = assign(index, 4)
    if not by_slot:
        to, weights = Assignment.of_rows(to.counts), weights.flatten()
    expected, number = run(layer, x, weights, to), len(products)
    layer.host.activations._active = frozenset({"experts"})
    recomputed = run(layer, x, weights, to)
    assert len(products) - number == number + 1
    assert all(torch.equal(a, b) for a, b in zip(recomputed, expected, strict=True))
    out = layer(x.requires_grad_(), weights, to)
    first, second = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_loop_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    index = CASES["dropped"]
    (x, weights), to, layer = draw(index), assign(index, 6), build(6, "sequential")
    expected = run(layer, x, weights, to)
    calls: list[str] = []
    loop = layer.sequential
    monkeypatch.setattr(layer, "sequential", lambda *args: calls.append("") or loop(*args))
    layer.host.activations._active = frozenset({"experts"})
    recomputed = run(layer, x, weights, to)
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(recomputed, expected, strict=True))


def kept(function: Any, weights: set[int]) -> int:
    """Bytes of the distinct storages that autograd keeps in `function()`, other than the weights."""
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(s.nbytes() for address, s in saved.items() if address not in weights)


def test_keeps_no_more_than_a_dense_ffn() -> None:
    """Experts keep no more than a dense FFN with the same active parameters, besides the assignment's indices."""
    index = skewed(200, 8, 4)
    x, weights = draw(index)
    to, layer = assign(index, 8), build(8, "grouped")
    config = ModelConfig(hidden_size=HIDDEN)
    dense = SwiGLU(layer_dims(config, 0), 4 * FFN, Host(torch.float32))
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter)
    addresses = {p.untyped_storage().data_ptr() for p in [*layer.parameters(), *dense.parameters()]}
    x.requires_grad_()
    indices = sum(t.untyped_storage().nbytes() for t in (to.counts, to.ends, to.slot, to.row)) + weights.nbytes
    ours = kept(lambda: layer(x, weights, to), addresses)
    assert ours == x.nbytes + 2 * 4 * FFN * 200 * 4 + indices
    assert ours - indices < kept(lambda: dense(x), addresses)


def test_one_backward_pass_only() -> None:
    """A second backward pass raises an error, because the first one has overwritten the kept tensors."""
    index = CASES["mixed"]
    x, weights = draw(index)
    out = build(6, "grouped")(x, weights, assign(index, 6))
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("by_slot", [True, False])
def test_gradients_that_are_not_contiguous(by_slot: bool) -> None:
    """The gradient of the output may be expanded, as that of a sum is, or transposed."""
    counts = torch.tensor([3, 0, 4, 1])
    index = torch.arange(4).repeat_interleave(counts).unsqueeze(1)
    to = assign(index, 4) if by_slot else Assignment.of_rows(counts)
    (x, weights), layer = draw(index), build(4, "grouped")
    x.requires_grad_()
    for grad in (torch.ones(1, 1).expand(x.shape), torch.randn(HIDDEN, len(x)).T):
        actual, expected = (torch.autograd.grad(layer(x, weights, to), x, g) for g in (grad, grad.contiguous()))
        assert torch.equal(actual[0], expected[0])


QUACK, TRITON, MM = "quack", "gemm_triton", "Products"
BF16_ONLY, BY_8 = "products 'quack' multiplies bf16, not ", "products 'quack' needs D and F divisible by 8, not "


@pytest.mark.parametrize(
    ("capability", "has_quack", "x", "ffn", "expected"),
    [  # expected: what auto, grouped, triton and quack choose, or quack's refusal
        ((9, 0), True, torch.empty(3, 24, dtype=torch.bfloat16), 16, [QUACK, TRITON, TRITON, QUACK]),
        ((9, 0), False, torch.empty(3, 24, dtype=torch.bfloat16), 16, [TRITON, TRITON, TRITON, "needs quack-kernels"]),
        ((9, 0), True, torch.empty(3, 24, dtype=torch.float16), 16, [TRITON, TRITON, TRITON, BF16_ONLY + "float16"]),
        ((9, 0), True, torch.empty(3, 24), 16, [MM, MM, MM, BF16_ONLY + "float32"]),
        ((9, 0), True, torch.empty(3, 20, dtype=torch.bfloat16), 16, [MM, MM, MM, BY_8 + "20 and 16"]),
        ((9, 0), True, torch.empty(3, 24, dtype=torch.bfloat16), 20, [MM, MM, MM, BY_8 + "24 and 20"]),
        ((9, 0), True, torch.empty(0, 24, dtype=torch.bfloat16), 16, [MM, MM, MM, MM]),
        ((8, 0), True, torch.empty(3, 24, dtype=torch.bfloat16), 16, [MM, MM, TRITON, "9.0 or above, not a GPU"]),
        ((10, 0), True, torch.empty(3, 24, dtype=torch.bfloat16), 16, [MM, MM, TRITON, QUACK]),
    ],
)
def test_who_multiplies(
    capability: tuple[int, int], has_quack: bool, x: Tensor, ffn: int, expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Choice of the implementation of grouped GEMMs on GPUs of any capability, with and without quack."""
    for name in (QUACK, TRITON):
        module = SimpleNamespace(Fused=type(name, (ops.Products,), {}))
        monkeypatch.setitem(sys.modules, f"linear_moe.modeling.ops.experts.{name}", module)
    monkeypatch.setattr(ops, "_kernels", lambda x: object())
    monkeypatch.setattr(ops, "_has_quack", lambda: has_quack)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    class OnGPU:
        is_cuda, device, dtype, shape = True, torch.device("cuda"), x.dtype, x.shape
        element_size, __len__ = x.element_size, lambda self: len(x)

    def chosen(products: str) -> str:
        try:
            return type(ops._products(products, OnGPU(), ffn)).__name__  # type: ignore[arg-type]
        except ValueError as error:
            return str(error)

    *names, quack = map(chosen, ("auto", "grouped", "triton", "quack"))
    assert names == expected[:3] and expected[3] in quack


class Waits(TorchDispatchMode):
    """Mode that collects operations for which the host needs the size or value of a result on the device."""

    WAITING = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket is torch.ops.aten.index and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if by_mask or any(name in str(func) for name in self.WAITING):
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def test_never_waits_for_the_device() -> None:
    config = ModelConfig(hidden_size=HIDDEN, moe=MoEConfig(6, top_k=2, expert_ffn_size=FFN))
    host = Host(torch.float32)
    layer = MoE(config, layer_dims(config, 0), host)
    initialize(layer, host, 0)
    with Waits() as waits:
        layer(torch.randn(20, HIDDEN, requires_grad=True)).sum().backward()
    assert waits.operations == []
    x = torch.randn(3, 2)
    with waits:
        x[x[:, 0] > 0]
    assert waits.operations, "the mode would have seen this operation"


@pytest.mark.parametrize(
    ("tokens", "width", "weights"), [(50, HIDDEN + 1, (50, 2)), (50, HIDDEN, (50, 3)), (49, HIDDEN, (49, 2))]
)
def test_shapes_that_do_not_fit(tokens: int, width: int, weights: tuple[int, int]) -> None:
    layer = build(6, "grouped")
    with pytest.raises(ValueError, match="fit"):
        layer(torch.randn(tokens, width), torch.rand(weights), assign(CASES["mixed"], 6))
