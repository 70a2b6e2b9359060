"""Every field of every mixer's config does something, and says so where it would not."""

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
    """Outputs show the auxiliary losses."""

    def auxiliary_loss(self, carrier: Tensor, name: str, value: Tensor, coefficient: float, tokens: int) -> Tensor:
        return carrier + coefficient * value


def behaviour(name: str, options: dict[str, Any]) -> dict[str, Tensor] | None:
    """Of the mixer with these options, second of two layers: its initial parameters, by name, and its output.

    None if it cannot have them.
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
    """Some tested config, with the field back at its default, is another mixer: no option goes untested or unused."""
    inert = {field.name for field in fields(mixer_class(name).Config)} - {"type"}
    for options in variants(name):
        full = behaviour(name, options)
        assert full is not None
        for field in sorted(inert & options.keys()):
            if not same(full, behaviour(name, {key: value for key, value in options.items() if key != field})):
                inert.remove(field)
    assert not inert
