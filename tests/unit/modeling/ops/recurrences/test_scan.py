"""Tests of the scans on CPU, with states and all gradients: chunk = reference, packed = separate, step = reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tolerances import BF16_SAME, FP32, assert_close
from tests.unit.modeling.ops.recurrences.cases import run
from tests.unit.modeling.ops.recurrences.scans import BY_TOKEN, SCANS, make_inputs, separately

LENGTHS = (1, 17, 63, 64, 65, 200)
OFFSETS = [0, 0, 5, 70, 134, 134, 135, 200, 200]  # empty, short, 64 + 1, 64, empty, one, 64 + 1, empty
every_scan = pytest.mark.parametrize("scan", list(SCANS))


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], case: object, tolerance: float = FP32) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], tolerance, f"{case} {name}")


def formula(scan: str, inputs: dict[str, Tensor]) -> Tensor:
    """Computes the first row's outputs as sums over all earlier inputs, in fp64, without a recurrence."""
    x = {name: t[0].double() if name in BY_TOKEN | {"initial_state"} else t.double() for name, t in inputs.items()}
    if scan == "linear":
        exponents, updates, reads = x["g"][..., None], x["x"][..., None], torch.ones(1)
    elif scan == "selective":
        exponents = x["dt"][..., None] * x["A"]
        updates, reads = (x["dt"] * x["u"])[..., None] * x["B"][:, None], x["C"][:, None]
    else:
        updates, reads = x["u"][..., None], torch.view_as_complex(x["c"])
        exponents = torch.view_as_complex(x["log_a"]).expand(len(updates), -1, -1)
        x["initial_state"] = torch.view_as_complex(x["initial_state"])
    state = x["initial_state"].view(exponents.shape[1:])
    outputs = []
    for t in range(len(updates)):
        weights = [exponents[j + 1 : t + 1].sum(0).exp() for j in range(t + 1)]
        h = exponents[: t + 1].sum(0).exp() * state + sum(w * updates[j] for j, w in enumerate(weights))
        outputs.append((h * (reads[t] if scan == "selective" else reads)).sum(-1).real)
    return torch.stack(outputs)


@every_scan
def test_reference_is_the_formula(scan: str) -> None:
    inputs = make_inputs(scan, 2, 9, 5, 3)
    output, _ = SCANS[scan](**inputs, backend="reference")
    assert_close(output[0], formula(scan, inputs), FP32)


@every_scan
@pytest.mark.parametrize("batch", [1, 3])
def test_chunk_matches_reference(scan: str, batch: int) -> None:
    for length in LENGTHS:
        inputs = make_inputs(scan, batch, length, 5, 3, seed=length)
        for case in (inputs, {name: x for name, x in inputs.items() if name != "initial_state"}):
            expected = run(SCANS[scan], case, backend="reference")
            compare(run(SCANS[scan], case, backend="chunk"), expected, (length, len(case)))


@every_scan
@pytest.mark.parametrize("backend", ["reference", "chunk"])
def test_packed_documents_match_separate_ones(scan: str, backend: str) -> None:
    inputs = make_inputs(scan, 1, OFFSETS[-1], 4, 3, sequences=len(OFFSETS) - 1)
    expected = run(separately(scan, OFFSETS), inputs)
    compare(run(SCANS[scan], inputs, cu_seqlens=torch.tensor(OFFSETS), backend=backend), expected, backend)
    zeros = {**inputs, "initial_state": torch.zeros_like(inputs["initial_state"])}
    expected = run(separately(scan, OFFSETS), zeros)
    del inputs["initial_state"], expected["d initial_state"]
    compare(run(SCANS[scan], inputs, cu_seqlens=torch.tensor(OFFSETS), backend=backend), expected, backend)


@every_scan
def test_final_state_continues_the_sequence(scan: str) -> None:
    inputs = make_inputs(scan, 2, 150, 4, 3)
    whole, final = SCANS[scan](**inputs, backend="chunk")
    outputs = []
    for start, end in ((0, 70), (70, 71), (71, 150)):
        part = {name: x[:, start:end] if name in BY_TOKEN else x for name, x in inputs.items()}
        output, inputs["initial_state"] = SCANS[scan](**part, backend="chunk")
        outputs.append(output)
    assert_close(torch.cat(outputs, dim=1), whole, FP32)
    assert_close(inputs["initial_state"], final, FP32)


