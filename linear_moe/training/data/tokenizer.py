"""The three kinds of tokenizer, all a Hugging Face fast tokenizer folder in the end.

`bytes` is a byte-level BPE without merges, so that it trains, exports and loads like the others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from linear_moe.config.schema import DataConfig, TokenizerConfig
from linear_moe.config.vocabulary import tokenizer_size
from linear_moe.options.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_DOCUMENT = "<|endoftext|>"
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors*", "README.md", "modeling_*.py")  # of an export
PIECE = 1 << 20  # characters encoded at a time
BPE_SAMPLE_BYTES = 100_000_000  # more text hardly changes a vocabulary, and takes time


def check_tokenizer(config: TokenizerConfig) -> None:
    """Raises ConfigError for a tokenizer that cannot be made or found; loads nothing."""
    if config.type != "hf":
        if config.path is not None:
            raise ConfigError(
                "data.tokenizer.path",
                config.path,
                "only an hf tokenizer has a path",
                fix="set data.tokenizer.type=hf, or leave the path out",
            )
        return
    tokenizer_size(DataConfig(tokenizer=config))


def tokenizer_key(config: TokenizerConfig) -> dict[str, Any]:
    """What the tokens depend on, as JSON: the kind, with its size or its files' hash."""
    if config.type == "bytes":
        return {"type": "bytes"}
    if config.type == "bpe":
        return {"type": "bpe", "vocab_size": config.vocab_size}
    assert config.path is not None
    files = hashlib.sha256()
    for path in sorted(p for p in Path(config.path).iterdir() if p.is_file() and "token" in p.name.lower()):
        files.update(path.name.encode() + b"\0" + path.read_bytes())
    return {"type": "hf", "sha256": files.hexdigest()}


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The configured tokenizer; `texts` trains a `bpe`. That and `bytes` restore any UTF-8 text exactly."""
    if config.type == "hf":
        assert config.path is not None
        return load_tokenizer(config.path, "data.tokenizer.path")

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    symbols = byte_symbols()
    if config.type == "bytes":
        tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(symbols)}, merges=[]))
    else:
        tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=config.type == "bpe")
    tokenizer.decoder = decoders.ByteLevel()
    if config.type == "bpe":
        # The end-of-document token is added last: it takes the highest id.
        trainer = trainers.BpeTrainer(vocab_size=config.vocab_size - 1, initial_alphabet=symbols, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT, clean_up_tokenization_spaces=False
    )


def byte_symbols() -> list[str]:
    """The printable character that stands for each of the 256 bytes in byte-level BPE vocabularies (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def load_tokenizer(folder: str | Path, path: str) -> PreTrainedTokenizerFast:
    """A tokenizer folder, from disk only. ConfigError about `path` if it is broken or has no end-of-text token."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers do
        reason = str(error).strip().split("\n")[0][:200]
        raise ConfigError(path, str(folder), f"cannot be loaded as a tokenizer: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(path, str(folder), "must be a fast tokenizer", fix="save it with a tokenizer.json")
    if not isinstance(tokenizer.eos_token_id, int):
        raise ConfigError(path, str(folder), "has no end-of-text token", fix="set its eos_token")
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id (a vocabulary may have holes)."""
    return max(tokenizer.get_vocab().values()) + 1


class Encoder:
    """Turns texts into ids, many at a time; special tokens in the text are text, none are added."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int64 array per text."""
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.int64) for e in encoded]


def text_pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """`text` in pieces of at most `size` characters, cut after a line where there is one."""
    start = 0
    while len(text) - start > size:
        end = text.rfind("\n", start, start + size) + 1 or start + size
        yield text[start:end]
        start = end
    yield text[start:]


def copy_tokenizer(source: Path, folder: Path, name: str) -> None:
    """Copy a tokenizer, called `name`, to `folder`, whole or not at all; ConfigError where that holds another one."""
    if folder.exists():
        if _tokenizer_json(folder) != _tokenizer_json(source):
            fix = f"set data.tokenizer.type=hf data.tokenizer.path={folder}, or choose another run folder"
            raise ConfigError(str(folder), ..., f"holds another tokenizer than {name}", fix=fix)
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*MODEL_FILES))
    partial.rename(folder)


def _tokenizer_json(folder: Path) -> Any:
    """What a tokenizer does; None where it cannot be read. The files beside it vary with transformers' version."""
    try:
        return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
