"""Preparation of a corpus: the written files, made once and whole, and the errors about unusable data."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from linear_moe.commands import data as command
from linear_moe.config.schema import Config
from linear_moe.options.errors import ConfigError
from linear_moe.training import platform
from linear_moe.training.data import indexed, prepare, tokenize
from linear_moe.training.data.corpus import documents, open_corpus
from linear_moe.training.data.prepare import check_data, prepare_data

ConfigOf = Callable[..., Config]


def stored_documents(prefix: str) -> list[list[int]]:
    """The documents of an indexed dataset, read by Megatron."""
    platform.install()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_document_is_stored(config_of: ConfigOf, kind: str) -> None:
    config = config_of({"tokenizer": {"type": kind, "vocab_size": 300}})
    prepared = prepare_data(config, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_folder, local_files_only=True)
    assert prepared.eod_id == tokenizer.eos_token_id < prepared.vocab_size == len(tokenizer)
    expected: dict[str, list[str]] = {"train": [], "validation": []}
    for document in documents(open_corpus(config.data.corpus), config.data.validation_fraction):
        expected[document.split].append(document.text)
    for split, texts in expected.items():
        prefix = prepared.prefix(split)
        assert prefix is not None
        stored = stored_documents(prefix)
        assert [tokenizer.decode(ids[:-1]) for ids in stored] == texts
        assert all(ids.index(prepared.eod_id) == len(ids) - 1 for ids in stored)
        assert prepared.tokens[split] == sum(map(len, stored))
        assert prepared.summary[split]["bytes"] == sum(len(text.encode()) for text in texts)


def test_long_documents_are_encoded_in_pieces(
    config_of: ConfigOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "text_pieces", lambda text: [text[i : i + 7] for i in range(0, len(text), 7)])
    monkeypatch.setattr(tokenize, "BATCH", 50)
    config = config_of()
    prepared = prepare_data(config, progress=False)
    assert prepared.train_prefix is not None
    stored = stored_documents(prepared.train_prefix)
    corpus = documents(open_corpus(config.data.corpus), config.data.validation_fraction)
    assert [bytes(ids[:-1]).decode() for ids in stored] == [d.text for d in corpus if d.split == "train"]


def test_prepared_once_and_keyed(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = prepare_data(config_of(), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "tokenize_corpus", lambda *_: pytest.fail("prepared again"))
        assert prepare_data(config_of(), progress=False) == first
        assert prepare_data(config_of(steps=7, seed=3), progress=False).train_prefix == first.train_prefix
    others = [{"tokenizer": {"type": "bpe", "vocab_size": 300}}, {"validation_fraction": 0.3}]
    prefixes = {prepare_data(config_of(data), progress=False).train_prefix for data in others} | {first.train_prefix}
    (tmp_path / "corpus" / "a" / "file_000.txt").write_text("changed")
    assert len(prefixes | {prepare_data(config_of(), progress=False).train_prefix}) == 4


def test_torn_preparation_is_not_picked_up(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = prepare_data(config_of({"cache": str(tmp_path / "other")}), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "_check_not_empty", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_data(config_of(), progress=False)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    torn = tmp_path / "cache" / f"{whole.fingerprint}.tmp"  # left behind by a process that was killed
    torn.mkdir()
    (torn / "train.bin").write_bytes(b"torn")
    prepared = prepare_data(config_of(), progress=False)
    assert not torn.exists() and prepared.tokens == whole.tokens
    for split in ("train", "validation"):
        for suffix in (".bin", ".idx"):
            paths = [Path(str(p.prefix(split)) + suffix) for p in (prepared, whole)]
            assert paths[0].read_bytes() == paths[1].read_bytes()


def test_processes_that_start_together_prepare_once(config_of: ConfigOf, tmp_path: Path) -> None:
    config = config_of()
    code = f"""if True:
        from linear_moe.options.load import from_dict
        from linear_moe.config.schema import Config
        from linear_moe.training.data import prepare
        tokenize = prepare.tokenize_corpus
        prepare.tokenize_corpus = lambda *args: (print("tokenizing"), tokenize(*args))[1]
        print(prepare.prepare_data(from_dict(Config, {config.to_dict()!r}), progress=False).train_prefix)
        """
    start = [sys.executable, "-W", "ignore", "-c", code]
    processes = [
        subprocess.Popen(start, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": ":".join(sys.path)}) for _ in "ab"
    ]
    lines = [line for process in processes for line in process.communicate(timeout=300)[0].splitlines()]
    assert [process.returncode for process in processes] == [0, 0]
    assert lines.count("tokenizing") == 1 and len(lines) == 3 and len(set(lines)) == 2


def damage(path: Path, position: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[position : position + len(data)] = data
    path.write_bytes(raw)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated index": (
        lambda f: (f / "train.idx").write_bytes((f / "train.idx").read_bytes()[:-9]),
        "train.idx: corrupt index",
    ),
    "flipped bit": (lambda f: damage(f / "train.idx", 60, b"\xff"), "train.idx: corrupt index"),
    "no index": (lambda f: (f / "validation.idx").unlink(), "validation.idx: missing half"),
    "short tokens": (lambda f: (f / "train.bin").write_bytes(b"ab"), "train.bin: corrupt token file"),
    "other tokens": (lambda f: damage(f / "train.bin", 8, b"\xff\xff"), "train.bin: corrupt token file"),
    "manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: missing or corrupt"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing or corrupt"),
    "tokenizer": (
        lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"),
        "tokenizer.json: missing or corrupt",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_folder(config_of: ConfigOf, kind: str) -> None:
    prepared = prepare_data(config_of(), progress=False)
    folder = Path(str(prepared.train_prefix)).parent
    harm, message = DAMAGES[kind]
    harm(folder)
    for look in (check_data, partial(prepare_data, progress=False)):  # `linear-moe check` calls the first one
        with pytest.raises(ConfigError) as error:
            look(config_of())
        assert message in str(error.value) and f"delete {folder}" in str(error.value) and "\n" not in str(error.value)
    shutil.rmtree(folder)
    assert prepare_data(config_of(), progress=False) == prepared


INDEX_DAMAGES = {
    "magic": (0, b"X", "the header is not that of an indexed dataset"),
    "version": (9, struct.pack("<Q", 2), "version 2"),
    "dtype": (17, b"\x63", "token type 99"),
    "count": (18, struct.pack("<Q", 10**6), "bytes instead of"),
    "length": (34, struct.pack("<i", 3), "lengths and offsets disagree"),
    "negative": (34, struct.pack("<i", -3), "lengths and offsets disagree"),
    "last boundary": (-8, struct.pack("<q", 1), "boundaries are out of order"),
}


@pytest.mark.parametrize("kind", INDEX_DAMAGES)
def test_corrupt_index_of_another_maker(config_of: ConfigOf, tmp_path: Path, kind: str) -> None:
    """An indexed dataset without a manifest is checked by its structure."""
    prepared = prepare_data(config_of(), progress=False)
    for suffix in (".bin", ".idx"):
        shutil.copy(str(prepared.train_prefix) + suffix, tmp_path / f"theirs{suffix}")
    position, data, message = INDEX_DAMAGES[kind]
    index = tmp_path / "theirs.idx"
    damage(index, position % index.stat().st_size, data)
    tokenizer = {"type": "hf", "path": prepared.tokenizer_folder}
    with pytest.raises(ConfigError, match=message) as error:
        prepare_data(config_of({"corpus": str(tmp_path / "theirs"), "tokenizer": tokenizer}), progress=False)
    assert str(error.value).startswith(f"{index}: corrupt index")


def test_prefix_of_another_maker(config_of: ConfigOf, tmp_path: Path) -> None:
    """An indexed dataset from elsewhere is split by the documents' numbers, and is not copied."""
    prepared = prepare_data(config_of(), progress=False)
    for suffix in (".bin", ".idx"):
        shutil.copy(str(prepared.train_prefix) + suffix, tmp_path / f"theirs{suffix}")
    theirs = {"corpus": str(tmp_path / "theirs")}
    with pytest.raises(ConfigError, match="needs the tokenizer it was made with"):
        check_data(config_of(theirs))
    theirs["tokenizer"] = {"type": "hf", "path": prepared.tokenizer_folder}
    opened = prepare_data(config_of(theirs), progress=False)
    assert opened.train_prefix == opened.validation_prefix == theirs["corpus"]
    stored = stored_documents(theirs["corpus"])
    numbers = {split: opened.sequences(split, len(stored)).tolist() for split in ("train", "validation")}
    assert sorted(numbers["train"] + numbers["validation"]) == list(range(len(stored)))
    for split, ids in numbers.items():
        assert len(ids) > 0 and opened.tokens[split] == sum(len(stored[i]) for i in ids)
    with pytest.raises(ConfigError, match=r"is one half of an indexed dataset; give .*theirs"):
        prepare_data(config_of({"corpus": str(tmp_path / "theirs.bin")}), progress=False)
    (tmp_path / "theirs.idx").unlink()
    with pytest.raises(ConfigError, match="missing half"):
        prepare_data(config_of(theirs), progress=False)


