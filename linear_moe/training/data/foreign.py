"""Indexed datasets that were made elsewhere: found, checked against their tokenizer, and used where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from linear_moe.config.schema import DataConfig, TokenizerConfig
from linear_moe.options.errors import ConfigError
from linear_moe.training.data import indexed
from linear_moe.training.data.corpus import STDLIB
from linear_moe.training.data.prepared import SPLITS, PreparedData, data_key, split_sequences
from linear_moe.training.data.tokenizer import load_tokenizer, tokenizer_key, vocabulary_size

BROKEN_INDEX = "make the dataset again, or give another corpus"  # the `fix` for a dataset that was not prepared here


def dataset_prefix(data: DataConfig) -> str | None:
    """The absolute prefix of the indexed dataset that `data.corpus` names; None: the corpus is text."""
    path = Path(data.corpus).expanduser()
    if path.suffix in (".bin", ".idx") and path.is_file():
        fix = f"give {path.with_suffix('')}"
        raise ConfigError("data.corpus", data.corpus, "is one half of an indexed dataset", fix=fix)
    prefix = str(path.resolve())
    return prefix if data.corpus != STDLIB and not path.exists() and indexed.exists(prefix) else None


def check_foreign(data: DataConfig, prefix: str) -> None:
    """Raises ConfigError for an indexed dataset without tokenizer or tokens, or with a corrupt index."""
    if data.tokenizer.type != "hf" and not (Path(prefix).parent / "tokenizer").is_dir():
        raise ConfigError(
            "data.tokenizer.type",
            data.tokenizer.type,
            "an indexed dataset needs the tokenizer it was made with",
            fix="set data.tokenizer.type=hf and data.tokenizer.path",
        )
    if not indexed.read_index(prefix, BROKEN_INDEX).tokens:
        raise ConfigError("data.corpus", data.corpus, "holds no tokens: all its sequences are empty", fix=BROKEN_INDEX)


def open_foreign(data: DataConfig, prefix: str, cache: Path) -> PreparedData:
    """The data of an indexed dataset that was not prepared here. Documents are held out by a hash of their number.

    Raises:
        ConfigError: the index is corrupt, or the dataset was made with another tokenizer or without end-of-document
            tokens.
    """
    index = indexed.read_index(prefix, BROKEN_INDEX)
    given = data.tokenizer.path if data.tokenizer.type == "hf" else None
    folder = str(Path(given).resolve() if given else Path(prefix).parent / "tokenizer")
    tokenizer = load_tokenizer(folder, "data.tokenizer.path")
    vocab_size, eod = vocabulary_size(tokenizer), tokenizer.eos_token_id
    assert isinstance(eod, int)
    start = np.fromfile(prefix + ".bin", dtype=index.dtype, count=1 << 22)
    if start.min() < 0 or start.max() >= vocab_size:
        raise ConfigError(
            "data.corpus",
            data.corpus,
            f"holds token {start.max()}, but the tokenizer has {vocab_size} tokens",
            fix="give the tokenizer that the dataset was made with",
        )
    ends = np.cumsum(index.lengths[:64], dtype=np.int64)
    ends = ends[ends <= len(start)]
    if data.isolate_documents and len(ends) and not (start[ends - 1] == eod).any():
        raise ConfigError(
            "data.isolate_documents",
            True,
            f"the dataset's documents do not end with token {eod}",
            fix="make the dataset again with an end-of-document token",
        )
    key = data_key(data, str(indexed.fingerprint(prefix)), tokenizer_key(TokenizerConfig(type="hf", path=folder)))
    held = {split: split_sequences(len(index.lengths), data.validation_fraction, split) for split in SPLITS}
    tokens = {split: int(index.lengths[numbers].sum(dtype=np.int64)) for split, numbers in held.items()}
    if not data.validation_fraction:
        del tokens["validation"]
    return PreparedData(
        train_prefix=prefix,
        validation_prefix=prefix if data.validation_fraction else None,
        tokenizer_folder=folder,
        vocab_size=vocab_size,
        eod_id=eod,
        fingerprint=key,
        cache=str(cache.resolve() / f"{key}-order"),
        tokens=tokens,
        held_out=data.validation_fraction,
        summary={"corpus": data.corpus, "tokenizer": folder, "vocab_size": vocab_size, "eod_id": eod}
        | {split: {"documents": len(held[split]), "tokens": n} for split, n in tokens.items()},
    )
