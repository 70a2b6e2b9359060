"""Tests of trained memories on CPU: chunk = reference, packed = separate, parts = whole, step = reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.backends import use_backend
from linear_moe.modeling.ops.recurrences.fast_weights import titans, ttt
from tests.tolerances import FP32, assert_close, relative_error

SIZE = 16  # tokens of a mini-batch
HEADS, DIM = 2, 8
CARRIED = {"ttt": ("gradient",), "titans": ("surprise", "start")}
OFFSETS = [0, 0, 5, 38, 70, 70, 71, 88]  # empty, short, 32 + 1, 32, empty, one, 16 + 1
both = pytest.mark.parametrize("name", ["ttt", "titans"])


def op(name: str) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    return ttt if name == "ttt" else lambda **inputs: titans(**inputs, chunk_size=SIZE)


def make_inputs(name: str, batch: int, length: int, *, sequences: int = 0, carried: bool = False) -> dict[str, Tensor]:
    """Draws fp32 inputs, by argument name; with `carried`, also the states to continue inside a mini-batch."""
    generator = torch.Generator().manual_seed(length)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    inputs = {n: normal(batch, length, HEADS, DIM) for n in "qkv"}
    rows = DIM
    if name == "ttt":
        rows = DIM + 1
        inputs["rate"] = normal(batch, length, HEADS).sigmoid() / DIM
        inputs["scale"] = 1 / torch.arange(1, SIZE + 1) + 0.05 * normal(SIZE).abs()
        inputs["weight"], inputs["bias"] = 1 + 0.2 * normal(HEADS, DIM), 0.2 * normal(HEADS, DIM)
    else:
        inputs["k"] = F.normalize(inputs["k"], dim=-1)
        inputs["rate"] = 0.1 * normal(batch, length, HEADS).sigmoid()
        inputs["keep"] = F.logsigmoid(normal(batch, length, HEADS) + 2)
        inputs["momentum"] = F.logsigmoid(normal(batch, length, HEADS))
    for state in ("initial_state", *(CARRIED[name] if carried else ())):
        inputs[state] = 0.3 * normal(sequences or batch, HEADS, rows, DIM)
    return inputs


def run(name: str, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Returns, by name, output, final states, and the gradients of a loss of all these with respect to every input."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    output, states = op(name)(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    losses = [(x * torch.randn(x.shape, generator=generator)).sum() for x in (output, *states)]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()), materialize_grads=True)
    finals = {f"final {i}": state for i, state in enumerate(states)}
    return {"output": output, **finals, **{f"d {n}": x for n, x in zip(leaves, gradients, strict=True)}}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], case: object) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], FP32, f"{case} {name}")


def shares(inputs: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """Cuts the inputs of tokens `start:end`; inputs that all tokens share stay whole, and states are left out."""
    tokens = {n: x[:, start:end] for n, x in inputs.items() if n in ("q", "k", "v", "rate", "keep", "momentum")}
    return tokens | {n: x for n, x in inputs.items() if n in ("scale", "weight", "bias")}


@both
@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("place", [None, [5, 5, 5], [3, 15, 0]], ids=str)
def test_chunk_matches_reference(name: str, length: int, place: list[int] | None) -> None:
    inputs = make_inputs(name, 3, length, carried=place is not None)
    places = None if place is None else torch.tensor(place)
    expected = run(name, inputs, place=places, backend="reference")
    compare(run(name, inputs, place=places, backend="chunk"), expected, "chunk")


@both
@pytest.mark.parametrize("backend", ["reference", "chunk"])
def test_packed_documents_match_separate_ones(name: str, backend: str) -> None:
    documents = list(pairwise(OFFSETS))
    inputs = make_inputs(name, 1, OFFSETS[-1], sequences=len(documents))
    together = run(name, inputs, cu_seqlens=torch.tensor(OFFSETS), backend=backend)
    apart = []
    for n, (start, end) in enumerate(documents):
        state = inputs["initial_state"][n : n + 1]
        if end == start:
            assert torch.equal(together["final 0"][n : n + 1], state)
            assert not together["final 1"][n].any()
            continue
        with use_backend("reference"):
            apart.append(op(name)(**shares(inputs, start, end), initial_state=state))
        for i, final in enumerate(apart[-1][1]):
            assert_close(together[f"final {i}"][n : n + 1], final, FP32, f"document {n}, final {i}")
    assert_close(together["output"], torch.cat([o for o, _ in apart], 1), FP32)
    if backend == "chunk":
        compare(together, run(name, inputs, cu_seqlens=torch.tensor(OFFSETS), backend="reference"), "packed")


@both
def test_final_states_continue_the_sequence(name: str) -> None:
    inputs = make_inputs(name, 2, 70)
    whole, finals = op(name)(**inputs)
    output, states = op(name)(**shares(inputs, 0, 5), initial_state=inputs["initial_state"])
    outputs = [output]
    for start, end in ((5, 16), (16, 17), (17, 40), (40, 70)):
        carried = dict(zip(("initial_state", *CARRIED[name]), states, strict=True))
        place = torch.full((2,), start % SIZE)
        output, states = op(name)(**shares(inputs, start, end), **carried, place=place)
        outputs.append(output)
    assert_close(torch.cat(outputs, 1), whole, FP32)
    for i, (actual, expected) in enumerate(zip(states, finals, strict=True)):
        assert_close(actual, expected, FP32, f"final {i}")


@both
def test_step_matches_reference_and_updates_in_place(name: str) -> None:
    """Steps of decoding match the reference, for rows at different places in their mini-batches."""
    inputs, place = make_inputs(name, 3, 20, carried=True), torch.tensor([0, 7, 15])
    states = [inputs.pop(n) for n in ("initial_state", *CARRIED[name])]
    named = dict(zip(("initial_state", *CARRIED[name]), [s.clone() for s in states], strict=True))
    expected, finals = op(name)(**inputs, **named, place=place, backend="reference")
    carried = dict(zip(named, states, strict=True))
    with torch.no_grad():
        for t in range(20):
            token = shares(inputs, t, t + 1)
            output, returned = op(name)(**token, **carried, place=(place + t) % SIZE)
            assert all(a is b for a, b in zip(returned, states, strict=True))
            assert_close(output, expected[:, t : t + 1], FP32, f"token {t}")
    for i, (actual, final) in enumerate(zip(states, finals, strict=True)):
        assert_close(actual, final, FP32, f"final {i}")
    before = [state.clone() for state in states]
    op(name)(**token, **carried, place=place)  # with gradients enabled, no state is updated in place
    assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))


@pytest.mark.parametrize("gate", ["keep", "momentum", "rate"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0])
def test_titans_extreme_gates(gate: str, value: float) -> None:
    """Chunks match the reference if the factor of a gate is extreme; a factor of 0 has a logarithm of -infinity."""
    inputs = make_inputs("titans", 2, 70)
    factor = torch.full_like(inputs[gate], value)
    factor[:, ::3] = 0.5
    inputs[gate] = factor * 0.1 if gate == "rate" else factor.log()
    compare(run("titans", inputs, backend="chunk"), run("titans", inputs, backend="reference"), (gate, value))


@pytest.mark.parametrize("case", ["no rate", "no scale", "constant weights", "zero keys"])
def test_ttt_extremes(case: str) -> None:
    inputs = make_inputs("ttt", 2, 40)
    if case == "constant weights":  # the inner LayerNorm's variance is 0 before the first step
        inputs["initial_state"] = torch.ones_like(inputs["initial_state"])
    else:
        changed = {"no rate": "rate", "no scale": "scale", "zero keys": "k"}[case]
        inputs[changed] = torch.zeros_like(inputs[changed])
    options = {"eps": 1e-2}
    compare(run("ttt", inputs, backend="chunk", **options), run("ttt", inputs, backend="reference", **options), case)


@both
def test_gradients_reach_every_input(name: str) -> None:
    inputs = make_inputs(name, 1, 40, carried=True)
    results = run(name, inputs, place=torch.tensor([3]))
    assert all(float(results[f"d {n}"].norm()) > 1e-4 for n in inputs)


@both
def test_the_place_matters(name: str) -> None:
    inputs = make_inputs(name, 1, 12, carried=True)
    first, second = (op(name)(**inputs, place=torch.tensor([n]))[0] for n in (0, 9))
    assert relative_error(first, second) > 1e-2


def test_wrong_inputs_are_refused() -> None:
    inputs, carried = make_inputs("ttt", 2, 8), make_inputs("ttt", 2, 8, carried=True)
    place = torch.zeros(2, dtype=torch.int64)
    for wrong, message in [
        ({**inputs, "v": inputs["v"][..., :4]}, "initial_state must be float32"),
        ({**inputs, "rate": inputs["rate"][..., None]}, "rate must be"),
        ({**inputs, "scale": inputs["scale"][:0]}, "scale"),
        ({**inputs, "weight": inputs["weight"][:1]}, "weight and bias"),
        ({**inputs, "initial_state": inputs["initial_state"].half()}, "initial_state must be float32"),
        ({**inputs, "place": place}, "gradient and place go together"),
        (carried, "gradient and place go together"),
        ({**carried, "place": place[:1]}, "place must be int64"),
        ({**inputs, "backend": "gpu"}, "needs CUDA tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            ttt(**wrong)  # type: ignore[arg-type]
    memory = make_inputs("titans", 1, 8, carried=True)
    with pytest.raises(ValueError, match="surprise, start and place go together"):
        titans(**memory, chunk_size=4, place=place[:1], cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="chunk_size must be"):
        titans(**memory, chunk_size=0, place=place[:1])