def test_prefix_without_tokens(config_of: ConfigOf, tmp_path: Path) -> None:
    """A dataset whose sequences are all empty is refused, by `linear-moe check` too."""
    prepared = prepare_data(config_of(), progress=False)
    writer = indexed.IndexedWriter(str(tmp_path / "theirs"), prepared.vocab_size)
    for _ in range(3):
        writer.add(np.array([], dtype=np.uint16), 0)
    writer.close()
    theirs = {"corpus": str(tmp_path / "theirs"), "tokenizer": {"type": "hf", "path": prepared.tokenizer_folder}}
    for look in (check_data, partial(prepare_data, progress=False)):
        with pytest.raises(ConfigError, match="holds no tokens: all its sequences are empty; make the dataset again"):
            look(config_of(theirs))


def test_prefix_with_a_wrong_tokenizer(config_of: ConfigOf, tmp_path: Path) -> None:
    large = prepare_data(config_of({"tokenizer": {"type": "bpe", "vocab_size": 400}}), progress=False)
    small = prepare_data(config_of(), progress=False)
    for suffix in (".bin", ".idx"):
        shutil.copy(str(large.train_prefix) + suffix, tmp_path / f"theirs{suffix}")
    theirs = {"corpus": str(tmp_path / "theirs"), "tokenizer": {"type": "hf", "path": small.tokenizer_folder}}
    with pytest.raises(ConfigError, match="but the tokenizer has 257"):
        prepare_data(config_of(theirs), progress=False)


