"""Data that is ready to train on, and the parts it is split into."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from linear_moe.training.data.tokenizer import copy_tokenizer


@dataclass(frozen=True)
class PreparedData:
    """Tokenized data that is there and has been verified.

    Attributes:
        train_prefix, validation_prefix: of indexed datasets; None: synthetic data, or nothing held out.
        tokenizer_folder: Hugging Face tokenizer; None: synthetic data.
        vocab_size: ids are below it.
        eod_id: the id that ends every document.
        fingerprint: names corpus, tokenizer and split: the same fingerprint, the same tokens.
        cache: where the sample orders are kept.
        tokens: in each split.
        held_out: where both prefixes are the same, the share of its documents that validate.
        summary: counts of what was prepared, for people and `--json`.
    """

    train_prefix: str | None
    validation_prefix: str | None
    tokenizer_folder: str | None
    vocab_size: int
    eod_id: int
    fingerprint: str
    cache: str
    tokens: dict[str, int] = field(default_factory=dict)
    held_out: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def synthetic(self) -> bool:
        return self.train_prefix is None

    @property
    def has_validation(self) -> bool:
        """Whether anything is held out (data.validation_fraction > 0)."""
        return self.synthetic or self.validation_prefix is not None

    def prefix(self, split: str) -> str | None:
        return self.train_prefix if split == "train" else self.validation_prefix

    def sequences(self, split: str, total: int) -> np.ndarray:
        """Which of a prefix's `total` sequences (documents) belong to the split, int32."""
        return split_sequences(total, self.held_out, split)

    def save_tokenizer(self, folder: str | Path) -> None:
        """Copies the tokenizer to `folder`, whole or not at all; synthetic data has none to copy.

        Raises ConfigError where `folder` already holds another tokenizer: what was trained with it means other ids.
        """
        if self.tokenizer_folder is not None:
            copy_tokenizer(
                Path(self.tokenizer_folder), Path(folder), "the one that data.corpus and data.tokenizer give"
            )


def split_sequences(total: int, held_out: float, split: str) -> np.ndarray:
    """Which of `total` sequences belong to a split when a share is held out by hash of their number; int32."""
    numbers = np.arange(total, dtype=np.uint64)
    if held_out == 0:
        return numbers.astype(np.int32)
    # splitmix64's finaliser (Steele, Lea & Flood 2014): a fixed hash of the number
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    chosen = (mixed ^ (mixed >> np.uint64(31))) < np.uint64(int(held_out * 2**64))
    return np.flatnonzero(chosen if split == "validation" else ~chosen).astype(np.int32)
