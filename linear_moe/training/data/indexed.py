"""Megatron's indexed dataset on disk: checked without Megatron-Core, and written with Megatron-Core.

A dataset with the prefix P is two files. `P.bin` holds all token ids. `P.idx` holds the header, then the lengths of all
sequences (int32), their byte offsets (int64), and the document boundaries (int64).
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from linear_moe.options.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, document boundaries
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
# Bytes: of larger files only size and structure are verified, because every rank does so at every start.
HASH_LIMIT = 1 << 28


@dataclass(frozen=True)
class Index:
    """Content of an .idx file.

    Attributes:
        dtype: dtype of the token ids.
        lengths: `[sequences]` int32, number of tokens of each sequence.
    """

    dtype: np.dtype[Any]
    lengths: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


def exists(prefix: str) -> bool:
    """Whether at least one of the two files of an indexed dataset exists."""
    return os.path.isfile(prefix + ".idx") or os.path.isfile(prefix + ".bin")


def read_index(prefix: str, fix: str) -> Index:
    """Reads an index, and checks it against the token file.

    Raises:
        ConfigError: a file is missing, or the index is corrupt; offers `fix`.
    """
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            raise ConfigError(prefix + suffix, ..., "missing half of an indexed dataset", fix=fix)

    def corrupt(reason: str) -> ConfigError:
        return ConfigError(prefix + ".idx", ..., f"corrupt index: {reason}", fix=fix)

    size = os.path.getsize(prefix + ".idx")
    with open(prefix + ".idx", "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise corrupt("the header is not that of an indexed dataset")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise corrupt(f"version {version}, token type {code}")
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences):  # the longer form has one byte, the mode, for every sequence
        raise corrupt(f"{size} bytes instead of {expected}")

    raw = np.memmap(prefix + ".idx", dtype=np.uint8, mode="r", offset=HEADER.size)
    lengths = raw[: 4 * sequences].view(np.int32)
    offsets = raw[4 * sequences : 12 * sequences].view(np.int64)
    documents = raw[12 * sequences : 12 * sequences + 8 * boundaries].view(np.int64)
    dtype = np.dtype(DTYPES[code])
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if sequences == 0:
        raise corrupt("it holds no sequences")
    if lengths.min() < 0 or offsets[0] != 0 or not np.array_equal(offsets[1:], ends[:-1]):
        raise corrupt("lengths and offsets disagree")
    if boundaries < 2 or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise corrupt("the document boundaries are out of order")
    if os.path.getsize(prefix + ".bin") != ends[-1]:
        raise corrupt(f"{prefix}.bin has {os.path.getsize(prefix + '.bin')} bytes instead of {ends[-1]}")
    return Index(dtype, lengths)


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(prefix: str) -> list[Any]:
    """Size and sha256 of the token file and of the index, which stand for their content wherever the files lie.

    The sha256 of a file larger than HASH_LIMIT covers only its first and last MiB.
    """
    parts: list[Any] = []
    for suffix in (".bin", ".idx"):
        size = os.path.getsize(prefix + suffix)
        if size <= HASH_LIMIT:
            parts.append((size, sha256(prefix + suffix)))
            continue
        with open(prefix + suffix, "rb") as file:
            ends = file.read(1 << 20)
            file.seek(-(1 << 20), os.SEEK_END)
            parts.append((size, hashlib.sha256(ends + file.read()).hexdigest()))
    return parts


def fingerprint_files(prefix: str) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the token file and of the index, for `verify_dataset_files`."""
    return {s: {"size": os.path.getsize(prefix + s), "sha256": sha256(prefix + s)} for s in (".bin", ".idx")}


def verify_dataset_files(prefix: str, recorded: dict[str, dict[str, Any]], fix: str) -> None:
    """Raises ConfigError unless both files have the recorded size and sha256.

    Of a file larger than HASH_LIMIT only the size is compared.
    """
    for suffix, expected in recorded.items():
        path = prefix + suffix
        if not os.path.isfile(path):
            raise ConfigError(path, ..., "missing half of an indexed dataset", fix=fix)
        if os.path.getsize(path) != expected["size"] or (
            expected["size"] <= HASH_LIMIT and sha256(path) != expected["sha256"]
        ):
            kind = "index" if suffix == ".idx" else "token file"
            raise ConfigError(path, ..., f"corrupt {kind}: not what was written", fix=fix)


class IndexedWriter:
    """Writes `prefix.bin` and `prefix.idx` with Megatron's builder; `platform.install()` must have been called."""

    def __init__(self, prefix: str, vocab_size: int):
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self.builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(vocab_size))
        self.documents = self.tokens = self.bytes = 0

    def add(self, tokens: np.ndarray, size: int) -> None:
        """Adds a document: its token ids with the end-of-document token, and the size of its text in bytes."""
        self.builder.add_document(tokens, [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)
        self.bytes += size

    def close(self) -> dict[str, Any]:
        """Finishes both files, and returns their entry of the manifest: counts, sizes and sha256."""
        self.builder.finalize(self.prefix + ".idx")
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        return counts | {"stored": fingerprint_files(self.prefix)}
