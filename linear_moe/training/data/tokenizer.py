"""The three kinds of tokenizer (bytes, bpe, hf), each saved as a folder of a Hugging Face fast tokenizer.

`bytes` is a byte-level BPE without merges, so that it trains, exports and loads like the other kinds.
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
# Files of an exported model, which are not copied with the tokenizer in the same folder.
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors*", "README.md", "modeling_*.py")
PIECE = 1 << 20  # number of characters encoded at a time
BPE_SAMPLE_BYTES = 100_000_000  # bytes of text that train a bpe: more text takes time and hardly changes the vocabulary


def check_tokenizer(config: TokenizerConfig) -> None:
    """Raises ConfigError if the tokenizer cannot be made, or its folder is missing; loads nothing."""
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
    """JSON object that identifies a tokenizer for the data's key: its type, with its size or its files' hash."""
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
    """The configured tokenizer. A `bpe` is trained on `texts`. `bpe` and `bytes` restore any UTF-8 text exactly."""
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
    """Loads the tokenizer in `folder`, from disk only.

    Raises:
        ConfigError: the tokenizer is broken, is no fast tokenizer, or has no end-of-text token. The message names the
            config path `path`.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers passes on any exception of its parsers
        reason = str(error).strip().split("\n")[0][:200]
        raise ConfigError(path, str(folder), f"cannot be loaded as a tokenizer: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(path, str(folder), "must be a fast tokenizer", fix="save it with a tokenizer.json")
    if not isinstance(tokenizer.eos_token_id, int):
        raise ConfigError(path, str(folder), "has no end-of-text token", fix="set its eos_token")
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of ids, which is one more than the largest id, because a vocabulary may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


class Encoder:
    """Encodes texts into ids, many at a time. Special tokens in a text are encoded as text, and none are added."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64 `[n]`."""
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.int64) for e in encoded]


def text_pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Yields `text` in pieces of at most `size` characters, cut after a line end if the piece has one."""
    start = 0
    while len(text) - start > size:
        end = text.rfind("\n", start, start + size) + 1 or start + size
        yield text[start:end]
        start = end
    yield text[start:]


def copy_tokenizer(source: Path, folder: Path, name: str) -> None:
    """Copies the tokenizer in `source` to `folder`, whole or not at all.

    Args:
        name: name of the tokenizer in the error message.

    Raises:
        ConfigError: `folder` holds another tokenizer.
    """
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
    """Content of a folder's tokenizer.json, which defines the tokenizer; None if it cannot be read.

    The other files of the folder vary with the version of transformers, so they are not compared.
    """
    try:
        return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
