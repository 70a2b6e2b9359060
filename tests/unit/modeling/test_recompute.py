"""Recomputation changes nothing but memory: gradients of every mixer's layers, and what autograd keeps, by module."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from linear_moe.config.errors import ConfigError
from linear_moe.config.load import from_dict
from linear_moe.config.schema import Config, ModelConfig
from linear_moe.config.validate import recomputed, validate
from linear_moe.modeling.activations import MODULES, Activations, _Remade, _Transients
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.mixers.base import Layout
from linear_moe.modeling.model import LanguageModel
from tests.unit.mixers.common import case_ids, cases

VOCAB = 64
ALL = frozenset(MODULES)
PARTS = ALL - {"mixer", "ffn", "logits"}
MOE = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16, "shared_ffn_size": 16}
BASE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "pattern": "LL", "ffn_size": 64, "moe": MOE}


def model(config: dict[str, Any], activations: Activations | None = None) -> LanguageModel:
    host = Host(torch.float32, activations=activations)
    built = LanguageModel(from_dict(ModelConfig, BASE | config), VOCAB, host)
    initialize(built, host, 0)
    return built


def gradients(built: LanguageModel, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Loss and gradients, by name."""
    tokens = torch.randint(VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    loss = built(tokens[:, :-1], Layout(rows, length), labels=tokens[:, 1:])
    weight = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1))
    named = dict(built.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    found = torch.autograd.grad((loss * weight).sum(), list(trained.values()), materialize_grads=True)
    return {"loss": loss.detach()} | dict(zip(trained, found, strict=True))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], exact: bool) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-7)
        assert same(actual[name], value), name


@pytest.mark.parametrize(("name", "fields"), cases(), ids=case_ids())
def test_every_mixer(name: str, fields: dict[str, Any]) -> None:
    built = model({"mixer": {"type": name, **fields}})
    expected = gradients(built)
    for modules in (frozenset({"layer"}), PARTS, ALL - {"logits"}):
        built.host.activations = Activations(modules)
        assert_equal(gradients(built), expected, exact=True)


HYBRID = {"num_layers": 4, "pattern": "LNLD", "symbols": {"D": {"ffn": "dense"}}}


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("modules", [*({name} for name in MODULES), {"layer", "logits"}, ALL], ids=",".join)
def test_every_module(modules: set[str], tie: bool) -> None:
    built = model(HYBRID | {"tie_embeddings": tie})
    expected = gradients(built)
    for layers in (None, {0, 2}):
        built.host.activations = Activations(modules, layers)
        assert_equal(gradients(built), expected, exact="logits" not in modules)


def kept_per_token(built: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> float:
    """Elements that autograd keeps of a token in fp32, and in place of transients, what they are made of."""
    saved: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice
    pack = _Transients.pack

    def keep(x: Any) -> Any:
        if isinstance(x, Tensor):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
        elif isinstance(x, _Remade):
            [keep(a) for a in x.args]
        return x

    def keep_packed(self: _Transients, t: Tensor) -> Any:
        packed = pack(self, t)
        keep(packed[0] if isinstance(packed, tuple) else packed)
        return packed

    weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
    monkeypatch.setattr(_Transients, "pack", keep_packed)
    total = []
    for length in (64, 128):
        tokens = torch.randint(VOCAB, (2, length))
        with saved_tensors_hooks(keep, lambda t: t):
            loss = built(tokens, Layout(2, length), labels=tokens)
        total.append(sum(storage.nbytes() for address, storage in saved.items() if address not in weights))
        saved.clear()
        del loss
    monkeypatch.undo()
    return (total[1] - total[0]) / 4 / 128


@pytest.mark.parametrize("ffn", ["moe", "dense"])
@pytest.mark.parametrize("modules", [*({n} for n in MODULES if n != "logits"), {"layer"}, {"norm", "mixer"}, PARTS, ALL], ids=",".join)
def test_kept_as_planned(modules: set[str], ffn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps less of is what `plan` says."""
    from linear_moe.plan import layer_activation_elements
    sizes = {"hidden_size": 64, "ffn_size": 128, "ffn": ffn, "pattern": "NN", "moe": MOE | {"expert_ffn_size": 64, "shared_ffn_size": 32}}
    built = model(sizes)
    config = from_dict(Config, {"model": BASE | sizes, "training": {"dtype": "fp32"}})
    everything = kept_per_token(built, monkeypatch)
    built.host.activations = Activations(modules)
    print(modules, ffn, "kept", everything, kept_per_token(built, monkeypatch), "plan", [2*layer_activation_elements(config, l, 64., frozenset(m))[0] for l in [built.layers["0"]] for m in ((), modules)])
