"""Decoding state: what a model remembers of the tokens it has seen, whatever its mixers are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.tokens import Cache, TokenLayout


class DecodingState:
    """Recurrent states, convolution tails and key-value caches of a batch of sequences.

    Attributes:
        layers: tensors per layer by name, batch first; the mixers update them in place.
        positions: `[B]` int64, tokens each row has seen: position and key-value slot of its next token.
        length: host integer no row's position exceeds.
        capacity: tokens per row that the key-value caches have room for; grows by itself.
    """

    def __init__(self, layers: list[Cache], positions: Tensor, length: int, capacity: int):
        self.layers, self.positions, self.length, self.capacity = layers, positions, length, capacity

    @classmethod
    def empty(cls, model: LanguageModel, batch: int, capacity: int) -> DecodingState:
        """State of `batch` rows that have seen nothing, with room for `capacity` tokens each."""
        positions = torch.zeros(batch, dtype=torch.int64, device=next(model.parameters()).device)
        return cls(model.init_caches(batch, capacity), positions, 0, capacity)

    @classmethod
    def stack(cls, states: Sequence[DecodingState]) -> DecodingState:
        """Rows of all `states` (of one model, equal capacity) as one batch."""
        if len({s.capacity for s in states}) != 1:
            raise ValueError(f"states of different capacity: {[s.capacity for s in states]}")
        layers = [
            {name: torch.cat([layer[name] for layer in group]) for name in group[0]}
            for group in zip(*(s.layers for s in states), strict=True)
        ]
        return cls(layers, torch.cat([s.positions for s in states]), max(s.length for s in states), states[0].capacity)

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows: `rows [B']` int64 indices."""
        self.layers = [{name: t.index_select(0, rows) for name, t in layer.items()} for layer in self.layers]
        self.positions = self.positions.index_select(0, rows)

    def bytes_per_sequence(self) -> int:
        """Bytes one row's state takes at its present capacity."""
        return sum(t.nbytes for layer in self.layers for t in layer.values()) // len(self.positions)

    def reserve(self, model: LanguageModel, length: int) -> None:
        """Make room for `length` tokens per row, at least doubling, so that growth costs O(1) per token."""
        if length <= self.capacity:
            return
        self.capacity = max(length, 2 * self.capacity)
        grown = model.init_caches(len(self.positions), self.capacity)
        for old, new in zip(self.layers, grown, strict=True):
            for name, tensor in old.items():
                new[name][tuple(slice(n) for n in tensor.shape)] = tensor
        self.layers = grown

    def advance(self, model: LanguageModel, tokens: Tensor, keep: int = 0) -> Tensor:
        """Feed the next tokens of every row, `[B, T]` int64; returns logits `[B, T, V]` (of the last `keep` if > 0)."""
        batch, length = tokens.shape
        self.reserve(model, self.length + length)
        positions = self.positions[:, None] + torch.arange(length, device=tokens.device)
        logits = model(tokens, TokenLayout(batch, length, positions=positions), caches=self.layers, keep=keep)
        self.positions, self.length = self.positions + length, self.length + length
        return logits


def prefill(model: LanguageModel, rows: Sequence[Tensor], room: int) -> tuple[Tensor, DecodingState]:
    """Feed prompts of any lengths, `[T_i]` int64 each, in one chunked pass per prompt (one for all if equally long).

    Args:
        model: a whole model.
        rows: the prompts, at least one token each.
        room: tokens that will follow, to size the key-value caches once.

    Returns:
        logits `[B, V]` after each prompt's last token, and the state of all rows.
    """
    lengths = [len(row) for row in rows]
    groups = [torch.stack(list(rows))] if len(set(lengths)) == 1 else [row[None] for row in rows]
    logits, states = [], []
    for tokens in groups:
        state = DecodingState.empty(model, len(tokens), max(lengths) + room)
        logits.append(state.advance(model, tokens, keep=1)[:, 0])
        states.append(state)
    return torch.cat(logits), states[0] if len(states) == 1 else DecodingState.stack(states)
