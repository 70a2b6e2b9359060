"""Memory that mixers keep for their backward pass, as `plan` measures it, against real passes and sizes once stated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from linear_moe.modeling.activations import Activations
from linear_moe.modeling.host import Host
from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.mixers.registry import mixer_class, mixer_config
from linear_moe.modeling.ops.kernels import stand_ins, stood_in
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.plan.saved import mixer_saved
from tests.unit.modeling.mixers.common import build, case_ids, cases, dims, variants

STATED = json.loads((Path(__file__).parents[3] / "golden" / "saved.json").read_text())
"""Elements per token that each mixer's file stated before they were measured, in all and only inside its recurrence;
`why`: the reason for which those measured are others."""
HIDDEN, LENGTH = 128, 256
ALIKE = ("attention", "based", "gated_linear_fast_weight", "gateloop", "gla", "gsa", "hgrn", "lightning", "retention")
"""Mixers that by default keep on a CPU in fp32 what they keep on a GPU, as they have no convolution and no norm with a
kernel."""
UNLIKE = ("s4", "window")  # longer chunks on a GPU; a mask of all pairs of tokens on a CPU

every_case = pytest.mark.parametrize(("name", "fields"), cases(), ids=case_ids())


class Half(Host):
    """One of two tensor ranks; computes nothing."""

    def size(self, axis: str) -> int:
        return 2 if axis == "tensor" else 1


def on_meta(name: str, fields: dict[str, Any], at: Any, dtype: torch.dtype, tensor: int = 1) -> Mixer:
    host = (Host if tensor == 1 else Half)(dtype, "meta")
    return mixer_class(name)(mixer_config(name, **fields), at, host)


def kept_bytes(mixer: Mixer, length: int, device: str = "cpu", modules: tuple[str, ...] = ()) -> int:
    """Bytes that a real forward pass of a mixer keeps, besides its input and its parameters."""
    x = torch.randn(length, mixer.dims.hidden_size, dtype=mixer.host.dtype, device=device, requires_grad=True)
    outside = {t.untyped_storage().data_ptr() for t in (x, *mixer.parameters())}
    saved: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    mixer.host.activations = Activations(modules)
    with saved_tensors_hooks(pack, lambda t: t):
        mixer.host.activations.layer(0, mixer, x, TokenLayout(1, length))
    return sum(storage.nbytes() for address, storage in saved.items() if address not in outside)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_real_pass_with_stand_ins_keeps_as_much(name: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    """The meta device and extrapolation from short rows change little, with and without recomputation."""
    real, at = build(name, fields, Host(dtype), dims(HIDDEN)), dims(HIDDEN)
    meta = on_meta(name, fields, at, dtype)
    for modules in ((), ("core",)):
        with stand_ins():
            kept = kept_bytes(real, LENGTH + 128, modules=modules)
        assert mixer_saved(meta, modules).of(LENGTH + 128) == pytest.approx(kept, rel=0.01)


@every_case
def test_pytorch_keeps_as_much(name: str, fields: dict[str, Any]) -> None:
    """Recurrences in fp32 are PyTorch's operations on GPUs too: no stand-in says what they keep."""
    kept = kept_bytes(build(name, fields, Host(torch.float32), dims(HIDDEN)), LENGTH)
    measured = mixer_saved(on_meta(name, fields, dims(HIDDEN), torch.float32)).of(LENGTH)
    alike = name in ALIKE and fields == variants(name)[0]
    padded = any(size % 8 for option, size in fields.items() if option.endswith("head_dim"))  # by FlashAttention
    if not ({name, *fields} & set(UNLIKE) or padded):
        assert (0.999 if alike else 0.7) * kept <= measured <= 1.001 * kept


@pytest.mark.parametrize("row", STATED, ids=lambda row: f"{row['mixer']}-{row['hidden']}-{row['tensor']}")
def test_measured_is_about_what_was_stated(row: dict[str, Any]) -> None:
    at = replace(dims(row["hidden"], row["heads"]), layer=row["layer"])
    mixer = on_meta(row["mixer"], row["fields"], at, torch.bfloat16, row["tensor"])
    elements = mixer_saved(mixer).by_token / 2
    core = elements - mixer_saved(mixer, ("core",)).by_token / 2
    fits = abs(elements - row["all"]) <= 0.15 * row["all"] and abs(core - row["core"]) <= 0.15 * row["all"]
    assert fits == (row["why"] is None), (elements, core)


@every_case
def test_bytes_scale_with_tokens_and_ranks(name: str, fields: dict[str, Any]) -> None:
    full, shard = (mixer_saved(on_meta(name, fields, dims(1024), torch.bfloat16, tensor)) for tensor in (1, 2))
    assert full.by_token > 0
    assert full.fixed >= 0
    assert full.of(3000) - full.of(1000) == pytest.approx(2000 * full.by_token)
    # inputs of a norm over ranks are in fp32 besides, and halves of small heads can be padded
    assert 0.5 * full.by_token <= shard.by_token < full.by_token


def test_mixers_alike_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mixers = [on_meta("gla", {"gate_rank": 17}, replace(dims(HIDDEN), layer=layer), torch.bfloat16) for layer in (1, 1)]
    first = mixer_saved(mixers[0])
    monkeypatch.setattr(mixers[1], "forward", None)
    assert mixer_saved(mixers[1]) is first
    assert not stood_in()
