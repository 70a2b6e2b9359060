"""Decoding state of a whole model: recurrent states, convolution tails and key-value caches of all its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.tokens import Cache, TokenLayout


class DecodingState:
    """Recurrent states, convolution tails and key-value caches of a batch of sequences.

    Attributes:
        layers: for each layer its tensors by name, batch first; the mixers update them in place.
        positions: `[B]` int64, tokens that each row has seen; also position and key-value slot of the row's next token.
        length: upper bound of all `positions`, kept as a Python integer so that the host need not wait for the device.
        capacity: tokens per row for which the key-value caches have room; `reserve` enlarges it.
    """

    def __init__(self, layers: list[Cache], positions: Tensor, length: int, capacity: int):
        self.layers, self.positions, self.length, self.capacity = layers, positions, length, capacity

    @classmethod
    def empty(cls, model: LanguageModel, batch: int, capacity: int) -> DecodingState:
        """Makes the state of `batch` rows that have seen no token, with room for `capacity` tokens each."""
        positions = torch.zeros(batch, dtype=torch.int64, device=next(model.parameters()).device)
        return cls(model.init_caches(batch, capacity), positions, 0, capacity)

    @classmethod
    def stack(cls, states: Sequence[DecodingState]) -> DecodingState:
        """Joins the rows of all `states` into one batch; ValueError unless the states have equal capacity."""
        if len({s.capacity for s in states}) != 1:
            raise ValueError(f"states of different capacity: {[s.capacity for s in states]}")
        layers = [
            {name: torch.cat([layer[name] for layer in group]) for name in group[0]}
            for group in zip(*(s.layers for s in states), strict=True)
        ]
        return cls(layers, torch.cat([s.positions for s in states]), max(s.length for s in states), states[0].capacity)

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows by their indices `rows [B']` int64."""
        self.layers = [{name: t.index_select(0, rows) for name, t in layer.items()} for layer in self.layers]
        self.positions = self.positions.index_select(0, rows)

    def bytes_per_sequence(self) -> int:
        """Bytes of the state of one row at the present capacity."""
        return sum(t.nbytes for layer in self.layers for t in layer.values()) // len(self.positions)

    def reserve(self, model: LanguageModel, length: int) -> None:
        """Makes room for `length` tokens per row; capacity at least doubles, so that growth costs O(1) per token."""
        if length <= self.capacity:
            return
        self.capacity = max(length, 2 * self.capacity)
        grown = model.init_caches(len(self.positions), self.capacity)
        for old, new in zip(self.layers, grown, strict=True):
            for name, tensor in old.items():
                new[name][tuple(slice(n) for n in tensor.shape)] = tensor
        self.layers = grown

    def advance(self, model: LanguageModel, tokens: Tensor, keep: int = 0) -> Tensor:
        """Feeds the next tokens `[B, T]` int64 of every row to the model and updates the state.

        Returns logits `[B, T, V]`; with `keep` > 0 only those of the last `keep` tokens.
        """
        batch, length = tokens.shape
        self.reserve(model, self.length + length)
        positions = self.positions[:, None] + torch.arange(length, device=tokens.device)
        logits = model(tokens, TokenLayout(batch, length, positions=positions), caches=self.layers, keep=keep)
        self.positions, self.length = self.positions + length, self.length + length
        return logits


def prefill(model: LanguageModel, rows: Sequence[Tensor], room: int) -> tuple[Tensor, DecodingState]:
    """Feeds prompts of any lengths to the model, each in one pass; prompts of equal length share one pass.

    Args:
        model: a whole model (all pipeline stages).
        rows: the prompts, `[T_i]` int64 with at least one token each.
        room: number of tokens that will follow a prompt, so that the key-value caches are allocated only once.

    Returns:
        Logits `[B, V]` after the last token of each prompt, and the state of all rows.
    """
    lengths = [len(row) for row in rows]
    groups = [torch.stack(list(rows))] if len(set(lengths)) == 1 else [row[None] for row in rows]
    logits, states = [], []
    for tokens in groups:
        state = DecodingState.empty(model, len(tokens), max(lengths) + room)
        logits.append(state.advance(model, tokens, keep=1)[:, 0])
        states.append(state)
    return torch.cat(logits), states[0] if len(states) == 1 else DecodingState.stack(states)
