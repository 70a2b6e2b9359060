"""Tests of the recurrence with complex decays on CPU: chunk = reference, packed = separate, step = reference."""

from __future__ import annotations

import importlib
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.ops.recurrences.complex_decay import complex_decay
from tests.tolerances import FP32, assert_close
from tests.unit.modeling.ops.recurrences.cases import run


def make_inputs(batch: int, length: int, sequences: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, g, theta = (torch.randn(batch, length, 2, 6, generator=generator) for _ in range(4))
    v = torch.randn(batch, length, 2, 5, generator=generator)
    state = torch.randn(sequences or batch, 2, 12, 5, generator=generator)
    return {"q": q, "k": k, "v": v, "g": F.logsigmoid(g + 2), "theta": 100 * theta, "initial_state": state}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], case: object) -> None:
    for name in expected:
        assert_close(actual[name], expected[name], FP32, f"{case} {name}")


def test_reference_is_the_formula() -> None:
    inputs = {name: x.double() for name, x in make_inputs(2, 9).items()}
    o, final = complex_decay(**make_inputs(2, 9), backend="reference")
    real, imaginary = inputs["initial_state"].chunk(2, dim=2)
    state = torch.complex(real, imaginary)
    for t in range(9):
        q, k, v, g, theta = (inputs[name][:, t] for name in ("q", "k", "v", "g", "theta"))
        state = (g + 1j * theta).exp()[..., None] * state + k[..., None] * v[..., None, :]
        assert_close(o[:, t], (q[..., None] * state).sum(-2).real, FP32)
    assert_close(final, torch.cat([state.real, state.imag], dim=2), FP32)


@pytest.mark.parametrize("batch", [1, 3])
def test_chunk_matches_reference(batch: int) -> None:
    for length in (1, 17, 63, 64, 65, 200):
        inputs = make_inputs(batch, length)
        compare(run(complex_decay, inputs, backend="chunk"), run(complex_decay, inputs, backend="reference"), length)
    del inputs["initial_state"]
    compare(run(complex_decay, inputs, backend="chunk"), run(complex_decay, inputs, backend="reference"), "stateless")


def test_more_segments_than_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, rows = make_inputs(2, 65), []
    expected = run(complex_decay, inputs, backend="chunk")
    module = importlib.import_module(complex_decay.__module__)
    decay = module.decay
    monkeypatch.setattr(module, "MAX_ROWS", 5)
    kernels = lambda q, *args, backend, **options: rows.append(len(q)) or decay(q, *args, backend="chunk", **options)  # noqa: E731
    monkeypatch.setattr(module, "decay", kernels)
    monkeypatch.setitem(module.IMPLEMENTATIONS, "chunk", module.IMPLEMENTATIONS["gpu"])
    compare(run(complex_decay, inputs, backend="chunk"), expected, "in parts")
    assert len(rows) > 1 and max(rows) == 5


@pytest.mark.parametrize("backend", ["reference", "chunk"])
def test_packed_documents_match_separate_ones(backend: str) -> None:
    offsets = [0, 0, 5, 70, 134, 134, 135, 200, 200]
    inputs = make_inputs(1, 200, len(offsets) - 1)

    def separate(initial_state: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        outputs, states = [], []
        for n, (start, end) in enumerate(pairwise(offsets)):
            state = initial_state[n : n + 1]
            if end > start:
                cut = {name: x[:, start:end] for name, x in tokens.items()}
                o, state = complex_decay(**cut, initial_state=state, backend="reference")
                outputs.append(o)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    actual = run(complex_decay, inputs, cu_seqlens=torch.tensor(offsets), backend=backend)
    compare(actual, run(separate, inputs), backend)


def test_step_matches_reference_and_updates_in_place() -> None:
    inputs = make_inputs(3, 12)
    expected, final = complex_decay(**inputs, backend="reference")
    state = inputs.pop("initial_state")
    with torch.no_grad():
        for t in range(12):
            token = {name: x[:, t : t + 1] for name, x in inputs.items()}
            o, returned = complex_decay(**token, initial_state=state)
            assert returned is state
            assert_close(o, expected[:, t : t + 1], FP32)
    assert_close(state, final, FP32)


@pytest.mark.parametrize("gate", [0.0, -50.0, -1e30, float("-inf")])
def test_extreme_gates(gate: float) -> None:
    inputs = make_inputs(2, 130)
    inputs["g"][:, 3::4] = gate
    compare(run(complex_decay, inputs, backend="chunk"), run(complex_decay, inputs, backend="reference"), gate)


def test_wrong_inputs_are_refused() -> None:
    inputs = make_inputs(2, 8)
    for name, value, message in [
        ("theta", inputs["theta"][..., :3], "theta must be"),
        ("initial_state", inputs["initial_state"][:, :, :6], "initial_state must be float32"),
        ("backend", "gpu", "needs CUDA tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            complex_decay(**{**inputs, name: value})