def test_fingerprint_is_of_the_content(config_of: ConfigOf, tmp_path: Path) -> None:
    """Fingerprints of text and of indexed datasets depend on content and tokenizer, not on the folder."""
    prepared = prepare_data(config_of(), progress=False)
    shutil.copytree(tmp_path / "corpus", tmp_path / "moved")
    moved = config_of({"corpus": str(tmp_path / "moved")})
    assert prepare_data(moved, progress=False).fingerprint == prepared.fingerprint
    (tmp_path / "moved" / "more.txt").write_text("more")
    assert prepare_data(moved, progress=False).fingerprint != prepared.fingerprint
    other = Path(shutil.copytree(str(prepared.tokenizer_folder), tmp_path / "tokenizer"))
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97'))
    assert (other / "tokenizer.json").read_text() != text
    fingerprints = []
    for name, tokenizer in (("one", prepared.tokenizer_folder), ("two", prepared.tokenizer_folder), ("three", other)):
        (tmp_path / name).mkdir()
        for suffix in (".bin", ".idx"):
            shutil.copyfile(str(prepared.train_prefix) + suffix, tmp_path / name / f"theirs{suffix}")
        data = {"corpus": str(tmp_path / name / "theirs"), "tokenizer": {"type": "hf", "path": str(tokenizer)}}
        fingerprints.append(prepare_data(config_of(data), progress=False).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_tokenizer_of_a_run_is_not_replaced(config_of: ConfigOf, tmp_path: Path) -> None:
    prepared = prepare_data(config_of(), progress=False)
    folder = tmp_path / "run" / "tokenizer"
    folder.parent.mkdir()
    for _ in range(2):  # the second time as in a resumed run
        prepared.save_tokenizer(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {path.name: path.read_bytes() for path in Path(str(prepared.tokenizer_folder)).iterdir()}
    other = prepare_data(config_of({"tokenizer": {"type": "bpe", "vocab_size": 300}}), progress=False)
    with pytest.raises(ConfigError, match="holds another tokenizer") as error:
        other.save_tokenizer(folder)
    assert str(error.value).startswith(f"{folder}: ")
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]


def test_check_reads_the_index(config_of: ConfigOf, tmp_path: Path) -> None:
    prepared = prepare_data(config_of(), progress=False)
    for suffix in (".bin", ".idx"):
        shutil.copy(str(prepared.train_prefix) + suffix, tmp_path / f"theirs{suffix}")
    theirs = config_of(
        {"corpus": str(tmp_path / "theirs"), "tokenizer": {"type": "hf", "path": prepared.tokenizer_folder}}
    )
    ours = config_of({"corpus": prepared.train_prefix})
    for config, prefix in ((theirs, str(tmp_path / "theirs")), (ours, prepared.train_prefix)):
        check_data(config)
        Path(f"{prefix}.bin").write_bytes(b"ab")
        with pytest.raises(ConfigError, match="corrupt"):
            check_data(config)


def test_prepared_prefix_brings_everything(config_of: ConfigOf) -> None:
    prepared = prepare_data(config_of(), progress=False)
    again = prepare_data(config_of({"corpus": prepared.train_prefix}), progress=False)
    assert (again.train_prefix, again.validation_prefix) == (prepared.train_prefix, prepared.validation_prefix)
    assert (again.tokenizer_folder, again.tokens) == (prepared.tokenizer_folder, prepared.tokens)


def test_too_little_text(config_of: ConfigOf, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"too small: its validation set has .* one sequence takes 2001"):
        prepare_data(config_of(sequence_length=2000), progress=False)
    with pytest.raises(
        ConfigError, match=r"it has .* bytes, and the train set and the validation set each need 100001"
    ):
        check_data(config_of(sequence_length=100_000))
    with pytest.raises(ConfigError, match=r"one sequence takes 100001 tokens"):
        check_data(config_of({"validation_fraction": 0.0}, sequence_length=100_000))
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("")
    (tmp_path / "blank" / "b.txt").write_bytes(b"\xff" * 99)
    (tmp_path / "blank" / "c.jsonl").write_text('{"text": ""}\n\n')
    blank = config_of({"corpus": str(tmp_path / "blank")})
    for action in (check_data, prepare_data):
        with pytest.raises(ConfigError, match=r"holds no text \(3 files, empty or not UTF-8\)"):
            action(blank)
    (tmp_path / "blank" / "c.jsonl").write_text('{"text": ""}\n{"text": "' + 99 * "x" + '"}\n')
    check_data(blank)
    (tmp_path / "line.txt").write_text("one line and no more: 48 characters for 2 * 17")
    line = {"corpus": str(tmp_path / "line.txt")}
    with pytest.raises(ConfigError, match="its validation set has 11 tokens"):
        prepare_data(config_of(line), progress=False)
    prepared = prepare_data(config_of(line | {"validation_fraction": 0.0}), progress=False)
    assert prepared.validation_prefix is None and list(prepared.tokens) == ["train"]


def test_other_mistakes(config_of: ConfigOf, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size = 100: smaller than the tokenizer's 257 tokens"):
        prepare_data(config_of(model={"vocab_size": 100}), progress=False)
    with pytest.raises(ConfigError, match=r"model.vocab_size.*synthetic"):
        prepare_data(config_of({"corpus": "synthetic"}), progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache .*cannot be used"):
        prepare_data(config_of({"cache": str(tmp_path / "file" / "cache")}), progress=False)
    with pytest.raises(ConfigError, match="no such file"):
        check_data(config_of({"corpus": str(tmp_path / "nowhere")}))


def test_command(config_of: ConfigOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"data": config_of().to_dict()["data"], "training": {"sequence_length": 16}}))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.main(parser.parse_args([str(path), "training.eval_batches=2", "--bigram", "--json"])) == 0
    result = json.loads(capsys.readouterr().out)
    sizes = [len(d.text.encode()) for d in documents(open_corpus(str(tmp_path / "corpus")), 0.2) if d.split == "train"]
    assert result["files"] == 40 and result["vocab_size"] == 257 and 1 < result["bigram_loss"] < np.log(257)
    assert result["train"]["documents"] == len(sizes) and result["train"]["tokens"] == sum(sizes) + len(sizes)
    assert result["train"]["bytes_per_token"] == pytest.approx(sum(sizes) / (sum(sizes) + len(sizes)))
    assert command.main(parser.parse_args([str(path)])) == 0
    assert "257" in capsys.readouterr().out
