"""Prepares tokenized train and validation sets from `data.corpus` and `data.tokenizer`.

The sets are made once, on disk, and verified whenever they are used. A prepared folder `<data.cache>/<key>` holds
`tokenizer/`, `train.{bin,idx}`, `validation.{bin,idx}`, `manifest.json` and `order/` (Megatron's sample indices). The
key hashes everything the tokens depend on. One process at a time makes a folder, under another name, and renames it
when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from linear_moe.config.schema import Config, DataConfig, TokenizerConfig
from linear_moe.config.vocabulary import embedding_rows
from linear_moe.options.errors import ConfigError
from linear_moe.training.data import indexed
from linear_moe.training.data.corpus import STDLIB, SYNTHETIC, Corpus, documents, holds_text, open_corpus, unit_hash
from linear_moe.training.data.prepared import PreparedData, split_sequences
from linear_moe.training.data.tokenizer import (
    BPE_SAMPLE_BYTES,
    Encoder,
    check_tokenizer,
    load_tokenizer,
    make_tokenizer,
    text_pieces,
    tokenizer_key,
    vocabulary_size,
)

FORMAT = 2  # part of every key: to be raised when the same corpus and tokenizer would give other files
BATCH = 4_000_000  # number of characters tokenized at a time
SPLITS = ("train", "validation")
BROKEN_INDEX = "make the dataset again, or give another corpus"  # the `fix` for a dataset that was not prepared here


def check_data(config: Config) -> None:
    """Raises ConfigError for a corpus or tokenizer that cannot be used; reads little and makes nothing.

    A corpus is refused if its bytes cannot give the tokens of one sequence with any tokenizer. `prepare_data` checks
    the number of tokens that the corpus really gives.
    """
    data = config.data
    if data.corpus == SYNTHETIC:
        if config.model.vocab_size is None:
            raise ConfigError("model.vocab_size", None, "must be given: the synthetic corpus has no tokenizer")
        return
    check_tokenizer(data.tokenizer)
    prefix = _prefix(data)
    if prefix is not None:
        if _is_prepared(prefix):
            load_prepared(Path(prefix).parent)
        else:
            _check_prefix_tokenizer(data, prefix)
            indexed.read_index(prefix, BROKEN_INDEX)
        return
    corpus = open_corpus(data.corpus)
    if not holds_text(corpus):
        raise _no_text(data, f"{len(corpus.files)} files, empty or not UTF-8")
    length, size = config.training.sequence_length, corpus.size()
    sets = "the train set and the validation set each need" if data.validation_fraction else "one sequence takes"
    # Byte-level tokenizers give at most one token per byte, and an end-of-document token per document.
    if size + len(corpus.files) + 1 < (length + 1) * (2 if data.validation_fraction else 1):
        raise ConfigError(
            "data.corpus",
            data.corpus,
            f"too small: it has {size} bytes, and {sets} {length + 1} tokens",
            fix="lower training.sequence_length or give more text",
        )
    folder = _text_folder(data, corpus)
    if folder.exists():
        load_prepared(folder)


def prepare_data(config: Config, progress: bool = True) -> PreparedData:
    """Makes the tokenized data and the sample orders of the run, or finds them in the cache, and verifies the data.

    Must be called on every rank, before the process groups exist: the first rank prepares the data (with a progress bar
    on stderr), and the other ranks wait.

    Raises:
        ConfigError: the corpus is missing, empty, too small or corrupt, or the cache folder cannot be used.
    """
    check_data(config)
    data = config.data
    if data.corpus == SYNTHETIC:
        assert config.model.vocab_size is not None
        return PreparedData(None, None, None, config.model.vocab_size, 0, SYNTHETIC, data.cache)
    cache = Path(data.cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        prefix = _prefix(data)
        if prefix is None:
            prepared = _prepare_text(data, progress)
        elif _is_prepared(prefix):
            prepared = load_prepared(Path(prefix).parent)
            # The folder may be read-only, so the sample orders are kept in the run's own cache.
            prepared = replace(prepared, cache=str(cache.resolve() / f"{prepared.fingerprint}-order"))
        else:
            prepared = _open_prefix(data, prefix, cache)
        _check_size(config, prepared)
        from linear_moe.training.data.dataset import build_orders

        with lock(Path(prepared.cache)):
            build_orders(prepared, config)
    except OSError as error:
        raise ConfigError(
            "data.cache",
            data.cache,
            f"cannot be used: {error.strerror or error}",
            fix="free some space there, or give another folder",
        ) from error
    return prepared


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lets one process at a time into the `with` block; a process that dies releases the lock."""
    with open(folder.parent / f"{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load_prepared(folder: Path) -> PreparedData:
    """The data of a prepared folder, verified against its manifest. ConfigError if the folder is damaged."""
    fix = f"delete {folder}, and it is made again"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        splits, tokenizer = manifest["splits"], manifest["tokenizer_files"]
        prepared = PreparedData(
            train_prefix=str(folder / "train"),
            validation_prefix=str(folder / "validation") if "validation" in splits else None,
            tokenizer_folder=str(folder / "tokenizer"),
            vocab_size=manifest["vocab_size"],
            eod_id=manifest["eod_id"],
            fingerprint=manifest["fingerprint"],
            cache=str(folder / "order"),
            tokens={name: split["tokens"] for name, split in splits.items()},
            summary={key: manifest[key] for key in ("corpus", "files", "skipped", "tokenizer", "vocab_size", "eod_id")}
            | {name: {k: split[k] for k in ("documents", "tokens", "bytes")} for name, split in splits.items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(str(folder / "manifest.json"), ..., "missing or corrupt", fix=fix) from error
    for name, split in splits.items():
        prefix = str(folder / name)
        indexed.verify_dataset_files(prefix, split["stored"], fix)
        if indexed.read_index(prefix, fix).tokens != split["tokens"]:
            raise ConfigError(prefix + ".idx", ..., "corrupt index: not the manifest's number of tokens", fix=fix)
    for name, expected in tokenizer.items():
        path = folder / "tokenizer" / name
        if not path.is_file() or indexed.sha256(path) != expected:
            raise ConfigError(str(path), ..., "missing or corrupt", fix=fix)
    return prepared


def _key(data: DataConfig, source: str, tokenizer: dict[str, Any]) -> str:
    parts = {
        "format": FORMAT,
        "source": source,
        "tokenizer": tokenizer,
        "validation_fraction": data.validation_fraction,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _text_folder(data: DataConfig, corpus: Corpus) -> Path:
    """Path of the folder in which a text corpus is, or will be, prepared."""
    return Path(data.cache).resolve() / _key(data, corpus.fingerprint(), tokenizer_key(data.tokenizer))


def _prepare_text(data: DataConfig, progress: bool) -> PreparedData:
    corpus = open_corpus(data.corpus)
    folder = _text_folder(data, corpus)
    with lock(folder):
        if not folder.exists():
            temporary = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # under the lock, it can only be that of a killed process
            temporary.mkdir()
            try:
                manifest = _tokenize(data, corpus, temporary, progress) | {"fingerprint": folder.name}
                (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return load_prepared(folder)


def _tokenize(data: DataConfig, corpus: Corpus, folder: Path, progress: bool) -> dict[str, Any]:
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
        raise _no_text(data, counts or "no documents")
    for split in SPLITS:
        if not splits[split]["documents"] and (split == "train" or data.validation_fraction):
            raise ConfigError(
                "data.corpus",
                data.corpus,
                f"too small: nothing is left for the {split} set",
                fix="give more text, or set data.validation_fraction=0",
            )


def _no_text(data: DataConfig, contents: str) -> ConfigError:
    fix = "give UTF-8 text files that are not empty"
    return ConfigError("data.corpus", data.corpus, f"holds no text ({contents})", fix=fix)


def _is_prepared(prefix: str) -> bool:
    """Whether an indexed dataset is the train set of a prepared folder."""
    return Path(prefix).name == "train" and (Path(prefix).parent / "manifest.json").is_file()


def _prefix(data: DataConfig) -> str | None:
    """The absolute prefix of the indexed dataset that `data.corpus` names; None: the corpus is text."""
    path = Path(data.corpus).expanduser()
    if path.suffix in (".bin", ".idx") and path.is_file():
        fix = f"give {path.with_suffix('')}"
        raise ConfigError("data.corpus", data.corpus, "is one half of an indexed dataset", fix=fix)
    prefix = str(path.resolve())
    return prefix if data.corpus != STDLIB and not path.exists() and indexed.exists(prefix) else None


def _check_prefix_tokenizer(data: DataConfig, prefix: str) -> None:
    if data.tokenizer.type != "hf" and not (Path(prefix).parent / "tokenizer").is_dir():
        raise ConfigError(
            "data.tokenizer.type",
            data.tokenizer.type,
            "an indexed dataset needs the tokenizer it was made with",
            fix="set data.tokenizer.type=hf and data.tokenizer.path",
        )


def _open_prefix(data: DataConfig, prefix: str, cache: Path) -> PreparedData:
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
    key = _key(data, str(indexed.fingerprint(prefix)), tokenizer_key(TokenizerConfig(type="hf", path=folder)))
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


def _check_size(config: Config, prepared: PreparedData) -> None:
    embedding_rows(config.model, prepared.vocab_size)  # raises ConfigError where there are too few
    length = config.training.sequence_length
    for split, tokens in prepared.tokens.items():
        if tokens < length + 1:
            advice = "lower training.sequence_length or give more text"
            raise ConfigError(
                "data.corpus",
                config.data.corpus,
                f"too small: its {split} set has {tokens} tokens, and one sequence takes {length + 1}",
                fix=advice if split == "train" else f"raise data.validation_fraction, {advice}",
            )
