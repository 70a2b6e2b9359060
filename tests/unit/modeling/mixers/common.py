"""Small mixers for tests."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class, mixer_config
from linear_moe.modeling.tokens import TokenLayout


def variants(name: str) -> list[dict[str, Any]]:
    """Configs that exercise a mixer's options: `VARIANTS` of `test_NAME.py`, or the defaults if there is no such file.

    All configs must split over 2 ranks at the sizes of `dims`.
    """
    module = f"tests.unit.modeling.mixers.test_{name}"
    return importlib.import_module(module).VARIANTS if importlib.util.find_spec(module) else [{}]


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Every mixer of the registry with every config that it is tested with."""
    return [(name, fields) for name in sorted(MIXERS) for fields in variants(name)]


def case_ids() -> list[str]:
    return [f"{name}-{i}" for name in sorted(MIXERS) for i in range(len(variants(name)))]


def dims(hidden: int = 32, heads: int = 4) -> Dims:
    # Large weights: gates, norms and softmax leave their linear ranges. A large epsilon: a document's first output is
    # (q k) v; where q k happens to be near 0, the gradient through a norm with a small one is lost in rounding.
    return Dims(hidden, heads, num_layers=2, layer=0, norm_eps=1e-2, init_std=0.15, output_init_std=0.2)


def build(
    name: str, fields: dict[str, Any], host: Host | None = None, at: Dims | None = None, tensor: int = 1
) -> Mixer:
    """Builds a validated, initialised mixer."""
    host, at = host or Host(), at or dims()
    cls, config = mixer_class(name), mixer_config(name, **fields)
    cls.validate(config, at, tensor, "model.mixer")
    mixer = cls(config, at, host)
    initialize(mixer, host, seed=1)
    return mixer


def stream(batch: int, length: int, hidden: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch * length, hidden, generator=torch.Generator().manual_seed(seed))


def packed(lengths: list[int]) -> TokenLayout:
    """Layout of documents of these lengths, packed into one row."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    return TokenLayout(1, sum(lengths), offsets, max(lengths), positions)
