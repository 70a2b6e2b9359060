"""Muon equals the paper's equations in fp64, and torch.optim.Muon; and parameters are split into the right matrices."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.checks.validate import validate
from linear_moe.config.schema import Config, MuonConfig
from linear_moe.layout.optimizer import orthogonalized
from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.host import Host, Matrices, ParameterSpec, constant, initialize
from linear_moe.modeling.mixers.registry import MIXERS
from linear_moe.modeling.model import LanguageModel
from linear_moe.options.errors import ConfigError
from linear_moe.options.load import from_dict
from linear_moe.plan import make_plan
from linear_moe.training.optimizer import adamw
from linear_moe.training.optimizer.muon import MatrixPiece, Muon, Share, _missing, newton_schulz
from tests.tolerances import BF16_SAME, FP64, assert_close
from tests.unit.modeling.mixers.common import variants

SHAPES: list[tuple[tuple[int, ...], Matrices]] = [
    ((16, 40), Matrices()),
    ((48, 16), Matrices()),
    ((3, 2, 8, 12), Matrices()),
    ((24, 10), Matrices((2, 4), repeat=4)),
    ((10, 12), Matrices((4, 4, 4), dim=-1)),
]


def paper(weight: Tensor, gradients: list[Tensor], lr: float, decay: float, config: MuonConfig) -> Tensor:
    """Weight after steps with these gradients, by arXiv 2502.16982, eq. 1, 2 and 4, with Nesterov's momentum."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = config.momentum * momentum + gradient
        x = gradient + config.momentum * momentum if config.nesterov else momentum
        x = x / x.square().sum().sqrt()
        for _ in range(config.steps):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        weight = weight - lr * (config.scale * math.sqrt(max(weight.shape)) * x + decay * weight)
    return weight


def logical(x: Tensor, matrices: Matrices) -> list[Tensor]:
    """The matrices of a parameter, collected row by row (or column by column)."""
    if not matrices.sizes:
        return list(x.flatten(0, -3)) if x.dim() > 2 else [x]
    total = sum(matrices.sizes)
    owner = [i for i, size in enumerate(matrices.sizes) for _ in range(size)] * matrices.repeat
    assert len(owner) == total * matrices.repeat == x.shape[matrices.dim]
    return [
        x.index_select(matrices.dim, torch.tensor([n for n, o in enumerate(owner) if o == i]))
        for i in range(len(matrices.sizes))
    ]


def trained(dtype: torch.dtype, config: MuonConfig, steps: int = 3) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Trains parameters of `SHAPES` with random gradients; returns weights before and after, and the gradients."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator, dtype=dtype) for shape, _ in SHAPES]
    before = copy.deepcopy(weights)
    optimizer = Muon(weights, muon=config, dtype=dtype, lr=0.01, weight_decay=0.1)
    shares = {}
    for i, (weight, (shape, matrices)) in enumerate(zip(weights, SHAPES, strict=True)):
        spec = ParameterSpec(shape, constant(0.0), matrices=matrices)
        shares[weight] = Share(str(i), spec, shape, 0, weight.numel())
    optimizer.orthogonalize(shares, None)
    gradients: list[list[Tensor]] = []
    for _ in range(steps):
        gradients.append([torch.randn(w.shape, generator=generator, dtype=dtype) for w in weights])
        for weight, gradient in zip(weights, gradients[-1], strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return before, weights, gradients


@pytest.mark.parametrize("config", [MuonConfig(), MuonConfig(nesterov=False, steps=3, scale=0.5, momentum=0.9)])
def test_equals_the_paper(config: MuonConfig) -> None:
    before, after, gradients = trained(torch.float64, config)
    for i, (shape, matrices) in enumerate(SHAPES):
        starts, ends = logical(before[i], matrices), logical(after[i], matrices)
        steps = [logical(step[i], matrices) for step in gradients]
        for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
            assert_close(end, paper(start, [step[n] for step in steps], 0.01, 0.1, config), FP64, f"{shape}, {n}")


def test_equals_torch() -> None:
    """Muon equals torch.optim.Muon, which orthogonalises in bf16, and whose other scale of momentum has no effect."""
    generator = torch.Generator().manual_seed(2)
    ours = [torch.randn(shape, generator=generator) for shape in ((16, 40), (48, 16))]
    theirs = [torch.nn.Parameter(w.clone()) for w in ours]
    mine = Muon(ours, muon=MuonConfig(), dtype=torch.bfloat16, lr=0.01, weight_decay=0.1)
    spec = ParameterSpec((), constant(0.0), matrices=Matrices())
    mine.orthogonalize({w: Share(str(i), spec, tuple(w.shape), 0, w.numel()) for i, w in enumerate(ours)}, None)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b.data, BF16_SAME)