@every_scan
def test_step_matches_reference_and_updates_in_place(scan: str) -> None:
    inputs = make_inputs(scan, 3, 12, 5, 4)
    expected, expected_state = SCANS[scan](**inputs, backend="reference")
    state, outputs = inputs["initial_state"], []
    with torch.no_grad():
        for t in range(12):
            token = {name: x[:, t : t + 1] if name in BY_TOKEN else x for name, x in inputs.items()}
            output, returned = SCANS[scan](**token)
            assert returned is state
            outputs.append(output)
    assert_close(torch.cat(outputs, dim=1), expected, FP32)  # no output shares memory with the state
    assert_close(state, expected_state, FP32)
    before = state.clone()
    SCANS[scan](**token)  # with gradients enabled, no state is updated in place
    assert torch.equal(state, before)


@pytest.mark.parametrize("extreme", [0.0, -50.0, -1e30, float("-inf"), "mixed"])
def test_extreme_gates(extreme: float | str) -> None:
    inputs = make_inputs("linear", 2, 130, 4, 1)
    if isinstance(extreme, str):
        for every, value in ((2, 0.0), (3, -1e-4), (7, -50.0), (31, -1e30), (67, float("-inf"))):
            inputs["g"][:, 5::every] = value
    else:
        inputs["g"].fill_(extreme)
    actual, expected = (run(SCANS["linear"], inputs, backend=backend) for backend in ("chunk", "reference"))
    compare(actual, expected, extreme)


@pytest.mark.parametrize("step", [0.0, 1e-6, 1e6])
def test_extreme_steps(step: float) -> None:
    inputs = make_inputs("selective", 2, 130, 4, 3)
    inputs["dt"][:, 3::5] = step
    actual, expected = (run(SCANS["selective"], inputs, backend=backend) for backend in ("chunk", "reference"))
    compare(actual, expected, step)


@pytest.mark.parametrize("log_decay", [0.0, -50.0, -1e4])
def test_extreme_poles(log_decay: float) -> None:
    inputs = make_inputs("diagonal", 2, 130, 4, 3)
    inputs["log_a"][:, 1, 0] = log_decay
    actual, expected = (run(SCANS["diagonal"], inputs, backend=backend) for backend in ("chunk", "reference"))
    compare(actual, expected, log_decay)


@every_scan
def test_bf16_is_computed_in_fp32(scan: str) -> None:
    inputs = make_inputs(scan, 2, 70, 4, 3)
    half = {name: x.bfloat16() if name in ("x", "u", "B", "C") else x for name, x in inputs.items()}
    output, state = SCANS[scan](**half, backend="chunk")
    expected, expected_state = SCANS[scan](**{n: x.float() for n, x in half.items()}, backend="reference")
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close(state, expected_state, FP32)
    assert_close(output, expected.bfloat16(), BF16_SAME)


def test_wrong_inputs_are_refused() -> None:
    inputs = make_inputs("selective", 2, 8, 4, 3)
    wrong = [
        ("u", inputs["u"][..., 0], r"u must be \[B, T, D\]"),
        ("dt", inputs["dt"][:, :4], "dt must be"),
        ("B", inputs["B"].long(), "B must be floating point"),
        ("C", inputs["C"][..., :2], "C must be"),
        ("initial_state", inputs["initial_state"][:1], "initial_state must be float32"),
        ("initial_state", inputs["initial_state"].bfloat16(), "initial_state must be float32"),
        ("backend", "cuda", "backend must be one of auto, reference, chunk, gpu"),
        ("backend", "gpu", "needs CUDA tensors"),
        ("cu_seqlens", torch.tensor([0, 8]), "need B = 1, got B = 2"),
    ]
    for name, value, message in wrong:
        with pytest.raises(ValueError, match=message):
            SCANS["selective"](**{**inputs, name: value})
