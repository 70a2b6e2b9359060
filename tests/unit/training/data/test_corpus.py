"""The documents of a corpus, and their split into training and validation."""

from __future__ import annotations

import json
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from linear_moe.options.errors import ConfigError
from linear_moe.training.data.corpus import documents, open_corpus, validation_names


def split_of(corpus, fraction: float = 0.2) -> dict[str, str]:
    return {d.name: d.split for d in documents(corpus, fraction)}


def test_files_in_order_and_whole(texts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "corpus" / "binary.so").write_bytes(b"\x7fELF")
    (tmp_path / "corpus" / ".hidden.txt").write_text("no")
    contents = [(d.name, d.text) for d in documents(open_corpus(str(tmp_path / "corpus")), 0.2)]
    assert contents == sorted(texts.items())


def test_split_by_file(texts: dict[str, str], tmp_path: Path) -> None:
    corpus = open_corpus(str(tmp_path / "corpus"))
    first = split_of(corpus)
    assert {"train", "validation"} == set(first.values()) and split_of(corpus) == first
    assert 2 <= list(first.values()).count("validation") <= 16
    (tmp_path / "corpus" / "more.txt").write_text("more")
    later = split_of(open_corpus(str(tmp_path / "corpus")))
    assert {name: later[name] for name in first} == first  # a new file moves no other one
    assert set(split_of(corpus, 0.0).values()) == {"train"}


@pytest.mark.parametrize("fraction", [0.001, 0.5])
def test_both_splits_get_a_file(fraction: float) -> None:
    for count in range(2, 30):
        names = tuple(f"f{i}" for i in range(count))
        assert 1 <= len(validation_names(names, fraction)) < count


def test_share_of_many_files() -> None:
    names = tuple(f"pkg/module_{i}.py" for i in range(20000))
    assert len(validation_names(names, 0.05)) == pytest.approx(1000, rel=0.1)


def test_skipped_are_counted(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    skipped: Counter[str] = Counter()
    assert [d.text for d in documents(open_corpus(str(tmp_path)), 0.0, skipped)] == ["good"]
    assert skipped == {"empty": 1, "undecodable": 1}


def test_one_file_is_split_at_a_line(tmp_path: Path) -> None:
    lines = [f"line {i}\n" for i in range(100)]
    (tmp_path / "book.txt").write_text("".join(lines))
    train, validation = documents(open_corpus(str(tmp_path / "book.txt")), 0.1)
    assert train.split == "train" and validation.split == "validation"
    assert train.text + validation.text == "".join(lines) and train.text.endswith("\n")
    assert 9 <= len(validation.text.splitlines()) <= 12


@pytest.mark.parametrize("title", ["", "title\n"])
def test_one_line_is_split_at_a_character(tmp_path: Path, title: str) -> None:
    text = title + "ab ωc " * 500
    (tmp_path / "text8.txt").write_text(text)
    train, validation = documents(open_corpus(str(tmp_path / "text8.txt")), 0.1)
    assert train.split == "train" and validation.split == "validation" and train.text + validation.text == text
    assert len(train.text) == int(len(text) * 0.9)


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    rows = [{"text": f"document {i} é"} for i in range(200)] + [{"text": ""}]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n\n{"text": "\\ud800"}\n')
    skipped: Counter[str] = Counter()
    read = list(documents(open_corpus(str(path)), 0.2, skipped))
    assert [d.text for d in read] == [row["text"] for row in rows[:-1]]
    assert 20 <= sum(d.split == "validation" for d in read) <= 60
    assert skipped == {"empty": 1, "undecodable": 1}


@pytest.mark.parametrize(("line", "message"), [("{oops", "not valid JSON"), ('{"body": 1}', '"text" string')])
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message) as error:
        list(documents(open_corpus(str(path)), 0.0))
    assert str(error.value).startswith(f"{path}:2: ")


def test_stdlib() -> None:
    corpus = open_corpus("stdlib")
    assert corpus.root == Path(sysconfig.get_paths()["stdlib"])
    assert {"argparse.py", "json/decoder.py"} <= set(corpus.files)
    assert not any("site-packages" in name or "dist-packages" in name for name in corpus.files)


def test_fingerprint_is_of_names_and_contents(texts: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    seen = {open_corpus(str(folder)).fingerprint()}
    (folder / "a" / "file_000.txt").rename(folder / "a" / "renamed.txt")
    seen.add(open_corpus(str(folder)).fingerprint())
    (folder / "a" / "renamed.txt").write_text("other")
    seen.add(open_corpus(str(folder)).fingerprint())
    assert len(seen) == 3
    folder.rename(tmp_path / "moved")
    assert open_corpus(str(tmp_path / "moved")).fingerprint() in seen


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.corpus = 'stdlb': no such file.*did you mean 'stdlib'\?"):
        open_corpus("stdlb")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match="holds no text files"):
        open_corpus(str(tmp_path))
