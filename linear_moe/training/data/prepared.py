"""Tokenized data that is ready to train on, and its division into a train and a validation split."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from linear_moe.config.schema import DataConfig
from linear_moe.training.data.tokenizer import copy_tokenizer

FORMAT = 2  # part of every key: to be raised when the same corpus and tokenizer would give other files
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class PreparedData:
    """Tokenized data that exists on disk and has been verified.

    Attributes:
        train_prefix, validation_prefix: prefixes of indexed datasets; None: synthetic data, or nothing is held out.
        tokenizer_folder: folder of the Hugging Face tokenizer; None: synthetic data.
        vocab_size: number of token ids; all ids are below it.
        eod_id: id of the token that ends every document.
        fingerprint: identifies corpus, tokenizer and split: data with equal fingerprints has equal tokens.
        cache: folder of the sample orders.
        tokens: number of tokens of each split.
        held_out: if both prefixes are one dataset, the share of its documents in the validation split.
        summary: counts of documents, tokens and bytes, for people and `--json`.
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
        """Numbers, int32, of the sequences (documents) of a dataset of `total` that belong to the split."""
        return split_sequences(total, self.held_out, split)

    def save_tokenizer(self, folder: str | Path) -> None:
        """Copies the tokenizer to `folder`, whole or not at all; synthetic data has none to copy.

        Raises:
            ConfigError: `folder` already holds another tokenizer, whose ids mean other text to a trained model.
        """
        if self.tokenizer_folder is not None:
            copy_tokenizer(
                Path(self.tokenizer_folder), Path(folder), "the one that data.corpus and data.tokenizer give"
            )


def split_sequences(total: int, held_out: float, split: str) -> np.ndarray:
    """Numbers, int32, of those of `total` sequences that belong to a split.

    The share `held_out` of the sequences, chosen by a hash of their number, is the validation split.
    """
    numbers = np.arange(total, dtype=np.uint64)
    if held_out == 0:
        return numbers.astype(np.int32)
    # splitmix64's finaliser (Steele, Lea & Flood 2014): a fixed hash of the number
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    chosen = (mixed ^ (mixed >> np.uint64(31))) < np.uint64(int(held_out * 2**64))
    return np.flatnonzero(chosen if split == "validation" else ~chosen).astype(np.int32)


def data_key(data: DataConfig, source: str, tokenizer: dict[str, Any]) -> str:
    """Key of prepared data: a hash of everything that its tokens depend on, its corpus as `source`."""
    parts = {
        "format": FORMAT,
        "source": source,
        "tokenizer": tokenizer,
        "validation_fraction": data.validation_fraction,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
