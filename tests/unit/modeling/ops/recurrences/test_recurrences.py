"""Tests of recurrences on CPU, with states and gradients: chunk = reference, packed = separate, step = reference."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.ops.backends import has_fla
from linear_moe.modeling.ops.recurrences import decay as decay_family
from linear_moe.modeling.ops.recurrences import delta as delta_family
from tests.tolerances import BF16_SAME, FP32, assert_close
from tests.unit.modeling.ops.recurrences.cases import OPS, VARIANTS, make_inputs, run, set_extreme_gates, tokens

LENGTHS = (1, 17, 63, 64, 65, 200)
OFFSETS = [0, 0, 5, 70, 134, 134, 135, 200]  # empty, short, 64 + 1, 64, empty, one, 64 + 1
all_variants = pytest.mark.parametrize(("family", "gate"), VARIANTS)


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], case: object, tolerance: float = FP32) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], tolerance, f"{case} {name}")


def naive(q, k, v, g=None, gv=None, bonus=None, beta=None, a=None, b=None, initial_state=None, scale=None):  # type: ignore[no-untyped-def]
    """Computes the formulas in fp64 with whole matrices, S_t = A_t S_{t-1} + B_t, for one head of one row."""
    q, k, v = q.double(), k.double(), v.double()
    if k.ndim == 3:  # several writes per token
        n, q, v = k.shape[1], q.repeat_interleave(k.shape[1], 0), v.flatten(0, 1)
        g = None if g is None else torch.stack([g] + [torch.zeros_like(g)] * (n - 1), 1).flatten()
        o, state = naive(q, k.flatten(0, 1), v, g, beta=beta.flatten(), initial_state=initial_state, scale=scale)
        return o[n - 1 :: n], state
    g = g.expand(len(q)) if g is not None and g.ndim == 0 else g
    state = initial_state.double()
    outputs = []
    for t in range(len(q)):
        transition = torch.eye(q.shape[-1], dtype=torch.float64)
        if g is not None:
            transition = transition @ torch.diag(g[t].double().exp().expand(q.shape[-1]))
        if a is not None:
            transition = transition + torch.outer(b[t].double(), a[t].double())
        update = torch.outer(k[t], v[t])
        if beta is not None:
            transition = transition - beta[t].double() * torch.outer(k[t], k[t]) @ transition
            update = beta[t].double() * update
        before = state
        state = transition @ state * (1 if gv is None else gv[t].double().exp()) + update
        outputs.append(scale * q[t] @ (state if bonus is None else before + torch.diag(bonus.double()) @ update))
    return torch.stack(outputs), state


@all_variants
def test_reference_is_the_formula(family: str, gate: str | None) -> None:
    inputs = make_inputs(family, gate, (2, 9, 2, 6, 5))
    output, state = OPS[family](**inputs, scale=0.3, backend="reference")
    for b in range(2):
        for h in range(2):
            one = {n: x[h] if x.ndim < 3 else x[b, :, h] for n, x in inputs.items() if n != "initial_state"}
            if family == "delta_product":
                one |= {n: inputs[n][b, :, :, h] for n in ("k", "v", "beta")}
            one["initial_state"] = inputs["initial_state"][b, h]
            expected_output, expected_state = naive(**one, scale=0.3)
            assert_close(output[b, :, h], expected_output, FP32)
            assert_close(state[b, h], expected_state, FP32)


@all_variants
@pytest.mark.parametrize("batch", [1, 3])
def test_chunk_matches_reference(family: str, gate: str | None, batch: int) -> None:
    for length in LENGTHS:
        for with_state in (False, True):
            inputs = make_inputs(family, gate, (batch, length, 2, 24, 16), with_state=with_state, seed=length)
            expected = run(OPS[family], inputs, backend="reference")
            compare(run(OPS[family], inputs, backend="chunk"), expected, (length, with_state))


@all_variants
@pytest.mark.parametrize("backend", ["reference", "chunk"])
def test_packed_documents_match_separate_ones(family: str, gate: str | None, backend: str) -> None:
    documents = list(pairwise(OFFSETS))
    inputs = make_inputs(family, gate, (1, OFFSETS[-1], 2, 12, 16), sequences=len(documents))

    def separate(**whole: Tensor) -> tuple[Tensor, Tensor]:
        outputs, states = [], []
        for n, (start, end) in enumerate(documents):
            state = whole["initial_state"][n : n + 1]
            if end > start:
                document = tokens(whole, start, end) | {"initial_state": state}
                output, state = OPS[family](**document, backend="reference")
                outputs.append(output)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    expected = run(separate, inputs)
    compare(run(OPS[family], inputs, cu_seqlens=torch.tensor(OFFSETS), backend=backend), expected, (family, gate))
    stateless = {name: x for name, x in inputs.items() if name != "initial_state"}
    zeros = {**inputs, "initial_state": torch.zeros_like(inputs["initial_state"])}
    expected = {name: x for name, x in run(separate, zeros).items() if name != "d initial_state"}
    compare(run(OPS[family], stateless, cu_seqlens=torch.tensor(OFFSETS), backend=backend), expected, (family, gate))


@all_variants
def test_many_tiny_documents(family: str, gate: str | None) -> None:
    offsets = torch.arange(0, 201, 4)
    inputs = make_inputs(family, gate, (1, 200, 1, 8, 8), sequences=len(offsets) - 1)
    expected = run(OPS[family], inputs, cu_seqlens=offsets, backend="reference")
    compare(run(OPS[family], inputs, cu_seqlens=offsets, backend="chunk"), expected, (family, gate))


@all_variants
def test_final_state_continues_the_sequence(family: str, gate: str | None) -> None:
    inputs = make_inputs(family, gate, (2, 150, 2, 16, 8))
    whole, final = OPS[family](**inputs, backend="chunk")
    outputs, state = [], inputs.pop("initial_state")
    for start, end in ((0, 70), (70, 71), (71, 150)):
        output, state = OPS[family](**tokens(inputs, start, end), initial_state=state, backend="chunk")
        outputs.append(output)
    assert_close(torch.cat(outputs, dim=1), whole, FP32)
    assert_close(state, final, FP32)


@all_variants
def test_step_matches_reference_and_updates_in_place(family: str, gate: str | None) -> None:
    inputs = make_inputs(family, gate, (3, 12, 2, 24, 16))
    expected, expected_state = OPS[family](**inputs, backend="reference")
    state = inputs.pop("initial_state")
    with torch.no_grad():
        for t in range(12):
            token = tokens(inputs, t, t + 1)
            output, returned = OPS[family](**token, initial_state=state)
            assert returned is state
            assert_close(output, expected[:, t : t + 1], FP32, f"token {t}")
    assert_close(state, expected_state, FP32)
    before = state.clone()
    OPS[family](**token, initial_state=state)  # with gradients enabled, no state is updated in place
    assert torch.equal(state, before)


@pytest.mark.parametrize(("family", "gate"), [v for v in VARIANTS if v[1] not in (None, "bonus")])
@pytest.mark.parametrize("extreme", ["zero", "-50", "-1e30", "-inf", "mixed"])
def test_extreme_gates(family: str, gate: str, extreme: str) -> None:
    inputs = make_inputs(family, gate, (1, 70, 5, 16, 8))
    if extreme == "mixed":
        set_extreme_gates(inputs)
    else:
        for name in {"g", "gv"} & inputs.keys():
            inputs[name] = torch.full_like(inputs[name], float(extreme.replace("zero", "0")))
    actual, expected = (run(OPS[family], inputs, backend=backend) for backend in ("chunk", "reference"))
    compare(actual, expected, extreme)


@pytest.mark.parametrize("gate", [None, "scalar", "vector"])
@pytest.mark.parametrize("case", ["zeros", "ones", "twos", "mixed", "the same key"])
def test_extreme_betas(gate: str | None, case: str) -> None:
    inputs = make_inputs("delta", gate, (2, 130, 2, 16, 8))
    if case == "the same key":
        inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    beta = inputs["beta"]
    values = {"zeros": 0 * beta, "twos": 2 * torch.ones_like(beta), "mixed": (beta > 0.5).float()}
    inputs["beta"] = values.get(case, torch.ones_like(beta))
    actual, expected = (run(OPS["delta"], inputs, backend=backend) for backend in ("chunk", "reference"))
    compare(actual, expected, case)


@all_variants
def test_bf16_is_computed_in_fp32(family: str, gate: str | None) -> None:
    inputs = make_inputs(family, gate, (2, 70, 2, 16, 8))
    half = {n: x.bfloat16() if n != "initial_state" else x for n, x in inputs.items()}
    output, state = OPS[family](**half, backend="chunk")
    expected, expected_state = OPS[family](**{n: x.float() for n, x in half.items()}, backend="reference")
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close(state, expected_state, FP32)
    assert_close(output, expected.bfloat16(), BF16_SAME)


@all_variants
def test_scale_defaults_to_the_inverse_root_of_k(family: str, gate: str | None) -> None:
    inputs = make_inputs(family, gate, (1, 20, 1, 16, 8))
    for backend in ("reference", "chunk"):
        default = OPS[family](**inputs, backend=backend)
        explicit = OPS[family](**inputs, scale=0.25, backend=backend)
        assert torch.equal(default[0], explicit[0]) and torch.equal(default[1], explicit[1])


def test_wrong_inputs_are_refused() -> None:
    inputs = make_inputs("delta", "scalar", (2, 8, 2, 4, 4))
    delta, decay = delta_family.delta, decay_family.decay
    wrong = [
        ("k", inputs["k"][:, :4], "q and k must both be"),
        ("v", inputs["v"][..., 0], r"v must be \[B, T, H, V\]"),
        ("beta", inputs["beta"][..., None], "beta must be"),
        ("g", inputs["g"].long(), "g must be floating point"),
        ("initial_state", inputs["initial_state"][:1], "initial_state must be float32"),
        ("initial_state", inputs["initial_state"].bfloat16(), "initial_state must be float32"),
        ("backend", "cuda", "backend must be one of auto, reference, chunk, gpu"),
        ("backend", "gpu", "needs CUDA tensors"),
        ("cu_seqlens", torch.tensor([0, 8]), "need B = 1, got B = 2"),
    ]
    for name, value, message in wrong:
        with pytest.raises(ValueError, match=message):
            delta(**{**inputs, name: value})
    one = make_inputs("decay", "vector", (1, 8, 2, 4, 4), with_state=False)
    with pytest.raises(ValueError, match="g must be"):
        decay(**{**one, "g": one["g"][..., :3]})
    for offsets in ([0, 7], [1, 8], [0, 5, 3, 8]):
        with pytest.raises(ValueError, match="must rise from 0 to T = 8"):
            decay(**one, cu_seqlens=torch.tensor(offsets))
    with pytest.raises(ValueError, match="int64"):
        decay(**one, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))


@pytest.mark.skipif(has_fla(), reason="flash-linear-attention is installed")
@pytest.mark.parametrize("family", ["decay", "delta"])
def test_missing_kernels_are_named(family: str) -> None:
    inputs = {n: x.bfloat16() for n, x in make_inputs(family, None, (1, 8, 1, 4, 4), with_state=False).items()}
    module = {"decay": decay_family, "delta": delta_family}[family].fla
    gates: dict[str, None] = {"g": None} | ({"gv": None, "bonus": None} if family == "decay" else {})
    with pytest.raises(ImportError, match="fla-core"):
        getattr(module, family)(**inputs, **gates, scale=1.0, initial_state=None, cu_seqlens=None)
