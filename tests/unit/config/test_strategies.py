"""Tests of the names of sequence strategies: the configuration has plain strings, which YAML can write."""

from dataclasses import fields

import pytest

from linear_moe.config.schema import ParallelConfig
from linear_moe.config.strategies import AttentionStrategy, SequenceLayout, StateExchangeStrategy


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("sequence_layout", SequenceLayout),
        ("sequence_exchange", StateExchangeStrategy),
        ("sequence_attention", AttentionStrategy),
    ],
)
def test_options_are_plain_strings(name, members):
    (option,) = (field for field in fields(ParallelConfig) if field.name == name)
    assert option.metadata["choices"] == tuple(members)
    assert {type(value) for value in (option.default, *option.metadata["choices"])} == {str}
