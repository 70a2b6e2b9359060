"""Round trips, reproducibility and the Hugging Face folder of the three kinds of tokenizer."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from linear_moe.config.schema import TokenizerConfig
from linear_moe.options.errors import ConfigError
from linear_moe.training.data.tokenizer import (
    END_OF_DOCUMENT,
    Encoder,
    check_tokenizer,
    make_tokenizer,
    text_pieces,
    tokenizer_key,
    vocabulary_size,
)

TEXTS = ["def f(x):\n    return x\n" * 9, "naïve Ωλ 漢字 🙂\r\n\t\x00", f"a{END_OF_DOCUMENT}b", " x ,  y . n't"]


def random_text(seed: int, length: int = 400) -> str:
    rng = random.Random(seed)
    points = [
        rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0xE000, 0x110000)]) for _ in range(length)
    ]
    return "".join(map(chr, points))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TokenizerConfig(type=kind, vocab_size=300), TEXTS)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    every_byte = "".join(map(chr, range(0x800)))
    texts = [*TEXTS, every_byte, *map(random_text, range(5))]
    for text, ids in zip(texts, Encoder(tokenizer)(texts), strict=True):
        assert tokenizer.eos_token_id not in ids  # the end-of-document token in a text is text
        assert tokenizer.decode(ids) == loaded.decode(ids) == text
        assert (
            loaded(text.replace(END_OF_DOCUMENT, ""))["input_ids"]
            == tokenizer(text.replace(END_OF_DOCUMENT, ""))["input_ids"]
        )
    assert (
        loaded.eos_token_id == tokenizer.eos_token_id == vocabulary_size(tokenizer) - 1 == vocabulary_size(loaded) - 1
    )


def test_bytes_are_utf8_bytes() -> None:
    tokenizer = make_tokenizer(TokenizerConfig(type="bytes"), ())
    text = "".join(map(chr, range(0x900))) + random_text(7)
    np.testing.assert_array_equal(Encoder(tokenizer)([text])[0], list(text.encode()))
    assert vocabulary_size(tokenizer) == 257 and tokenizer.eos_token_id == 256


def test_bpe_is_reproducible(tmp_path: Path) -> None:
    """Every byte of a bpe's folder is equal in another process, with another hash seed and number of threads."""
    code = """if True:
        import sys
        from linear_moe.config.schema import TokenizerConfig
        from linear_moe.training.data.tokenizer import make_tokenizer
        text = open(sys.argv[1]).read()
        make_tokenizer(TokenizerConfig(type="bpe", vocab_size=600), text.splitlines(True)).save_pretrained(sys.argv[2])
        """
    source = make_tokenizer.__code__.co_filename
    for name, threads in (("one", "1"), ("two", "4")):
        environment = {"PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads, "PYTHONPATH": ":".join(sys.path)}
        subprocess.run([sys.executable, "-c", code, source, tmp_path / name], env=environment, check=True, timeout=300)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_bpe_merges_and_fills_its_vocabulary() -> None:
    text = Path(make_tokenizer.__code__.co_filename).read_text()
    tokenizer = make_tokenizer(TokenizerConfig(type="bpe", vocab_size=400), [text])
    assert vocabulary_size(tokenizer) == 400
    assert len(Encoder(tokenizer)([text])[0]) < 0.6 * len(text.encode())


def test_hf_folder(tmp_path: Path) -> None:
    original = make_tokenizer(TokenizerConfig(type="bpe", vocab_size=300), TEXTS)
    original.backend_tokenizer.enable_truncation(4)  # a setting that must not cut documents
    original.save_pretrained(tmp_path / "tok")
    config = TokenizerConfig(type="hf", path=str(tmp_path / "tok"))
    check_tokenizer(config)
    before = tokenizer_key(config)
    tokenizer = make_tokenizer(config, ())
    np.testing.assert_array_equal(Encoder(tokenizer)([TEXTS[0]])[0], Encoder(original)([TEXTS[0]])[0])
    assert tokenizer.decode(Encoder(tokenizer)([TEXTS[0]])[0]) == TEXTS[0]
    (tmp_path / "tok" / "tokenizer_config.json").write_text("{}")
    assert tokenizer_key(config) != before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenizerConfig(type="hf"), "data.tokenizer.path = None: an hf tokenizer needs"),
        (TokenizerConfig(type="hf", path="/nowhere"), "data.tokenizer.path = '/nowhere': must be a folder"),
        (TokenizerConfig(type="bpe", path="x"), "only an hf tokenizer has a path"),
    ],
)
def test_bad_tokenizer(config: TokenizerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_tokenizer(config)


def test_broken_hf_folders(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ConfigError, match="cannot be loaded as a tokenizer"):
        make_tokenizer(TokenizerConfig(type="hf", path=str(tmp_path)), ())
    tokenizer = make_tokenizer(TokenizerConfig(type="bytes"), ())
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ConfigError, match="no end-of-text token"):
        make_tokenizer(TokenizerConfig(type="hf", path=str(tmp_path / "endless")), ())


def test_pieces() -> None:
    text = "line one\nline two\n" * 20 + "x" * 50
    cut = list(text_pieces(text, 32))
    assert "".join(cut) == text and max(map(len, cut)) <= 32
    assert all(piece.endswith("\n") for piece in cut[:13])
    assert list(text_pieces("")) == [""]
