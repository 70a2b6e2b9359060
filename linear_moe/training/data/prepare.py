"""Prepares tokenized train and validation sets from `data.corpus` and `data.tokenizer`.

The sets are made once, on disk, and verified whenever they are used. A prepared folder `<data.cache>/<key>` holds
`tokenizer/`, `train.{bin,idx}`, `validation.{bin,idx}`, `manifest.json` and `order/` (Megatron's sample indices). The
key hashes everything the tokens depend on. One process at a time makes a folder, under another name, and renames it
when it is complete.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from linear_moe.config.schema import Config, DataConfig
from linear_moe.config.vocabulary import embedding_rows
from linear_moe.options.errors import ConfigError
from linear_moe.training.data import indexed
from linear_moe.training.data.corpus import SYNTHETIC, Corpus, holds_text, open_corpus
from linear_moe.training.data.foreign import check_foreign, dataset_prefix, open_foreign
from linear_moe.training.data.prepared import PreparedData, data_key
from linear_moe.training.data.tokenize import no_text, tokenize_corpus
from linear_moe.training.data.tokenizer import check_tokenizer, tokenizer_key


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
    prefix = dataset_prefix(data)
    if prefix is not None:
        if _is_prepared(prefix):
            load_prepared(Path(prefix).parent)
        else:
            check_foreign(data, prefix)
        return
    corpus = open_corpus(data.corpus)
    if not holds_text(corpus):
        raise no_text(data, f"{len(corpus.files)} files, empty or not UTF-8")
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
        prefix = dataset_prefix(data)
        if prefix is None:
            prepared = _prepare_text(data, progress)
        elif _is_prepared(prefix):
            prepared = load_prepared(Path(prefix).parent)
            # The folder may be read-only, so the sample orders are kept in the run's own cache.
            prepared = replace(prepared, cache=str(cache.resolve() / f"{prepared.fingerprint}-order"))
        else:
            prepared = open_foreign(data, prefix, cache)
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


def _text_folder(data: DataConfig, corpus: Corpus) -> Path:
    """Path of the folder in which a text corpus is, or will be, prepared."""
    return Path(data.cache).resolve() / data_key(data, corpus.fingerprint(), tokenizer_key(data.tokenizer))


def _prepare_text(data: DataConfig, progress: bool) -> PreparedData:
    corpus = open_corpus(data.corpus)
    folder = _text_folder(data, corpus)
    with lock(folder):
        if not folder.exists():
            temporary = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # under the lock, it can only be that of a killed process
            temporary.mkdir()
            try:
                manifest = tokenize_corpus(data, corpus, temporary, progress) | {"fingerprint": folder.name}
                (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return load_prepared(folder)


def _is_prepared(prefix: str) -> bool:
    """Whether an indexed dataset is the train set of a prepared folder."""
    return Path(prefix).name == "train" and (Path(prefix).parent / "manifest.json").is_file()


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
