"""Number of tokens of the configured tokenizer, and of rows of the embedding, counted without building a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from linear_moe.config.schema import Config, DataConfig
from linear_moe.modeling.config import ModelConfig
from linear_moe.options.errors import ConfigError


def tokenizer_size(data: DataConfig) -> int:
    """Number of tokens of the tokenizer that `data` describes; raises ConfigError for a folder without a tokenizer.

    A BPE tokenizer trained on a tiny corpus may come out smaller than configured, but never larger.
    """
    corpus = Path(data.corpus).expanduser()
    beside = corpus.parent / "tokenizer"  # tokenizer of an indexed dataset
    if data.tokenizer.type == "hf":
        if data.tokenizer.path is None:
            path = "data.tokenizer.path"
            raise ConfigError(path, None, "an hf tokenizer needs its folder", fix=f"set {path}=FOLDER")
        return _folder_size(Path(data.tokenizer.path))
    if Path(f"{corpus}.idx").is_file() and beside.is_dir():
        return _folder_size(beside)
    return 257 if data.tokenizer.type == "bytes" else data.tokenizer.vocab_size  # 256 bytes, 1 end token


def _folder_size(folder: Path) -> int:
    """Number of rows that the fast tokenizer in `folder` needs: its largest token id plus one."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        fix = "save one with save_pretrained of a fast tokenizer"
        raise ConfigError("data.tokenizer.path", str(folder), "must be a folder with a tokenizer.json", fix=fix)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        return max(ids + [token["id"] for token in content.get("added_tokens", [])]) + 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(str(file), ..., f"is not a tokenizer: {error!r}") from None


def embedding_rows(model: ModelConfig, tokens: int) -> int:
    """Rows of the embedding for a tokenizer of `tokens` tokens; raises ConfigError if model.vocab_size is too small."""
    if model.vocab_size is None:
        return -(-tokens // model.vocab_multiple) * model.vocab_multiple
    if model.vocab_size < tokens:
        constraint = f"smaller than the tokenizer's {tokens} tokens"
        raise ConfigError("model.vocab_size", model.vocab_size, constraint, fix=f"nearest valid: {tokens}, or null")
    return model.vocab_size


def vocab_size(config: Config) -> int:
    """Rows of the embedding, from the config alone."""
    rows, data = config.model.vocab_size, config.data
    if rows is not None and (data.corpus == "synthetic" or data.tokenizer.type == "hf"):
        return rows  # random tokens have no tokenizer, and a plan needs no tokenizer's folder
    return embedding_rows(config.model, tokenizer_size(config.data))
