"""Names of the ways of sharing out sequences over ranks.

The configuration holds them as plain strings, which YAML and JSON can write; code compares with the members, which
equal their strings.
"""

from __future__ import annotations

from enum import StrEnum


class SequenceLayout(StrEnum):
    """Orders in which ranks hold the pieces of a sequence: values of `parallel.sequence_layout`."""

    CONTIGUOUS = "contiguous"
    ZIGZAG = "zigzag"


class StateExchangeStrategy(StrEnum):
    """Ways by which recurrent states travel between ranks: values of `parallel.sequence_exchange`."""

    ALL_GATHER = "all_gather"
    RING = "ring"


class AttentionStrategy(StrEnum):
    """Ways by which softmax attention sees other ranks' tokens: values of `parallel.sequence_attention`."""

    ALL_GATHER = "all_gather"
    RING = "ring"
    ULYSSES = "ulysses"


def values(names: type[StrEnum]) -> tuple[str, ...]:
    """The values of all members, in order, as plain strings."""
    return tuple(name.value for name in names)
