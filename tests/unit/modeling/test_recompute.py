"""Recomputation changes nothing but memory: gradients of every mixer's layers, and what autograd keeps, by module."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from linear_moe.checks.validate import validate
from linear_moe.config.schema import Config
from linear_moe.layout.recompute import recomputed
from linear_moe.modeling.activations import MODULES, Activations, _Remade, _Transients
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.ops.fused import linear_cross_entropy
from linear_moe.modeling.ops.kernels import stand_ins
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.options.errors import ConfigError
from linear_moe.options.load import from_dict
from linear_moe.plan.activations import layer_elements
from tests.unit.modeling.mixers.common import case_ids, cases

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
    """Computes the loss, and the gradients of all parameters by name."""
    tokens = torch.randint(VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    loss = built(tokens[:, :-1], TokenLayout(rows, length), labels=tokens[:, 1:])
    weight = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1))
    named = dict(built.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    values = torch.autograd.grad((loss * weight).sum(), list(trained.values()), materialize_grads=True)
    return {"loss": loss.detach()} | dict(zip(trained, values, strict=True))


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


def listed(modules: Collection[str]) -> str:
    """Name of a test's case, which must not depend on the order of a set in this process."""
    return ",".join(sorted(modules))


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("modules", [*({name} for name in MODULES), {"layer", "logits"}, ALL], ids=listed)
def test_every_module(modules: set[str], tie: bool) -> None:
    built = model(HYBRID | {"tie_embeddings": tie})
    expected = gradients(built)
    for layers in (None, {0, 2}):
        built.host.activations = Activations(modules, layers)
        assert_equal(gradients(built), expected, exact="logits" not in modules)


def kept_per_token(built: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> float:
    """Elements in fp32 that autograd keeps per token; for a transient, the tensors from which it is computed again."""
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
        with stand_ins(), saved_tensors_hooks(keep, lambda t: t):
            loss = built(tokens, TokenLayout(2, length), labels=tokens)
        total.append(sum(storage.nbytes() for address, storage in saved.items() if address not in weights))
        saved.clear()
        del loss
    monkeypatch.undo()
    return (total[1] - total[0]) / 4 / 128


CHOICES = [*({name} for name in MODULES if name != "logits"), {"layer"}, {"norm", "mixer"}, PARTS, ALL]


@pytest.mark.parametrize("ffn", ["moe", "dense"])
@pytest.mark.parametrize("modules", CHOICES, ids=listed)
def test_kept_as_planned(modules: set[str], ffn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd keeps as much as `plan` estimates, which assumes kernels that keep no more than their inputs."""
    moe = MOE | {"expert_ffn_size": 64, "shared_ffn_size": 32}
    sizes = BASE | {"hidden_size": 64, "ffn_size": 128, "ffn": ffn, "pattern": "NN", "moe": moe}
    built = model(sizes)
    config = from_dict(Config, {"model": sizes, "training": {"dtype": "fp32"}})

    built.host.activations = Activations(modules)
    layers = LanguageModel(config.model, VOCAB, Host(torch.float32, "meta")).layers.values()
    planned = sum(layer_elements(config, layer, 64.0, frozenset(modules))[0] for layer in layers)
    outside = 64 + 64 + 2 + 1  # the inputs of the last norm and of the head, label and normaliser
    assert kept_per_token(built, monkeypatch) - outside == pytest.approx(planned, abs=80)  # of 2000


def test_choices_and_counts_are_made_once() -> None:
    """Recomputed tokens go to the same experts as before, even if the router would now send them elsewhere."""
    built = model(BASE, Activations({"ffn"}))
    counted: list[bool] = []
    built.host.observe_routing = lambda *_: counted.append(built.host.activations.again)  # type: ignore[method-assign]
    expected = gradients(built)
    assert counted == [False, False, True, True]
    tokens = torch.randint(VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))
    loss = built(tokens[:, :-1], TokenLayout(2, 9), labels=tokens[:, 1:])
    for layer in built.layers.values():
        # The new bias stands for a change by the training loop between the forward and the backward pass.
        layer.ffn.router.expert_bias = torch.tensor([0.0, 9.0, 0.0, 9.0])
    weight = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1))
    names = [name for name in expected if name != "loss"]
    parameters = dict(built.named_parameters())
    values = torch.autograd.grad((loss * weight).sum(), [parameters[n] for n in names], materialize_grads=True)
    assert_equal(dict(zip(names, values, strict=True)), {n: expected[n] for n in names}, exact=True)


def test_nothing_outlives_the_backward_pass() -> None:
    for modules in (PARTS, {"layer"}, {"mixer", "ffn", "norm"}):
        built = model(HYBRID, Activations(modules))
        x = torch.randn(18, 32, requires_grad=True)
        y, layout = x * 1, TokenLayout(2, 9)
        gone = []
        for index, layer in built.layers.items():
            y = built.host.activations.layer(int(index), layer, y, layout)
            gone.append(weakref.ref(y))
        gc.disable()
        try:
            y.sum().backward()
            del y
            assert all(ref() is None for ref in gone)
        finally:
            gc.enable()


class Largest(TorchDispatchMode):
    """Mode that records the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "BLOCK_ROWS", 128)
    monkeypatch.setattr(linear_cross_entropy, "BLOCK_ELEMENTS", 128 * 100)
    x, weight = torch.randn(100, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    labels = torch.randint(1000, (100,))
    with Largest() as largest:
        linear_cross_entropy.linear_cross_entropy(x, weight, labels).sum().backward()
    assert largest.elements == 128 * 100


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"recompute": "selective"}, "names nothing"),
        ({"recompute": "selective", "recompute_modules": ["mixers"]}, "did you mean 'mixer'"),
        ({"recompute_modules": ["mixer"]}, "set training.recompute=selective"),
        ({"recompute_layers": 1}, "set recompute"),
        ({"recompute": "full", "recompute_modules": ["norm", "logits"]}, r"\['norm'\]: whole layers"),
        ({"recompute": "full", "recompute_layers": 5}, "nearest valid: 4"),
    ],
)
def test_refused(training: dict[str, Any], message: str) -> None:
    config = from_dict(Config, {"training": training, "data": {"tokenizer": {"type": "bytes"}}})
    with pytest.raises(ConfigError, match=message):
        validate(config, 1, files=False)


def test_layers_are_spread() -> None:
    def layers(total: int, number: int | None) -> list[int]:
        training = {"recompute": "full", "recompute_layers": number}
        config = from_dict(Config, {"model": {"num_layers": total}, "training": training})
        return sorted(recomputed(config)[1])

    assert layers(12, None) == [*range(12)]
    assert layers(12, 4) == [0, 3, 6, 9]
    assert layers(12, 5) == [0, 2, 4, 7, 9]
    assert layers(7, 7) == [*range(7)]
