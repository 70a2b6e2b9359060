"""Every field of every mixer's config has an effect, or is refused where it would have none."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.modeling.host import Host
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.options.errors import ConfigError
from tests.unit.modeling.mixers.common import build, dims, stream, variants


class AddsLosses(Host):
    """Host that adds auxiliary losses to their carrier, so that outputs depend on them."""

    def auxiliary_loss(self, carrier: Tensor, name: str, value: Tensor, coefficient: float, tokens: int) -> Tensor:
        return carrier + coefficient * value


def behaviour(name: str, options: dict[str, Any]) -> dict[str, Tensor] | None:
    """Initial parameters, by name, and output of the mixer with these options as the second of two layers.

    Returns None if the mixer cannot have these options.
    """
    try:
        mixer = build(name, options, AddsLosses(), replace(dims(), layer=1))
    except ConfigError:
        return None
    return dict(mixer.named_parameters()) | {"output": mixer(stream(2, 20), TokenLayout(2, 20))}


def same(a: dict[str, Tensor], b: dict[str, Tensor] | None) -> bool:
    return (
        b is not None
        and a.keys() == b.keys()
        and all(a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a)
    )


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_field_does_something(name: str) -> None:
    """Every field changes the mixer of at least one tested config, so that no option is untested or unused."""
    inert = {field.name for field in fields(mixer_class(name).Config)} - {"type"}
    for options in variants(name):
        full = behaviour(name, options)
        assert full is not None
        for field in sorted(inert & options.keys()):
            if not same(full, behaviour(name, {key: value for key, value in options.items() if key != field})):
                inert.remove(field)
    assert not inert
