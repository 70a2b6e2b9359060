"""Tokenizes a text corpus into the files of a prepared folder: a tokenizer and an indexed dataset for each split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from linear_moe.config.schema import DataConfig
from linear_moe.options.errors import ConfigError
from linear_moe.training.data import indexed
from linear_moe.training.data.corpus import Corpus, documents, unit_hash
from linear_moe.training.data.prepared import SPLITS
from linear_moe.training.data.tokenizer import BPE_SAMPLE_BYTES, Encoder, make_tokenizer, text_pieces, vocabulary_size

BATCH = 4_000_000  # number of characters tokenized at a time


def tokenize_corpus(data: DataConfig, corpus: Corpus, folder: Path, progress: bool) -> dict[str, Any]:
    """Writes the tokenizer, the train set and the validation set to `folder`, and returns the manifest."""
    from linear_moe.training import platform

    platform.install()
    console = Console(stderr=True, quiet=not progress)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        size, fraction = corpus.size(), data.validation_fraction
        task = bars.add_task(f"training a {data.tokenizer.type} tokenizer", total=None)
        tokenizer = make_tokenizer(data.tokenizer, _sample(corpus, fraction, size))
        tokenizer.save_pretrained(folder / "tokenizer")
        bars.update(task, description="tokenizing", total=size)

        vocab_size, eod = vocabulary_size(tokenizer), tokenizer.eos_token_id
        assert isinstance(eod, int)
        writers = {split: indexed.IndexedWriter(str(folder / split), vocab_size) for split in SPLITS}
        encoder, skipped = Encoder(tokenizer), Counter[str]()
        batch: list[tuple[str, list[str]]] = []
        waiting = 0

        def flush() -> None:
            ids = iter(encoder([piece for _, parts in batch for piece in parts]))
            for split, parts in batch:
                written = sum(len(piece.encode()) for piece in parts)
                writers[split].add(np.concatenate([*(next(ids) for _ in parts), [eod]]), written)
                bars.advance(task, written)
            batch.clear()

        for document in documents(corpus, fraction, skipped):
            batch.append((document.split, list(text_pieces(document.text))))
            waiting += len(document.text)
            if waiting >= BATCH:
                flush()
                waiting = 0
        flush()
        bars.update(task, completed=size)
    splits = {split: writer.close() for split, writer in writers.items()}
    _check_not_empty(data, corpus, splits, skipped)
    if not splits["validation"]["documents"]:
        del splits["validation"]
        for suffix in (".bin", ".idx"):
            (folder / f"validation{suffix}").unlink()
    return {
        "corpus": data.corpus,
        "files": len(corpus.files),
        "skipped": dict(skipped),
        "tokenizer": data.tokenizer.type,
        "vocab_size": vocab_size,
        "eod_id": eod,
        "splits": splits,
        "tokenizer_files": {p.name: indexed.sha256(p) for p in sorted((folder / "tokenizer").iterdir()) if p.is_file()},
    }


def _sample(corpus: Corpus, fraction: float, size: int) -> Iterator[str]:
    """Yields the text on which to train a tokenizer: the training text in pieces.

    Of a corpus larger than BPE_SAMPLE_BYTES, it yields about this much, chosen piece by piece by hash.
    """
    for document in documents(corpus, fraction):
        if document.split == "train":
            for i, piece in enumerate(text_pieces(document.text)):
                if size <= BPE_SAMPLE_BYTES or unit_hash(f"{document.name}#{i}") < BPE_SAMPLE_BYTES / size:
                    yield piece


def _check_not_empty(data: DataConfig, corpus: Corpus, splits: dict[str, Any], skipped: Counter[str]) -> None:
    counts = ", ".join(f"{n} {why}" for why, n in skipped.items())
    if not any(splits[split]["documents"] for split in SPLITS):
        raise no_text(data, counts or "no documents")
    for split in SPLITS:
        if not splits[split]["documents"] and (split == "train" or data.validation_fraction):
            raise ConfigError(
                "data.corpus",
                data.corpus,
                f"too small: nothing is left for the {split} set",
                fix="give more text, or set data.validation_fraction=0",
            )


def no_text(data: DataConfig, contents: str) -> ConfigError:
    """Makes the error for a corpus without text; `contents` says what it holds instead."""
    fix = "give UTF-8 text files that are not empty"
    return ConfigError("data.corpus", data.corpus, f"holds no text ({contents})", fix=fix)
