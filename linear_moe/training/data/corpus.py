"""The text of a corpus: its files, their order, and the documents held out for validation."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from linear_moe.options.errors import ConfigError

STDLIB = "stdlib"
SYNTHETIC = "synthetic"
SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .py .pyi .c .h .cc .cpp .hpp .cu .cuh .rs .go .java .js .ts .jsx .tsx .html .css .sh "
    ".sql .rb .php .pl .lua .jl .r .scala .swift .kt .toml .yaml .yml .xml .jsonl".split()
)
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Text files of a corpus: `files` are sorted names relative to `root`."""

    root: Path
    files: tuple[str, ...]

    def size(self) -> int:
        """Size of all files in bytes."""
        return sum((self.root / name).stat().st_size for name in self.files)

    def fingerprint(self) -> str:
        """sha256 over the files' names and contents. ConfigError if a file cannot be read."""
        total = hashlib.sha256()
        for name in self.files:
            try:
                with (self.root / name).open("rb") as file:
                    total.update(os.fsencode(name) + b"\0" + hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise ConfigError("data.corpus", str(self.root / name), f"cannot be read: {error.strerror}") from None
        return total.hexdigest()


@dataclass(frozen=True)
class Document:
    """A document of a corpus; `split` is "train" or "validation"."""

    name: str
    text: str
    split: str


def open_corpus(value: str) -> Corpus:
    """The text files that `data.corpus` names. Raises ConfigError if there are none."""
    if value == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _walk(root, frozenset({".py"}), NOT_STDLIB)
        where = f"no Python sources under {root}"
    else:
        path = Path(value).expanduser()
        if path.is_file():
            return Corpus(path.parent, (path.name,))
        if not path.is_dir():
            raise ConfigError(
                "data.corpus",
                value,
                "no such file, folder or indexed dataset (.bin and .idx)",
                candidates=(STDLIB, SYNTHETIC),
                fix="or a path",
            )
        root, files = path, _walk(path, SUFFIXES, frozenset({"__pycache__"}))
        where = "the folder holds no text files (.txt, .md, .py, .jsonl, ...)"
    if not files:
        raise ConfigError("data.corpus", value, where, fix="give another corpus")
    return Corpus(root, files)


def _walk(root: Path, suffixes: frozenset[str], skip: frozenset[str]) -> tuple[str, ...]:
    """Sorted names of the files under `root` with one of the suffixes, without hidden ones and folders in `skip`."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        names += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if Path(name).suffix.lower() in suffixes and not name.startswith(".") and (Path(folder) / name).is_file()
        ]
    return tuple(sorted(names))


def unit_hash(name: str) -> float:
    """Hash of the name as a number in [0, 1), equal on all machines."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def validation_names(names: tuple[str, ...], fraction: float) -> frozenset[str]:
    """The names held out for validation, about the share `fraction` of them.

    Names are chosen by their hash, so that a file stays in its split as other files come and go. Of two or more names,
    each split gets at least one.
    """
    if fraction == 0 or len(names) < 2:
        return frozenset()
    ranked = sorted(names, key=unit_hash)
    count = sum(unit_hash(name) < fraction for name in ranked)
    return frozenset(ranked[: min(max(count, 1), len(names) - 1)])


def documents(corpus: Corpus, fraction: float, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Yields all documents in order: one per file, or one per line of a .jsonl file.

    Files are held out for validation whole. Of a corpus of one file, the last `fraction` of the text is held out (of a
    .jsonl file: lines chosen by hash). Documents that are empty or not UTF-8 are skipped, and counted in `skipped`.
    """
    skipped = Counter() if skipped is None else skipped
    held_out = validation_names(corpus.files, fraction)
    alone = len(corpus.files) == 1
    for name in corpus.files:
        path = corpus.root / name
        split = "validation" if name in held_out else "train"
        if path.suffix.lower() == ".jsonl":
            for line, text in _json_lines(path, skipped):
                document = f"{name}:{line}"
                inside = "validation" if alone and unit_hash(document) < fraction else split
                yield Document(document, text, inside)
            continue
        try:
            text = path.read_bytes().decode("utf-8")  # unlike read_text, keeps line ends as they are
        except UnicodeDecodeError:
            skipped["undecodable"] += 1
            continue
        if not text:
            skipped["empty"] += 1
        elif alone and fraction:
            middle = int(len(text) * (1 - fraction))
            # The text is cut after the last line end before `middle`. If none is near, as in text8, which is one line,
            # it is cut between two characters.
            cut = text.rfind("\n", max(0, 2 * middle - len(text)), middle + 1) + 1 or middle
            parts = (("train", text[:cut]), ("validation", text[cut:]))
            yield from (Document(f"{name}:{part}", piece, part) for part, piece in parts if piece)
        else:
            yield Document(name, text, split)


def holds_text(corpus: Corpus) -> bool:
    """Whether there is a document at all. Reads files until one has text; of a text file, the first MiB."""
    for name in corpus.files:
        path = corpus.root / name
        if path.suffix.lower() == ".jsonl":
            if next(_json_lines(path, Counter()), None):
                return True
            continue
        try:
            with path.open("rb") as file:
                if codecs.getincrementaldecoder("utf-8")().decode(file.read(1 << 20)):
                    return True
        except UnicodeDecodeError:
            pass
    return False


def _json_lines(path: Path, skipped: Counter[str]) -> Iterator[tuple[int, str]]:
    """Yields line number, from 1, and "text" of every record of a .jsonl file; empty and undecodable ones are skipped.

    ConfigError for a line that is not valid JSON or has no "text".
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                skipped["undecodable"] += 1
                continue
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}:{number}", ..., f"not valid JSON: {error.msg}") from None
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ConfigError(f"{path}:{number}", ..., 'must be a JSON object with a "text" string')
            if not text:
                skipped["empty"] += 1
            elif _is_unicode(text):
                yield number, text
            else:
                skipped["undecodable"] += 1


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a JSON string may escape half of a surrogate pair, which is no character
        return False
    return True