def test_bf16_momentum_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 momentum, converted to fp32 in parts, is right on average, and each element to a few roundings."""
    monkeypatch.setattr(adamw, "CHUNK", 50)
    weight = torch.zeros(40, 30)
    muon = Muon([weight], muon=MuonConfig(), dtype=torch.float32, moments=torch.bfloat16)
    spec = ParameterSpec((40, 30), constant(0.0), matrices=Matrices())
    muon.orthogonalize({weight: Share("w", spec, (40, 30), 0, weight.numel())}, None)
    generator, momentum = torch.Generator().manual_seed(4), torch.zeros(40, 30)
    for _ in range(3):
        weight.grad = torch.rand(40, 30, generator=generator)
        muon.step()
        momentum = 0.95 * momentum + weight.grad
    rounded = muon.state[weight]["momentum"]
    assert rounded.dtype is torch.bfloat16
    assert ((rounded - momentum) / momentum).abs().max() <= 3 * 2**-7
    assert_close(rounded.double().mean(), momentum.double().mean(), BF16_SAME)


def test_newton_schulz() -> None:
    generator = torch.Generator().manual_seed(3)
    for shape in ((30, 20), (20, 30), (4, 16, 16)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = torch.linalg.svdvals(newton_schulz(x, 5))
        assert values.max() < 1.3
        assert values.median() > 0.65
    assert not newton_schulz(torch.zeros(3, 4)).any()


def test_pieces_complete_matrices() -> None:
    """The exchanged pieces complete all matrices: three ranks' stretches of five matrices of ten elements."""
    ranks = [{"w": (0, 17, 10)}, {"w": (17, 44, 10)}, {"w": (44, 50, 10), "other": (0, 3, 3)}]
    for target in ranks:
        have = set(range(*target["w"][:2]))
        for source in ranks:
            if source is not target:
                for piece in _missing(source, target):
                    assert piece == MatrixPiece("w", piece.start, piece.stop)
                    have |= set(range(piece.start, piece.stop))
        first, last = target["w"][0] // 10, -(-target["w"][1] // 10)
        assert have == set(range(first * 10, last * 10))


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixers_matrices(name: str) -> None:
    """Parameters of every mixer variant, split into matrices and joined, are unchanged, and have the right matrices."""
    for variant in variants(name):
        tree = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "pattern": "L", "mixer": {"type": name, **variant}}
        model = LanguageModel(from_dict(ModelConfig, tree | {"ffn": "dense", "ffn_size": 32}), 64, Host())
        initialize(model, model.host, 1)
        for key, parameter in model.named_parameters():
            spec: ParameterSpec = parameter.spec  # type: ignore[attr-defined]
            if key.startswith(("embedding", "head")):
                assert not orthogonalized(spec)
            if spec.matrices is None:
                assert not key.endswith("o_proj.weight"), key
                continue
            assert spec.decay and not spec.fp32 and parameter.dim() >= 2, key
            parts = spec.matrices.split(parameter)
            assert torch.equal(spec.matrices.join(parts), parameter)
            assert len(parts) == max(1, len(spec.matrices.sizes))
            for part, expected in zip(parts, logical(parameter, spec.matrices), strict=True):
                assert torch.equal(part, expected), key


def test_config_errors_and_plan() -> None:
    model = {"hidden_size": 32, "num_layers": 1, "pattern": "L", "vocab_size": 4096}
    with pytest.raises(ConfigError, match=r"optimizer.muon.steps = 3: does nothing here; set optimizer.type=muon"):
        validate(from_dict(Config, {"model": model, "optimizer": {"muon": {"steps": 3}}}), files=False)
    with pytest.raises(ConfigError, match=r"optimizer\.type = 'moun'.*did you mean 'muon'"):
        from_dict(Config, {"optimizer": {"type": "moun"}})
    with pytest.raises(ConfigError, match=r"optimizer\.moments"):
        from_dict(Config, {"optimizer": {"moments": "fp8"}})
    trees = [{"type": t, "moments": m} for t in ("adamw", "muon") for m in ("fp32", "bf16")]
    states = [
        make_plan(from_dict(Config, {"model": model, "optimizer": tree}), 1).memory["optimizer"] for tree in trees
    ]
    host = Host(torch.bfloat16, "meta")
    parameters = list(LanguageModel(from_dict(ModelConfig, model), 4096, host).parameters())
    copies = sum(4 * p.numel() for p in parameters if p.dtype is torch.bfloat16)
    total = sum(p.numel() for p in parameters)
    linear = sum(p.numel() for p in parameters if orthogonalized(p.spec))  # type: ignore[attr-defined]
    assert states == [copies + 2 * size * total - muon * size * linear for muon in (0, 1) for size in (4, 2)]
